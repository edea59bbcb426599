"""A run: a program with its data, its weights and its place on disk. `training.loop.train` drives it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instantid_jax.data.loader import BatchIterator, LoaderConfig, make_loader
from instantid_jax.data.record import DataError
from instantid_jax.data.sources import RecordSource, open_source
from instantid_jax.parallel.distributed import is_main, stacked, synchronize, to_host
from instantid_jax.parallel.mesh import batch_rows, batch_sharding, make_mesh
from instantid_jax.paths import Tree, flatten, unflatten
from instantid_jax.training.config import TrainConfig
from instantid_jax.training.program import Program
from instantid_jax.training.state import TrainState, initial_parameters, merge, split
from instantid_jax.training.weights import export_weights, tokenizers_for, with_latent_statistics

__all__ = ["Run"]

USED = (
    "image", "latent_mean", "latent_logvar", "keypoint_image", "face_box", "input_ids", "input_ids_2", "text_states", "text_pooled",
    "embedding", "sizes",
)  # fmt: skip


class Run:
    """A training run: its networks, data, weights and compiled step.

    Weights are made or read when they are first asked for: a run that resumes never makes its initial ones. A `program` of
    the same configuration and devices may be given, which saves compiling again.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        source: RecordSource | None = None,
        validation: RecordSource | None = None,
        program: Program | None = None,
    ):
        self.config, self.out = config, Path(config.out)
        self.mesh = make_mesh(**dataclasses.asdict(config.mesh))
        self.program = program or Program(config, self.mesh)
        self.networks, self.objective = self.program.networks, self.program.objective
        self.own_rows = batch_rows(self.mesh, config.loader.global_batch)
        self.source = source or open_source(config.data, config.data_split)
        _check_embeddings(config, self.source)
        if validation is None and (config.validation.every is not None or config.validation.samples_every is not None):
            validation = open_source(config.data, config.validation.split)  # now: a split that is not there must not show after hours
        self._validation_source = validation
        if is_main():
            self.out.mkdir(parents=True, exist_ok=True)
            tokenizers_for(config.model, config.init, self.out)
        synchronize("tokenizers")
        self.tokenizers = tokenizers_for(config.model, config.init, self.out)
        self.loader = self._loader(self.source, config.data_loader)
        self._state: TrainState | None = None
        self._frozen: Tree | None = None

    def _loader(self, source: RecordSource, config: LoaderConfig) -> BatchIterator:
        return make_loader(source, config, self.tokenizers, rows=self.own_rows)

    @property
    def state(self) -> TrainState:
        """The trained part; the initial one until it is set."""
        if self._state is None:
            self._start(None)
        assert self._state is not None
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state = state

    @property
    def frozen(self) -> Tree:
        """The weights that never change, over the mesh."""
        if self._frozen is None:
            if self._state is None:
                self._start(None)
            else:
                self._start({path.split("/")[0] for path in flatten(self.program.abstract_frozen)})
        assert self._frozen is not None
        return self._frozen

    def _start(self, only: set[str] | None) -> None:
        """Initial weights, made on the host and spread over the mesh; of `only` these networks, and then no initial state."""
        config, program = self.config, self.program
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            parameters = initial_parameters(self.networks, config.init, jax.random.key(config.seed), only)
            if only is None:
                trained, frozen = split(parameters, config.stage)
            else:
                wanted, given = flatten(program.abstract_frozen), flatten(parameters)
                trained, frozen = {}, unflatten({path: given[path] for path in wanted})
            frozen = program.stored(frozen)
        self._frozen = _spread(frozen, program.abstract_frozen)
        if only is None:
            self._state = program.initial_state(_spread(trained, program.abstract_state.parameters))

    def global_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows as part of arrays over all devices."""
        sharding, rows = batch_sharding(self.mesh), self.config.loader.global_batch

        def one(x: np.ndarray) -> jax.Array:
            def part(place: Any) -> np.ndarray:
                start, stop, _ = place[0].indices(rows)
                first = int(np.searchsorted(self.own_rows, start))
                return x[first : first + stop - start]

            return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, part)

        return {name: one(batch[name]) for name in USED if name in batch}

    def rows(self, parts: np.ndarray) -> np.ndarray:
        """Every process's rows [processes, n] in the order of the global batch [b]."""
        whole = np.empty(self.config.loader.global_batch, parts.dtype)
        whole[stacked(self.own_rows.astype(np.int32))] = parts  # processes that differ only along `tensor` have the same rows
        return whole

    def weights(self) -> Tree:
        """Trained (their moving average, where there is one) and frozen parameters together."""
        return merge(self.state.ema or self.state.parameters, self.frozen)

    @functools.cached_property
    def validation(self) -> list[dict[str, jax.Array]]:
        """The fixed validation batches: no dropout, in the order of the validation set."""
        config = self.config
        source = self._validation_source or open_source(config.data, config.validation.split)
        plain = dataclasses.replace(config.data_loader, drop_text=0.0, drop_identity=0.0, drop_both=0.0, num_threads=0, seed=0)
        loader = self._loader(source, plain)
        batches = [self.global_batch(next(loader)) for _ in range(config.validation.batches)]
        loader.close()
        return batches

    def validate(self) -> dict[str, float]:
        """Mean losses and gaps over the validation batches, with the same noise every time."""
        rows = []
        for number, batch in enumerate(self.validation):
            told = self.program.evaluate(self.state.ema or self.state.parameters, self.frozen, batch, jax.random.key(number))
            rows.append(jax.device_get(told))
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def export(self) -> Path:
        """Writes `out`/weights: the trained networks, and copies of the others."""
        model = self.config.model
        if self.config.stage.objective == "reconstruct":
            model = with_latent_statistics(model, *self._latent_statistics())
        base = Path(self.config.init.weights) if self.config.init.weights is not None else None
        touched = {path.split("/")[0] for path in flatten(self.program.abstract_state.parameters)}
        written = {name: tree for name, tree in self.weights().items() if name in touched or base is None or not (base / name).is_dir()}
        host = {name: jax.tree.map(_as_float32, to_host(tree)) for name, tree in written.items()}
        export_weights(self.out / "weights", model, self.networks, host, self.config.init, self.out)
        return self.out / "weights"

    def _latent_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each latent channel over some batches."""
        vae, parameters = self.networks["vae"], self.weights()["vae"]

        def mean(parameters: Tree, image: jax.Array) -> jax.Array:
            return vae.bind(parameters).encode(image.astype("float32") / 127.5 - 1).mean

        encode = jax.jit(mean, out_shardings=self.program.replicated)
        loader = self._loader(self.source, self.config.data_loader)
        z = np.concatenate([np.asarray(encode(parameters, self.global_batch(next(loader))["image"])) for _ in range(16)])
        loader.close()
        return z.mean((0, 1, 2)), z.std((0, 1, 2))


def _check_embeddings(config: TrainConfig, source: RecordSource) -> None:
    """Raises `DataError` for a data set whose embeddings the model cannot take."""
    if config.stage.objective != "recognize" and "resampler" not in config.networks:
        return
    own = config.recognizer.embedding_dim if config.stage.objective == "recognize" else None
    wanted, record = own or config.model.resampler.embedding_dim, source[0]
    if record.embeddings.shape[1] != wanted:
        raise DataError(
            f"the data has embeddings of {record.embeddings.shape[1]} values by {record.embedder!r}, but the model takes {wanted}, by "
            f"{config.model.face_analyzer!r}; prepare the data with that analyzer, or train a model with this embedding_dim and face_analyzer"
        )


def _as_float32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def _spread(tree: Tree, like: Tree) -> Tree:
    """Host arrays, the same in every process, as arrays over the mesh in the shapes, types and places of `like`."""

    def one(x: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        host = np.asarray(x).astype(wanted.dtype)
        return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda place: host[place])

    return jax.tree.map(one, tree, like)
