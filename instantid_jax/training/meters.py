"""Counting: losses between two log lines, speed, waiting for data, floating-point operations, memory; and the loss guard."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from instantid_jax.training.step import Metrics

__all__ = ["LossGuard", "Meters", "peak_flops"]

# Dense bfloat16 FLOP/s of one device, from the vendors' data sheets.
_PEAKS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
}  # fmt: skip


def peak_flops(device: Any) -> float | None:
    """The device's data-sheet bfloat16 FLOP/s; None where it is not known, as for a CPU."""
    kinds = [kind for kind in _PEAKS if device.device_kind.startswith(kind)]
    return _PEAKS[max(kinds, key=len)] if kinds else None


class Meters:
    """What is told every N steps. `add` and `waited` are called every step, `summary` empties the meters."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._reset()

    def _reset(self) -> None:
        self._rows: list[Metrics] = []
        self._flops = 0.0
        self._waited, self._began = 0.0, time.perf_counter()

    def add(self, metrics: Metrics, flops: float) -> None:
        """Values (numpy) of one finished step, and the operations of its program over all devices."""
        self._rows.append(metrics)
        self._flops += flops

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within (compiling, validating, saving) is no part of the speed of training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - began

    def waited(self, seconds: float) -> None:
        """Time that the loop stood still for the next batch."""
        self._waited += seconds

    def summary(self) -> dict[str, Any]:
        """Means since the last summary, JSON-ready; empty where no step has finished."""
        if not self._rows:
            return {}
        seconds = max(time.perf_counter() - self._began, 1e-9)
        rows = self._rows
        good = [row for row in rows if row.good] or rows
        out: dict[str, Any] = {
            "loss": float(np.mean([row.loss for row in good])),
            "plain_loss": float(np.mean([row.plain_loss for row in good])),
            "gradient_norm": float(np.mean([row.gradient_norm for row in good])),
            "learning_rate": float(rows[-1].learning_rate),
            "bad_steps": sum(not row.good for row in rows),
            "images_per_second": len(rows) * self.batch / seconds,
            "data_wait_share": self._waited / seconds,
            "memory_gib": memory_gib(),
        }
        total, count = (np.sum([getattr(row, name) for row in good], axis=0) for name in ("bucket_loss", "bucket_count"))
        out["loss_by_noise"] = [float(a / b) if b else None for a, b in zip(total, count, strict=True)]
        rate, peak = self._flops / seconds / jax.device_count(), peak_flops(jax.devices()[0])
        out["tflops_per_device"] = rate / 1e12
        out["mfu"] = rate / peak if peak else None
        self._reset()
        return out


def memory_gib() -> float:
    """Peak memory of the first local device, or of the process where the device does not tell (CPU), in GiB."""
    stats = jax.local_devices()[0].memory_stats()
    peak = stats.get("peak_bytes_in_use") if stats else None
    return (peak if peak is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30


class LossGuard:
    """The largest loss that a step may have: `spike` times a running mean of the losses up to two steps before it.

    Two steps, because the loss of a step is fetched while the next one runs. What a step is held to depends on its number
    and the losses alone, not on when they were fetched, and the history goes into the checkpoint: a resumed run judges the
    same.
    """

    def __init__(self, spike: float | None) -> None:
        self.spike = spike
        self.mean: float | None = None
        self.bad = 0
        """Bad steps in a row."""
        self._recent: list[tuple[int, float]] = []

    def limit(self, step: int) -> float:
        """Threshold for this step; steps are asked for in rising order."""
        while self._recent and self._recent[0][0] <= step - 2:
            _, loss = self._recent.pop(0)
            self.mean = loss if self.mean is None else 0.95 * self.mean + 0.05 * loss
        if self.spike is None or self.mean is None:
            return float("inf")
        return self.spike * self.mean

    def add(self, step: int, loss: float, good: bool) -> None:
        """Loss of a finished step; that of a bad one does not count."""
        self.bad = 0 if good else self.bad + 1
        if good:
            self._recent.append((step, loss))

    def state(self) -> dict[str, Any]:
        """JSON for the checkpoint."""
        return {"mean": self.mean, "recent": [list(pair) for pair in self._recent], "bad": self.bad}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.mean, self.bad = state["mean"], state.get("bad", 0)
        self._recent = [(int(pair[0]), float(pair[1])) for pair in state["recent"] if isinstance(pair, list)]
