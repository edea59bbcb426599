"""Pictures of many calls at once: one on every device of this process, each what its call alone would give, to the bit.

The pipeline's own programs run unchanged on each device (`jax.shard_map`), with weights that every device has whole. Calls of
equal shapes share a compiled program; everything that may differ between two calls without compiling may differ between the
devices.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instantid_jax import denoise as programs
from instantid_jax.denoise import Denoiser, Inputs
from instantid_jax.diffusion import Sampler
from instantid_jax.models import Network
from instantid_jax.models.tiling import Tiling
from instantid_jax.pipeline import InstantIDPipeline
from instantid_jax.prediction import Shortcuts
from instantid_jax.request import Request

__all__ = ["Spread"]

_WHOLE, _ROWS = PartitionSpec(), PartitionSpec("device")


class Spread:
    """A pipeline on all the devices of this process, or those given."""

    def __init__(self, pipe: InstantIDPipeline, devices: Sequence[Any] | None = None) -> None:
        self.mesh = Mesh(np.asarray(devices or jax.local_devices()), ("device",))
        self.width = self.mesh.size
        """Calls that are drawn together."""
        self.vae = pipe.networks["vae"]
        self.denoiser, weights = pipe.denoiser()
        place = NamedSharding(self.mesh, _WHOLE)
        self._weights, self._vae_weights = jax.device_put((weights, pipe.parameters["vae"]), place)

    @staticmethod
    def kind(request: Request, inputs: Inputs) -> Hashable:
        """Calls of the same kind share a program."""
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(inputs))
        return request.solver, request.guided, request.shortcuts, request.tiling, jax.tree.structure(inputs), shapes

    def draw(self, request: Request, calls: Sequence[Inputs]) -> np.ndarray:
        """Pictures [calls, b, H, W, 3] in [0, 1] of at most `width` calls of one kind; `request` is that of any. A short batch is filled up."""
        filled = [*calls, *[calls[0]] * (self.width - len(calls))]
        stacked = jax.tree.map(lambda *x: np.stack([np.asarray(one) for one in x]), *filled)
        placed = jax.device_put(stacked, NamedSharding(self.mesh, _ROWS))
        latents = _denoise(self.denoiser, request.solver, request.guided, request.shortcuts, self.mesh, self._weights, placed)
        return np.asarray(_decode(self.vae, self.mesh, self._vae_weights, latents, request.tiling))[: len(calls)]


def _on_each(function: Any, mesh: Mesh) -> Any:
    """`function(weights, its own row)` on every device."""

    def one(weights: Any, rows: Any) -> Any:
        return jax.tree.map(lambda x: x[None], function(weights, jax.tree.map(lambda x: x[0], rows)))

    return jax.shard_map(one, mesh=mesh, in_specs=(_WHOLE, _ROWS), out_specs=_ROWS, check_vma=False)


@functools.partial(jax.jit, static_argnames=("denoiser", "sampler", "guided", "shortcuts", "mesh"))
def _denoise(denoiser: Denoiser, sampler: Sampler, guided: bool, shortcuts: Shortcuts, mesh: Mesh, weights: Any, inputs: Inputs) -> jax.Array:
    return _on_each(lambda own, x: programs.denoise(denoiser, sampler, guided, own, *x, shortcuts=shortcuts), mesh)(weights, inputs)


@functools.partial(jax.jit, static_argnames=("network", "mesh", "tiling"))
def _decode(network: Network, mesh: Mesh, weights: Any, latents: jax.Array, tiling: Tiling | None) -> jax.Array:
    return _on_each(lambda own, x: programs.decode(network, own, x, tiling), mesh)(weights, latents)
