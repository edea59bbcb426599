"""Equal layers as one layer with a leading depth axis, so that they are traced and compiled once.

A stack of L transformer blocks is one block whose every parameter has shape [l, ...]. `scan_layers` runs it as a loop
(`jax.lax.scan`), `map_layers` evaluates a function of every layer side by side (`jax.vmap`).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from instantid_jax.nn.placement import gathers, keep_all_but_gathered

_INPUT = "layer input"
Layer = TypeVar("Layer", bound=nnx.Module)
Function = TypeVar("Function", bound=Callable[..., Any])


def stack_of(make: Callable[[nnx.Rngs], Layer], depth: int, rngs: nnx.Rngs) -> Layer:
    """`depth` independently initialised layers as one module with stacked parameters."""

    def one(key: jax.Array) -> Layer:
        return make(nnx.Rngs(key))

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

    return jax.lax.scan(recomputed(body, remat), carry, (state, xs), unroll=unroll)


def recomputed(function: Function, remat: str | bool) -> Function:
    """`function`, with its intermediate values computed again in the backward pass instead of kept, by policy.

    "none" (or False) keeps all but gathered weights (`nn.placement`), "dots" keeps the results of matrix products with weights,
    "blocks" and "full" (or True) keep nothing but the inputs, and "offload" keeps these in the host's memory, of the layers that
    `scan_layers` runs.
    """
    if remat in ("none", False):
        return jax.checkpoint(function, policy=keep_all_but_gathered) if gathers() else function  # type: ignore[return-value]
    policy = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[_INPUT], offload_src="device", offload_dst="pinned_host"
        ),
    }.get(str(remat))
    return jax.checkpoint(function, policy=policy)  # type: ignore[return-value]


def map_layers(stacked: nnx.Module, apply: Callable[[Any], Any]) -> Any:
    """``apply(layer)`` for every layer, results stacked along a new first axis."""
    graphdef, state = nnx.split(stacked)
    return jax.vmap(lambda parameters: apply(nnx.merge(graphdef, parameters)))(state)
