"""The compiled side of a run: networks, shapes and places of every array, and the step for each shape of batch.

Nothing here needs weights or data: a plan for a large machine is made from it on a small one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from instantid_jax.models import Network
from instantid_jax.parallel.flops import count_flops
from instantid_jax.parallel.mesh import batch_sharding
from instantid_jax.parallel.rules import shardings
from instantid_jax.paths import Tree, map_paths
from instantid_jax.training.config import TrainConfig
from instantid_jax.training.networks import training_networks
from instantid_jax.training.objectives import Objective
from instantid_jax.training.optim import make_optimizer
from instantid_jax.training.state import TrainState, check_multipliers, initial_state, split
from instantid_jax.training.step import make_evaluation, make_step

__all__ = ["CompiledStep", "Program"]

Function = TypeVar("Function", bound=Callable[..., Any])


class CompiledStep(NamedTuple):
    """A step for batches of one shape."""

    call: Any
    """``call(state, frozen, batch, limit) -> state, metrics``; the state is donated."""
    flops: float
    """Of matrix products and convolutions, over all devices (`parallel.flops`)."""
    seconds: float
    """How long compiling took."""


_TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 2**20}
"""Gradients of split weights are computed and then summed, not summed piece by piece between products of a device's few rows: those leave
most of a chip's matrix unit idle, and cost 6 % more operations and 11 % more cycles by the compiler's count (docs/scale.md)."""


class Program:
    """What is the same in every run of a configuration on a mesh."""

    def __init__(self, config: TrainConfig, mesh: Mesh | AbstractMesh):
        self.config, self.mesh = config, mesh
        self.networks: Mapping[str, Network] = training_networks(config)
        self.objective = Objective(self.networks, config.model, config.stage, config.loss)
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        trained, frozen = split({name: network.abstract for name, network in self.networks.items()}, config.stage)
        check_multipliers(trained, config.optimizer.multipliers)
        trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trained)
        state = jax.eval_shape(self._initial, trained)
        self.replicated = replicated = NamedSharding(mesh, PartitionSpec())
        self.abstract_state: TrainState = _placed(state, mesh)
        self.abstract_frozen: Tree = _placed(self.stored(frozen), mesh)
        places = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        self.initial_state = jax.jit(self._initial, out_shardings=places)
        step, evaluation = self._on_mesh(make_step(self.objective, config, self.optimizer)), self._on_mesh(make_evaluation(self.objective))
        device = self._abstract_mesh.abstract_device
        options = _TPU_OPTIONS if device is not None and device.platform == "tpu" else None
        self.step = jax.jit(step, donate_argnums=0, out_shardings=(places, replicated), compiler_options=options)
        self.evaluate = jax.jit(evaluation, out_shardings=replicated)
        self._compiled: dict[Any, CompiledStep] = {}

    @property
    def _abstract_mesh(self) -> AbstractMesh:
        return self.mesh if isinstance(self.mesh, AbstractMesh) else self.mesh.abstract_mesh

    def _on_mesh(self, function: Function) -> Function:
        """`function`, traced where layers see the mesh (`nn.placement`)."""
        mesh = self._abstract_mesh

        @functools.wraps(function)
        def traced(*arguments: Any) -> Any:
            with jax.sharding.use_abstract_mesh(mesh):
                return function(*arguments)

        return traced  # type: ignore[return-value]

    def _initial(self, trained: Tree) -> TrainState:
        # The step overwrites the state's memory, so no array of it may be one that somebody else holds.
        copied = jax.tree.map(jnp.copy, trained)
        state = initial_state(copied, self.optimizer, ema=self.config.optimizer.ema is not None)
        return jax.tree.map(jnp.copy, state)

    def stored(self, frozen: Tree) -> Tree:
        """Frozen weights, or their shapes, in the type they are kept in."""

        def one(path: str, leaf: Any) -> Any:
            dtype = jnp.dtype("float32" if path.startswith("vae/") else self.config.frozen_dtype)
            return jax.ShapeDtypeStruct(leaf.shape, dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.astype(dtype)

        return map_paths(one, frozen)

    def compiled(self, state: Any, frozen: Any, batch: Mapping[str, Any]) -> CompiledStep:
        """The step for batches of this shape, compiled when it is first asked for. Arrays or their shapes will do."""
        key = tuple(sorted((name, tuple(array.shape), str(array.dtype)) for name, array in batch.items()))
        if key not in self._compiled:
            began = time.perf_counter()
            traced = self.step.trace(state, frozen, dict(batch), np.float32(np.inf))
            call = traced.lower().compile()
            self._compiled[key] = CompiledStep(call, count_flops(traced.jaxpr), time.perf_counter() - began)
        return self._compiled[key]

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a global batch as the loader will make it, of the first aspect bucket."""
        config, loader = self.config, self.config.loader
        model, b, (height, width) = config.model, loader.global_batch, loader.sizes[0]
        f, u, i = jnp.float32, jnp.uint8, jnp.int32
        tokens = model.text_encoder.max_position_embeddings
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "face_box": ((4,), f),
            "embedding": ((model.resampler.embedding_dim,), f),
            "sizes": ((6,), f),
            "input_ids": ((tokens,), i),
            "input_ids_2": ((tokens,), i),
        }
        if loader.cached_latents:
            latent = (height // model.vae.downscale, width // model.vae.downscale, model.vae.latent_channels)
            shapes |= {"latent_mean": (latent, f), "latent_logvar": (latent, f)}
        else:
            shapes["image"] = ((height, width, 3), u)
        if loader.keypoint_style != "none":
            shapes["keypoint_image"] = ((height, width, 3), u)
        if loader.cached_text:
            shapes |= {"text_states": ((tokens, model.unet.cross_attention_dim), f), "text_pooled": ((model.unet.pooled_dim,), f)}
        place = batch_sharding(self.mesh)
        return {name: jax.ShapeDtypeStruct((b, *shape), dtype, sharding=place) for name, (shape, dtype) in shapes.items()}


def _placed(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings(tree, mesh))
