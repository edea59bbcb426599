"""Equal layers as one layer with a leading depth axis, so that they are traced and compiled once.

A stack of L transformer blocks is one block whose every parameter has shape [l, ...]. `scan_layers` runs it as a loop
(`jax.lax.scan`), `map_layers` evaluates a function of every layer side by side (`jax.vmap`).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

Layer = TypeVar("Layer", bound=nnx.Module)


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
    remat: bool = False,
) -> tuple[Any, Any]:
    """Runs ``carry, y = apply(layer, carry, x)`` through the layers in order; returns the last carry and the stacked ys."""
    graphdef, state = nnx.split(stacked)

    def body(carry: Any, item: Any) -> Any:
        parameters, x = item
        return apply(nnx.merge(graphdef, parameters), carry, x)

    return jax.lax.scan(jax.checkpoint(body) if remat else body, carry, (state, xs), unroll=unroll)


def map_layers(stacked: nnx.Module, apply: Callable[[Any], Any]) -> Any:
    """``apply(layer)`` for every layer, results stacked along a new first axis."""
    graphdef, state = nnx.split(stacked)
    return jax.vmap(lambda parameters: apply(nnx.merge(graphdef, parameters)))(state)
