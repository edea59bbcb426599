"""The loop around the step. Its order, always: validate, save, fetch the next batch, step, tell.

So a checkpoint of step n holds the state after n steps and the position of the batch that comes next, and a run that is
killed anywhere and resumed does again exactly what it would have done. The numbers of a step are fetched while the next
one runs.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from instantid_jax.config import to_json
from instantid_jax.data.loader import BatchIterator, make_loader
from instantid_jax.data.sources import RecordSource, open_source
from instantid_jax.models import Network
from instantid_jax.parallel.mesh import make_mesh
from instantid_jax.parallel.rules import partition_spec
from instantid_jax.paths import Tree
from instantid_jax.training.checkpoints import Checkpoints
from instantid_jax.training.config import TrainConfig
from instantid_jax.training.logging import Log
from instantid_jax.training.meters import LossGuard, Meters
from instantid_jax.training.networks import training_networks
from instantid_jax.training.objectives import Objective
from instantid_jax.training.optim import make_optimizer
from instantid_jax.training.samples import sample_grid
from instantid_jax.training.state import TrainState, initial_parameters, initial_state, merge, split
from instantid_jax.training.step import Metrics, make_evaluation, make_step
from instantid_jax.training.weights import export_weights, tokenizers_for, with_latent_statistics

__all__ = ["EXIT_INTERRUPTED", "BadSteps", "Run", "train"]

EXIT_INTERRUPTED = 75
"""Exit status after SIGTERM or SIGINT: the state is saved, the same command goes on (EX_TEMPFAIL of sysexits.h)."""

USED = (
    "image", "latent_mean", "latent_logvar", "keypoint_image", "face_box", "input_ids", "input_ids_2", "text_states", "text_pooled",
    "embedding", "sizes",
)  # fmt: skip


class BadSteps(RuntimeError):
    """Too many steps with a loss or gradient that is not finite or too large."""


class Run:
    """A training run: its networks, data, state and compiled step. `train` drives it."""

    def __init__(self, config: TrainConfig, *, source: RecordSource | None = None, validation: RecordSource | None = None):
        self.config, self.out = config, Path(config.out)
        self.mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        self.networks: Mapping[str, Network] = training_networks(config)
        self.objective = Objective(self.networks, config.model, config.stage, config.loss)
        self.out.mkdir(parents=True, exist_ok=True)
        self.tokenizers = tokenizers_for(config.model, config.init, self.out)
        self.source = source or open_source(config.data, config.data_split)
        self._validation_source = validation
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        self.loader = self._loader(self.source)
        self.step = jax.jit(make_step(self.objective, config, self.optimizer), donate_argnums=0)
        self.evaluate = jax.jit(make_evaluation(self.objective))
        self.state, self.frozen = self._start()

    def _loader(self, source: RecordSource) -> BatchIterator:
        return make_loader(source, self.config.loader, self.tokenizers, jax.process_index(), jax.process_count())

    def _start(self) -> tuple[TrainState, Tree]:
        """Initial state and frozen weights, spread over the mesh."""
        config = self.config
        parameters = initial_parameters(self.networks, config.init, jax.random.key(config.seed))
        trained, frozen = split(parameters, config.stage)
        if config.frozen_dtype != "float32":
            frozen = jax.tree.map(lambda x: x.astype(config.frozen_dtype), frozen)
        state = initial_state(trained, self.optimizer, ema=config.optimizer.ema is not None)
        return self.place(state), self.place(frozen)

    def place(self, tree: Any) -> Any:
        """The tree over the mesh's devices, by the rules of `parallel.rules`."""
        return jax.device_put(tree, self.shardings(tree))

    def shardings(self, tree: Any) -> Any:
        """A sharding for every leaf; an optimizer's moments lie as their parameters do."""

        def one(path: Any, leaf: Any) -> NamedSharding:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return NamedSharding(self.mesh, partition_spec(name, tuple(np.shape(leaf)), self.mesh))

        return jax.tree_util.tree_map_with_path(one, tree)

    def global_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows as part of arrays over all devices."""
        sharding = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))
        used = {name: batch[name] for name in USED if name in batch}
        return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in used.items()}

    def weights(self) -> Tree:
        """Trained (their moving average, where there is one) and frozen parameters together."""
        return merge(self.state.ema or self.state.parameters, self.frozen)

    def abstract_state(self) -> TrainState:
        """Shapes and places of the state."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)

    @functools.cached_property
    def validation(self) -> list[dict[str, jax.Array]]:
        """The fixed validation batches: no dropout, in the order of the validation set."""
        config = self.config
        source = self._validation_source or open_source(config.data, config.validation.split)
        plain = dataclasses.replace(config.loader, drop_text=0.0, drop_identity=0.0, drop_both=0.0, num_threads=0, seed=0)
        loader = make_loader(source, plain, self.tokenizers, jax.process_index(), jax.process_count())
        return [self.global_batch(next(loader)) for _ in range(config.validation.batches)]

    def validate(self) -> dict[str, float]:
        """Mean losses and gaps over the validation batches, with the same noise every time."""
        rows = []
        for number, batch in enumerate(self.validation):
            rows.append(self.evaluate(self.state.ema or self.state.parameters, self.frozen, batch, jax.random.key(number)))
        return {name: float(np.mean([float(row[name]) for row in rows])) for name in rows[0]}

    def export(self) -> Path:
        """Writes `out`/weights."""
        model = self.config.model
        if self.config.stage.objective == "reconstruct":
            model = with_latent_statistics(model, *self._latent_statistics())
        export_weights(self.out / "weights", model, self.networks, self.weights(), self.config.init, self.out)
        return self.out / "weights"

    def _latent_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each latent channel over some batches."""
        vae, parameters = self.networks["vae"], self.weights()["vae"]
        encode = jax.jit(lambda image: vae.bind(parameters).encode(image.astype("float32") / 127.5 - 1).mean)
        loader = self._loader(self.source)
        z = np.concatenate([np.asarray(encode(self.global_batch(next(loader))["image"])) for _ in range(16)])
        loader.close()
        return z.mean((0, 1, 2)), z.std((0, 1, 2))


def train(run: Run, *, resume_step: int | None = None, damaged: str = "stop", log: Log | None = None) -> int:
    """Runs or resumes to the last step. Returns 0, or `EXIT_INTERRUPTED` when told to stop.

    Raises `BadSteps` by the guard's policy, `CheckpointError` for a checkpoint that cannot be used.
    """
    config, log = run.config, log or Log(run.out, tensorboard=run.config.log.tensorboard)
    if jax.process_index() == 0:
        (run.out / "config.json").write_text(to_json(config) + "\n", encoding="utf-8")
    checkpoints, guard = Checkpoints(run.out / "checkpoints", config.checkpoint), LossGuard(config.guard.spike)
    try:
        done = _resume(run, checkpoints, guard, resume_step, damaged)
        log.say(f"training from step {done} to {config.steps} on {jax.device_count()} x {jax.devices()[0].device_kind}")
        with _signals() as stopping:
            status = _steps(run, checkpoints, guard, log, done, stopping)
        checkpoints.wait()
        if status == 0:
            log.say(f"weights: {run.export()}")
        return status
    finally:
        checkpoints.close()
        run.loader.close()
        log.close()


def _resume(run: Run, checkpoints: Checkpoints, guard: LossGuard, step: int | None, damaged: str) -> int:
    found = checkpoints.restore(run.abstract_state(), step=step, damaged=damaged)
    if found is None:
        return 0
    run.state = found.state
    run.loader.set_state(found.extra["data"])
    guard.restore(found.extra["guard"])
    return found.step


def _steps(run: Run, checkpoints: Checkpoints, guard: LossGuard, log: Log, done: int, stopping: list[int]) -> int:
    config, value = run.config, None
    meters = Meters(config.loader.global_batch, None)
    pending: tuple[int, Metrics, np.ndarray] | None = None
    bad, saved = 0, done
    while True:
        if _due(config.validation.every, done, config.steps):
            told = run.validate()
            value = told.get(config.checkpoint.metric.split("/")[-1])
            log.record("validation", done, told)
        if _due(config.validation.samples_every, done, config.steps):
            log.say(f"samples: {log.picture(done, sample_grid(run))}")
        stop = _agreed(stopping, done)
        if done > saved and (stop or _due(config.checkpoint.every, done, config.steps)):
            if pending is not None:
                bad = _finish(pending, run, guard, meters, log, bad)
                pending = None
            checkpoints.save(done, run.state, _extra(run, guard), value)
            saved = done
        if stop:
            log.say(f"stopped by signal {stopping[0] if stopping else ''} at step {done}; the same command goes on")
            return EXIT_INTERRUPTED
        if done >= config.steps:
            return 0
        began = time.perf_counter()
        batch = next(run.loader)
        meters.waited(time.perf_counter() - began)
        limit = np.float32(guard.limit())
        run.state, metrics = run.step(run.state, run.frozen, run.global_batch(batch), limit)
        done += 1
        if pending is not None:
            bad = _finish(pending, run, guard, meters, log, bad)
        pending = (done, metrics, batch["index"])
        if bad and config.guard.policy == "rewind":
            done, bad, pending = _rewind(run, checkpoints, guard, log, done), 0, None
        if done % config.log.every == 0 or done == config.steps:
            log.record("train", done, meters.summary())


def _due(every: int | None, done: int, last: int) -> bool:
    return every is not None and done > 0 and (done % every == 0 or done == last)


def _extra(run: Run, guard: LossGuard) -> dict[str, Any]:
    return {"data": run.loader.get_state(), "guard": guard.state(), "config": to_json(run.config)}


def _finish(pending: tuple[int, Metrics, np.ndarray], run: Run, guard: LossGuard, meters: Meters, log: Log, bad: int) -> int:
    """Fetches the numbers of a step; returns how many bad ones there are in a row."""
    step, metrics, index = pending
    row = Metrics(*jax.device_get(metrics))
    guard.add(float(row.loss), bool(row.good))
    meters.add(row)
    if row.good:
        return 0
    config = run.config
    what = "loss" if not np.isfinite(row.loss) else "gradient" if not np.isfinite(row.gradient_norm) else "loss spike"
    text = (
        f"step {step} ({config.stage.objective}): bad {what} (loss {float(row.loss):.4g}, gradient norm {float(row.gradient_norm):.4g}), "
        f"samples {', '.join(map(str, index[:8]))}{' ...' if len(index) > 8 else ''}"
    )
    log.say(f"{text}; policy {config.guard.policy}")
    if config.guard.policy == "stop" or bad + 1 >= config.guard.limit:
        raise BadSteps(f"{text}; {bad + 1} in a row, so the run ends; the last checkpoint is untouched")
    return bad + 1


def _rewind(run: Run, checkpoints: Checkpoints, guard: LossGuard, log: Log, done: int) -> int:
    """State of the last checkpoint, at the data position and step of now: the bad batch is not met again."""
    position = run.loader.get_state()
    checkpoints.wait()
    found = checkpoints.restore(run.abstract_state())
    if found is None:
        raise BadSteps("guard.policy is rewind, but there is no checkpoint yet to go back to")
    guard.restore(found.extra["guard"])
    run.state = found.state._replace(step=jax.device_put(np.int32(done), found.state.step.sharding))
    run.loader.set_state(position)
    log.say(f"back to the weights of step {found.step}, going on with the data after step {done}")
    return done


def _agreed(stopping: list[int], done: int) -> bool:
    """Whether to stop, the same in all processes: signals may reach them at different steps."""
    if jax.process_count() == 1:
        return bool(stopping)
    if done % 10:
        return False
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.bool_(bool(stopping)))))


class _signals:
    """Within it, SIGTERM and SIGINT are noted in a list instead of ending the process."""

    def __enter__(self) -> list[int]:
        self.noted: list[int] = []
        self._old = {number: signal.signal(number, lambda s, _: self.noted.append(s)) for number in (signal.SIGTERM, signal.SIGINT)}
        return self.noted

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


