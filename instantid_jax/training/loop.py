"""The loop around the step. Its order, always: validate, save, fetch the next batch, step, tell.

So a checkpoint of step n holds the state after n steps and the position of the batch that comes next, and a run that is
killed anywhere and resumed does again exactly what it would have done. The numbers of a step are fetched while the next
one runs.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import NamedTuple

import jax
import numpy as np

from instantid_jax.config import to_json
from instantid_jax.parallel.distributed import agreed, is_main, stacked
from instantid_jax.paths import flatten
from instantid_jax.running import EXIT_INTERRUPTED, lease, noted_signals
from instantid_jax.training.checkpoints import Checkpoints
from instantid_jax.training.config import TrainConfig
from instantid_jax.training.logging import Log
from instantid_jax.training.meters import LossGuard, Meters
from instantid_jax.training.run import Run
from instantid_jax.training.samples import sample_grid
from instantid_jax.training.step import Metrics

__all__ = ["BadSteps", "Run", "train"]

_ASK_EVERY = 10
"""Steps between the questions among several processes whether one of them was told to stop."""


class BadSteps(RuntimeError):
    """Too many steps with a loss or gradient that is not finite or too large."""


def train(run: Run, *, resume_step: int | None = None, damaged: str = "stop", log: Log | None = None, stopping: list[int] | None = None) -> int:
    """Runs or resumes to the last step. Returns 0, or `EXIT_INTERRUPTED` when told to stop.

    `stopping` is a list from `noted_signals`; without it, signals are noted from here on. Raises `BadSteps` by the guard's policy,
    `CheckpointError` for a checkpoint that cannot be used or is beyond the last step, `LeaseError` where another process trains in the
    same folder.
    """
    with contextlib.ExitStack() as stack:
        if stopping is None:
            stopping = stack.enter_context(noted_signals())
        stack.callback(run.loader.close)
        if is_main():
            stack.enter_context(lease(run.out))
        log = log or Log(run.out, tensorboard=run.config.log.tensorboard)
        stack.callback(log.close)
        checkpoints = Checkpoints(run.out / "checkpoints", run.config.checkpoint)
        with contextlib.closing(checkpoints):
            loop = _Loop(run, checkpoints, log, stopping)
            loop.resume(resume_step, damaged)
            if is_main():
                (run.out / "config.json").write_text(to_json(run.config) + "\n", encoding="utf-8")
            status = loop.run_steps()
            checkpoints.wait()
        if status == 0:
            log.say(f"weights: {run.export()}")
        return status


class _Pending(NamedTuple):
    """A step whose numbers have not been fetched."""

    step: int
    metrics: Metrics
    index: np.ndarray
    flops: float


class _Loop:
    """One pass through `train`: what it carries from step to step."""

    def __init__(self, run: Run, checkpoints: Checkpoints, log: Log, stopping: list[int]):
        self.run, self.checkpoints, self.log, self.stopping = run, checkpoints, log, stopping
        self.guard = LossGuard(run.config.guard.spike)
        self.meters = Meters(run.config.loader.global_batch)
        self.done = self.saved = self.checked = 0
        """Steps taken; step of the newest checkpoint; step of the newest validation."""
        self._pending: _Pending | None = None

    def resume(self, step: int | None, damaged: str) -> None:
        """State, data position and guard of the newest checkpoint, or of `step`."""
        run, config = self.run, self.run.config
        found = self.checkpoints.restore(run.program.abstract_state, step=step, damaged=damaged, last=config.steps)
        if found is not None:
            run.state = found.state
            run.loader.set_state(found.extra["data"])
            self.guard.restore(found.extra["guard"])
            self.done = self.saved = self.checked = found.step
            for line in _changes(found.extra["config"], config):
                self.log.say(f"changed since the checkpoint: {line}")
        elif config.guard.policy == "rewind":
            self._save(None)  # something to go back to
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        if self.done == config.steps:
            self.log.say(f"the run is at step {self.done} already, its last: nothing is left to train")
        else:
            self.log.say(f"training from step {self.done} to {config.steps} on {devices}")

    def run_steps(self) -> int:
        """The loop. Returns the exit status."""
        config = self.run.config
        while True:
            stop = self._told_to_stop()
            saving = self.done > self.saved and (stop or _due(config.checkpoint.every, self.done, config.steps))
            validating = self.checked != self.done and self._validation_due()
            if (saving or validating) and self._settle():
                continue
            value = self._validate() if validating else None
            if saving:
                self._save(value)
            if stop:
                self.log.say(f"stopped by signal {self.stopping[0] if self.stopping else ''} at step {self.done}; the same command goes on")
                return EXIT_INTERRUPTED
            if self.done >= config.steps:
                return 0
            self._advance()

    def _validation_due(self) -> bool:
        config = self.run.config
        return any(_due(every, self.done, config.steps) for every in (config.validation.every, config.validation.samples_every))

    def _validate(self) -> float | None:
        """Held-out losses and pictures, where they are due; the value that ranks a checkpoint of this step."""
        config, value = self.run.config, None
        self.checked = self.done  # a run that is resumed here did this before its checkpoint was written
        with self.meters.paused():
            if _due(config.validation.every, self.done, config.steps):
                told = self.run.validate()
                name = config.checkpoint.metric.removeprefix("validation/")
                value = told.get(name)
                if value is not None and name.endswith("_gap"):
                    value = -value  # the larger the better
                self.log.record("validation", self.done, told)
            if _due(config.validation.samples_every, self.done, config.steps):
                if jax.process_count() > 1:
                    self.log.say("samples: none are made with several processes; make them from a checkpoint's weights")
                else:
                    self.log.say(f"samples: {self.log.picture(self.done, sample_grid(self.run))}")
        return value

    def _advance(self) -> None:
        """One batch, one step, and the numbers of the step before."""
        run, began = self.run, time.perf_counter()
        batch = next(run.loader)
        self.meters.waited(time.perf_counter() - began)
        arrays = run.global_batch(batch)
        with self.meters.paused():
            step = run.program.compiled(run.state, run.frozen, arrays)
        run.state, metrics = step.call(run.state, run.frozen, arrays, np.float32(self.guard.limit(self.done + 1)))
        self.done += 1
        previous, self._pending = self._pending, _Pending(self.done, metrics, batch["index"], step.flops)
        if previous is not None and not self._finish(previous):
            self._after_bad()

    def _settle(self) -> bool:
        """Fetches the numbers of the last step; whether that led to another state."""
        previous, self._pending = self._pending, None
        return previous is not None and not self._finish(previous) and self._after_bad()

    def _finish(self, taken: _Pending) -> bool:
        """Fetches and tells the numbers of a step; whether it was good. Raises `BadSteps` by the policy."""
        config, step, row = self.run.config, taken.step, Metrics(*jax.device_get(taken.metrics))
        self.guard.add(step, float(row.loss), bool(row.good))
        self.meters.add(row, taken.flops)
        if step % config.log.every == 0 or step == config.steps:
            self.log.record("train", step, self.meters.summary())
        if row.good:
            return True
        what = "loss" if not np.isfinite(row.loss) else "gradient" if not np.isfinite(row.gradient_norm) else "loss spike"
        numbers = f"loss {float(row.loss):.4g}, gradient norm {float(row.gradient_norm):.4g}"
        where = f"step {step} ({config.stage.objective}): bad {what} ({numbers})"
        samples = _worst(self.run.rows(stacked(taken.index)), np.asarray(row.sample_loss))
        told = {"what": what, "loss": float(row.loss), "gradient_norm": float(row.gradient_norm), "samples": samples}
        self.log.record("bad_step", step, told, quiet=True)
        named = ", ".join(f"{i} ({self.run.source[i].key})" for i in samples[:8])
        text = f"{where}, samples {named}{' ...' if len(samples) > 8 else ''}"
        self.log.say(f"{text}; policy {config.guard.policy}")
        if config.guard.policy == "stop" or self.guard.bad >= config.guard.limit:
            raise BadSteps(f"{text}; {self.guard.bad} in a row, so the run ends; the last checkpoint is untouched")
        return False

    def _after_bad(self) -> bool:
        """With the policy "rewind": the last checkpoint's weights, at the data position and step of now, past the bad batch."""
        run = self.run
        if run.config.guard.policy != "rewind":
            return False
        self._pending = None
        position, bad = run.loader.get_state(), self.guard.bad
        self.checkpoints.wait()
        found = self.checkpoints.restore(run.program.abstract_state)
        assert found is not None  # one is written before the first step
        self.guard.restore(found.extra["guard"] | {"bad": bad})
        now = np.int32(self.done)
        run.state = found.state._replace(step=jax.make_array_from_callback((), found.state.step.sharding, lambda _: now))
        run.loader.set_state(position)
        self.log.say(f"back to the weights of step {found.step}, going on with the data after step {self.done}")
        return True

    def _save(self, value: float | None) -> None:
        run = self.run
        extra = {"data": run.loader.get_state(), "guard": self.guard.state(), "config": to_json(run.config)}
        with self.meters.paused():
            self.checkpoints.save(self.done, run.state, extra, value)
        self.saved = self.done

    def _told_to_stop(self) -> bool:
        """Whether to stop, the same in all processes: signals may reach them at different steps."""
        if jax.process_count() > 1 and self.done % _ASK_EVERY:
            return False
        return agreed(bool(self.stopping))


def _due(every: int | None, done: int, last: int) -> bool:
    return every is not None and done > 0 and (done % every == 0 or done == last)


def _worst(index: np.ndarray, losses: np.ndarray) -> list[int]:
    """Records of a batch, those with a loss that is not finite first, then by falling loss; only the former where there are any."""
    losses = np.asarray(losses, np.float64)
    broken = ~np.isfinite(losses)
    order = np.argsort(-np.where(broken, np.inf, losses), kind="stable")
    return [int(index[i]) for i in order if broken[i] or not broken.any()]


def _changes(before: str, config: TrainConfig) -> list[str]:
    """Settings that differ from those of a checkpoint, as "optimizer/learning_rate: 0.001 is now 0.002"."""
    old, new = flatten(json.loads(before)), flatten(json.loads(to_json(config)))
    return [f"{name}: {old.get(name, 'nothing')} is now {new.get(name, 'nothing')}" for name in {**old, **new} if old.get(name) != new.get(name)]
