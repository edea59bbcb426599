"""The border between modules and trees: a `Network` is a module definition without weights.

Everything outside `nn` and `models` sees parameters as nested dicts of arrays. `bind` puts a tree into a module inside a
traced function; `init` makes a tree of random weights; `abstract` says every shape without allocating anything.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from instantid_jax.config import ComputeConfig, ModelConfig
from instantid_jax.mapped import THREADS, copy_into, read_ahead
from instantid_jax.models.adapter import Adapter
from instantid_jax.models.clip_text import CLIPTextModel
from instantid_jax.models.identitynet import IdentityNet
from instantid_jax.models.resampler import make_projector
from instantid_jax.models.unet import UNet
from instantid_jax.models.vae import Autoencoder
from instantid_jax.nn.linear import name_tensor_axes, quantize, store_int8
from instantid_jax.paths import Tree, flatten, stack_layers, unflatten, unstack_layers

TRAINABLE = ("identitynet", "adapter", "resampler")
FROZEN = ("unet", "vae", "text_encoder", "text_encoder_2")


class WeightsMismatch(ValueError):
    """Weights that do not fit the network they were given to; the message lists the paths."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A module definition; hashable, so it can be a static argument of `jax.jit`."""

    make: Callable[..., nnx.Module]
    config: Any
    compute: ComputeConfig
    int8: bool = False
    """Whether kernels are held as 8-bit integers with a scale for every output channel, for inference (`nn.linear`)."""

    def _module(self, rngs: Any) -> nnx.Module:
        module = self.make(self.config, compute=self.compute, rngs=rngs)
        name_tensor_axes(module)
        if self.int8:
            store_int8(module)
        return module

    @property
    def plain(self) -> Network:
        """The network without 8-bit kernels: the one whose weights are on disk."""
        return dataclasses.replace(self, int8=False)

    @functools.cached_property
    def _split(self) -> tuple[nnx.GraphDef[Any], Tree]:
        return _trace(self)

    @property
    def abstract(self) -> Tree:
        """The parameter tree as `jax.ShapeDtypeStruct`s, equal layers stacked."""
        return self._split[1]

    def init(self, key: jax.Array) -> Tree:
        """Random weights in float32."""
        if self.int8:
            return quantize(self.plain.init(key))
        return _string_keys(nnx.to_pure_dict(nnx.state(self._module(nnx.Rngs(key)))))

    def bind(self, parameters: Mapping[str, Any]) -> Any:
        """The module with these weights, for use inside a traced function."""
        return nnx.merge(self._split[0], nnx.State(_list_keys(parameters)))

    def disk_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor under its own name, one for each published tensor: {path: shape}."""
        rows = unstack_layers(flatten(self.plain.abstract), lambda leaf, _: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype))
        return {path: tuple(leaf.shape) for path, leaf in rows.items()}

    def from_disk(self, flat: Mapping[str, Any], name: str = "network") -> Tree:
        """Stacks equal layers and checks every path and shape. Raises `WeightsMismatch` listing what is wrong.

        With `int8` the kernels are rounded, one after the other, and everything else gets the network's own type.
        """
        expected = self.disk_shapes()
        missing = sorted(expected.keys() - flat.keys())
        unused = sorted(flat.keys() - expected.keys())
        common = sorted(expected.keys() & flat.keys())
        shapes = [f"{p}: {tuple(flat[p].shape)} where {expected[p]} is needed" for p in common if tuple(flat[p].shape) != expected[p]]
        if missing or unused or shapes:
            listed = {"missing": missing, "unknown": unused, "misshaped": shapes}
            parts = [f"{title} ({len(items)}): {', '.join(items[:5])}" for title, items in listed.items() if items]
            raise WeightsMismatch(f"weights do not fit {name}: " + "; ".join(parts))
        stacked = stack_layers(flat, _stack)
        read_ahead([x for x in stacked.values() if isinstance(x, np.ndarray)])
        tree = unflatten(stacked)
        return quantize(tree, self.compute.dtype) if self.int8 else tree

    def to_disk(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `from_disk`: every tensor under its own name. Weights of 8 bits stay where they are."""
        if self.int8:
            raise WeightsMismatch("8-bit weights are rounded and not for writing: load the model without weights_dtype to export it")
        return unstack_layers(flatten(parameters))


_ALIGNED = 64
"""Bytes to which XLA wants arrays on the host aligned."""


def _stack(layers: Sequence[Any]) -> Any:
    """Equal layers one behind the other. Host arrays stay on the host, since a device would compile a program for every shape, at an address
    that a CPU device takes as it is; they are read or copied several at a time."""
    if not all(isinstance(x, np.ndarray) for x in layers):
        return jnp.stack(layers)
    shape, size = (len(layers), *layers[0].shape), sum(x.nbytes for x in layers)
    room = np.empty(size + _ALIGNED, np.uint8)
    start = -room.ctypes.data % _ALIGNED
    out = room[start : start + size].view(layers[0].dtype).reshape(shape)
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(copy_into, (out[i, ...] for i in range(len(layers))), layers):
            pass
    return out


class _OneKey(nnx.Rngs):
    """The same key for all, where shapes alone are asked for: counting keys takes half of the tracing."""

    def __init__(self, key: jax.Array) -> None:
        self.key = nnx.data(key)

    def params(self) -> jax.Array:
        return self.key


@functools.lru_cache(maxsize=64)
def _trace(network: Network) -> tuple[nnx.GraphDef[Any], Tree]:
    """Definition and shapes of a network; tracing takes a second, so equal networks share it. The tree is not to be changed."""
    module = nnx.eval_shape(lambda: network._module(_OneKey(jax.random.key(0))))
    graphdef, state = nnx.split(module)
    return graphdef, _string_keys(nnx.to_pure_dict(state))


def _string_keys(tree: Mapping[Any, Any]) -> Tree:
    return {str(k): _string_keys(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _list_keys(tree: Mapping[str, Any]) -> dict[Any, Any]:
    """The inverse: numbers are places in lists, which Flax goes through in their order, and "10" comes before "2" in a text's."""
    return {int(k) if k.isdecimal() else k: _list_keys(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def build_networks(
    config: ModelConfig, compute: ComputeConfig | None = None, vae_compute: ComputeConfig | None = None, *, int8: bool = False
) -> dict[str, Network]:
    """All seven networks of a model by name: the frozen base and the three that InstantID trains.

    With `int8` the two that run in every step of sampling hold their kernels in 8 bits.
    """
    compute = compute or ComputeConfig()
    return {
        "unet": Network(UNet, config.unet, compute, int8),
        "identitynet": Network(IdentityNet, config.identitynet, compute, int8),
        "adapter": Network(Adapter, config.unet, compute),
        "resampler": Network(make_projector, config.resampler, compute),
        "vae": Network(Autoencoder, config.vae, vae_compute or compute),
        "text_encoder": Network(CLIPTextModel, config.text_encoder, compute),
        "text_encoder_2": Network(CLIPTextModel, config.text_encoder_2, compute),
    }
