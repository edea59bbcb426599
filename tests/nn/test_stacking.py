"""Layers apart give what a loop over their stack gives, in the same memory."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from instantid_jax.nn.linear import Linear
from instantid_jax.nn.stacking import Layers, layers_apart, map_layers, scan_layers, stack_of


def test_layers_apart_are_views_of_the_stack() -> None:
    tree = {
        "transformer_blocks": {"kernel": jnp.arange(3 * 64 * 64, dtype=jnp.float32).reshape(3, 64, 64), "bias": jnp.zeros((3, 64))},
        "proj_in": {"kernel": jnp.ones((128, 128))},
    }
    found = layers_apart(tree, least=64 * 64 * 4)
    rows = found["transformer_blocks"]["kernel"].rows
    assert [np.array_equal(row, tree["transformer_blocks"]["kernel"][i]) for i, row in enumerate(rows)] == [True] * 3
    start = tree["transformer_blocks"]["kernel"].unsafe_buffer_pointer()
    assert [row.unsafe_buffer_pointer() - start for row in rows] == [i * 64 * 64 * 4 for i in range(3)]
    assert found["transformer_blocks"]["bias"] is tree["transformer_blocks"]["bias"] and found["proj_in"]["kernel"] is tree["proj_in"]["kernel"]
    assert layers_apart(tree)["transformer_blocks"]["kernel"] is tree["transformer_blocks"]["kernel"]


def test_apart_or_not_a_stack_computes_the_same() -> None:
    stacked = stack_of(lambda r: Linear(8, 8, dtype=jnp.float32, rngs=r), 3, nnx.Rngs(0))
    graph, state = nnx.split(stacked)
    weights = nnx.to_pure_dict(state)
    apart = weights | {"kernel": Layers([weights["kernel"][i] for i in range(3)])}

    @jax.jit
    def run(weights, x, extra):
        layers = nnx.merge(graph, nnx.State(weights))
        out, seen = scan_layers(layers, lambda layer, y, e: (jnp.tanh(layer(y)) + e, (y[0], None)), x, extra)
        return out, seen, map_layers(layers, lambda layer: layer(x))

    x, extra = jax.random.normal(jax.random.key(0), (2, 8)), jnp.arange(3.0)
    for a, b in zip(jax.tree.leaves(run(apart, x, extra)), jax.tree.leaves(run(weights, x, extra)), strict=True):
        assert a.shape == b.shape and np.allclose(a, b, rtol=1e-6, atol=1e-6)
    assert "scan" not in str(jax.make_jaxpr(run)(apart, x, extra)) and "scan" in str(jax.make_jaxpr(run)(weights, x, extra))
