"""Equal layers as one layer with a leading depth axis, so that they are traced and compiled once.

A stack of L transformer blocks is one block whose every parameter has shape [l, ...]. `scan_layers` runs it as a loop
(`jax.lax.scan`), `map_layers` evaluates a function of every layer side by side (`jax.vmap`; on a CPU one after the other).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from instantid_jax.nn.placement import gathers, keep_all_but_gathered
from instantid_jax.nn.platform import target_platform
from instantid_jax.paths import map_paths, stacked_layer

_INPUT = "layer input"
Layer = TypeVar("Layer", bound=nnx.Module)
Function = TypeVar("Function", bound=Callable[..., Any])


def stack_of(make: Callable[[nnx.Rngs], Layer], depth: int, rngs: nnx.Rngs) -> Layer:
    """`depth` independently initialised layers as one module with stacked parameters."""

    def one(key: jax.Array) -> Layer:
        return make(type(rngs)(key))

    return nnx.vmap(one, in_axes=0, out_axes=0)(jax.random.split(rngs.params(), depth))


def scan_layers(
    stacked: nnx.Module,
    apply: Callable[[Any, Any, Any], Any],
    carry: Any,
    xs: Any = None,
    *,
    unroll: bool = False,
    remat: str | bool = "none",
) -> tuple[Any, Any]:
    """Runs ``carry, y = apply(layer, carry, x)`` through the layers in order; returns the last carry and the stacked ys.

    `remat` is `ComputeConfig.remat`: what of a layer is computed again in the backward pass.
    """
    graphdef, state = nnx.split(stacked)

    def body(carry: Any, item: Any) -> Any:
        parameters, x = item
        if remat == "offload":
            carry = jax.tree.map(lambda value: checkpoint_name(value, _INPUT), carry)
        return apply(nnx.merge(graphdef, parameters), carry, x)

    body = recomputed(body, remat)
    if (depth := _apart(state)) is None:
        return jax.lax.scan(body, carry, (state, xs), unroll=unroll)
    outputs = []
    for i in range(depth):
        carry, output = body(carry, _layer((state, xs), i))
        outputs.append(output)
    return carry, jax.tree.map(lambda *rows: jnp.stack(rows), *outputs)


def recomputed(function: Function, remat: str | bool) -> Function:
    """`function`, with its intermediate values computed again in the backward pass instead of kept, by policy.

    "none" (or False) keeps all but gathered weights (`nn.placement`), "dots" keeps the results of matrix products with weights,
    "blocks" and "full" (or True) keep nothing but the inputs, and "offload" keeps these in the host's memory, of the layers that
    `scan_layers` runs.
    """
    if remat in ("none", False):
        return jax.checkpoint(function, policy=keep_all_but_gathered) if gathers() else function  # type: ignore[return-value]
    policy = {
        "blocks": None,
        "full": None,
        "True": None,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[_INPUT], offload_src="device", offload_dst="pinned_host"
        ),
    }[str(remat)]
    return jax.checkpoint(function, policy=policy)  # type: ignore[return-value]


def map_layers(stacked: nnx.Module, apply: Callable[[Any], Any]) -> Any:
    """``apply(layer)`` for every layer, results stacked along a new first axis."""
    graphdef, state = nnx.split(stacked)
    if (depth := _apart(state)) is None:

        def one(parameters: Any) -> Any:
            return apply(nnx.merge(graphdef, parameters))

        if target_platform() == "cpu":  # which would transpose all kernels to make one product of them, and their gradients back
            return jax.lax.map(one, state)
        return jax.vmap(one)(state)
    outputs = [apply(nnx.merge(graphdef, _layer(state, i))) for i in range(depth)]
    return jax.tree.map(lambda *rows: jnp.stack(rows), *outputs)


@jax.tree_util.register_pytree_node_class
class Layers:
    """The layers of one stacked parameter as arrays of their own.

    XLA for CPU copies a layer out of its stack before it multiplies with it, in every turn of the loop: 130 MB for a transformer block of
    1280 channels in float32, a fifth of the block's time. Loops over parameters of which one is apart are unrolled.
    """

    def __init__(self, rows: Sequence[Any]):
        self.rows = tuple(rows)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return self.rows, None

    @classmethod
    def tree_unflatten(cls, _: None, rows: Sequence[Any]) -> Layers:
        return cls(rows)


def layers_apart(tree: Mapping[str, Any], least: int = 4 << 20) -> dict[str, Any]:
    """A parameter tree whose stacked arrays on a CPU, of `least` bytes a layer, are `Layers` that share their memory; the rest is as it was."""

    def one(path: str, leaf: Any) -> Any:
        if not stacked_layer(path) or not isinstance(leaf, jax.Array) or leaf.nbytes < least * leaf.shape[0] or not _on_one_cpu(leaf):
            return leaf
        whole = np.asarray(leaf)
        return Layers([jax.device_put(whole[i], leaf.sharding) for i in range(len(whole))])

    return map_paths(one, tree)


def _on_one_cpu(array: jax.Array) -> bool:
    return [device.platform for device in array.devices()] == ["cpu"]


def _apart(state: Any) -> int | None:
    """How many layers there are, where a parameter is `Layers`; else None."""
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_layers) if _is_layers(x)]
    return len(found[0].rows) if found else None


def _layer(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x.rows[i] if _is_layers(x) else x[i], tree, is_leaf=_is_layers)


def _is_layers(x: Any) -> bool:
    return isinstance(x, Layers)
