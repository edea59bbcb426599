"""Checkpoints of a run: the whole state in Orbax, written in the background, there whole or not at all.

Beside the arrays lie, in the checkpoint's own metadata, the position in the data, the loss history of the guard and the
resolved configuration. An old checkpoint is deleted only after a newer one is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from instantid_jax.checkpoint import quiet_orbax
from instantid_jax.training.config import CheckpointConfig

__all__ = ["CheckpointError", "Checkpoints", "Restored"]

_policies = ocp.training.preservation_policies


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and what to do."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read."""

    step: int
    state: Any
    extra: dict[str, Any]
    """What `save` was given beside the state."""


class Checkpoints:
    """The checkpoints under one folder. Every process of a run makes one and calls its methods in the same order."""

    def __init__(self, folder: str | Path, config: CheckpointConfig):
        self.folder = Path(folder).absolute()
        keep: list[Any] = [_policies.LatestN(max(config.keep, 1))]
        if config.keep_best:
            keep.append(_policies.BestN(get_metric_fn=lambda metrics: -float(metrics["value"]), n=config.keep_best))
        with quiet_orbax():
            self._orbax = ocp.training.Checkpointer(
                self.folder, preservation_policy=_policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True
            )

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(found.step for found in self._orbax.checkpoints)

    def save(self, step: int, state: Any, extra: Mapping[str, Any], value: float | None = None) -> None:
        """Begins to write `state` in the background; it may be donated or changed as soon as this returns.

        `extra` is JSON; `value` is the validation metric, lower being better.
        """
        if step in self.steps:
            return
        metrics = None if value is None else {"value": float(value)}
        with quiet_orbax():
            self._orbax.save_pytree_async(step, _named(state), force=True, metrics=metrics, custom_metadata=dict(extra))

    def wait(self) -> None:
        """Returns when everything is written. Raises what went wrong in the background."""
        with quiet_orbax():
            self._orbax.wait()

    def close(self) -> None:
        """Waits for the writing and ends it."""
        with quiet_orbax():
            self._orbax.close()

    def restore(self, like: Any, *, step: int | None = None, damaged: str = "stop") -> Restored | None:
        """The newest checkpoint (or that of `step`) in the shapes and places of `like`; None where there is none.

        `like` is a tree of `ShapeDtypeStruct`s with shardings, which may be other than when the checkpoint was written.
        A checkpoint that cannot be read raises `CheckpointError`; with `damaged="previous"` the one before is taken.
        """
        steps = self.steps
        if step is not None:
            if step not in steps:
                raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}")
            steps = [step]
        for number in reversed(steps):
            try:
                return self._read(number, like)
            except _Damaged as problem:
                earlier = [s for s in steps if s < number]
                if damaged != "previous" or not earlier:
                    hint = f"; --resume-damaged previous goes on from step {earlier[-1]}" if earlier else ""
                    raise CheckpointError(f"checkpoint {self.folder / str(number)} is damaged ({problem}){hint}") from problem
                print(f"checkpoint {self.folder / str(number)} is damaged ({problem}); going on from step {earlier[-1]}", flush=True)
        return None

    def _read(self, step: int, like: Any) -> Restored:
        wanted = _named(like)
        with quiet_orbax():
            try:
                found = self._orbax.pytree_metadata(step)
                there, extra = dict(found.metadata), dict(found.custom_metadata or {})
            except (ValueError, OSError, KeyError, TypeError, RuntimeError) as problem:
                raise _Damaged(_first_line(problem)) from problem
            _compare(self.folder / str(step), there, wanted)
            try:
                arrays = self._orbax.load_pytree(step, wanted)
            except (ValueError, OSError, KeyError, TypeError, RuntimeError) as problem:
                raise _Damaged(_first_line(problem)) from problem
        leaves, structure = jax.tree.flatten(like)
        names = list(_named(like))
        assert len(names) == len(leaves)
        return Restored(step, structure.unflatten([arrays[name] for name in names]), extra)


class _Damaged(Exception):
    pass


def _first_line(problem: BaseException) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)[:300]


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, e.g. "parameters/unet/conv_in/kernel" or "optimizer/1/0/mu/unet/conv_in/kernel"."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _compare(where: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` with a diff where a checkpoint is of another model or optimizer."""
    lines = [f"  only in the checkpoint: {name} {tuple(there[name].shape)}" for name in there if name not in wanted]
    lines += [f"  only in this run: {name} {tuple(np.shape(wanted[name]))}" for name in wanted if name not in there]
    for name in there.keys() & wanted.keys():
        old, new = tuple(there[name].shape), tuple(wanted[name].shape)
        if old != new:
            lines.append(f"  {name}: {old} in the checkpoint, {new} in this run")
    if lines:
        rest = f"\n  and {len(lines) - 12} more" if len(lines) > 12 else ""
        listed = "\n".join(sorted(lines)[:12])
        raise CheckpointError(f"checkpoint {where} is of another model, stage or optimizer:\n{listed}{rest}\nuse its own config, or another --out")


@contextlib.contextmanager
def abandoned(checkpoints: Checkpoints) -> Any:
    """Closes the checkpoints whatever happens within."""
    try:
        yield checkpoints
    finally:
        checkpoints.close()
