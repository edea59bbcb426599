"""Networks traced as they are defined, whatever machine this is."""

import jax
import jax.numpy as jnp
from flax import nnx

from instantid_jax.nn.conv import Conv
from instantid_jax.nn.platform import as_defined, target_platform
from instantid_jax.parallel.flops import count_flops


def test_a_convolution_behind_a_doubling_counts_all_its_products_though_a_cpu_needs_fewer() -> None:
    layer = Conv(4, 8, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    doubled = jax.jit(lambda x: layer(x, doubled=True))
    x = jax.ShapeDtypeStruct((1, 20, 20, 4), jnp.float32)
    inner = 2 * 4 * 8
    assert target_platform() == "cpu"
    assert count_flops(doubled.trace(x).jaxpr) == inner * 9 * 20**2  # tiles of two by two pixels in nine products (`nn.winograd`)
    with as_defined():
        assert target_platform() == "any"
        assert count_flops(doubled.trace(x).jaxpr) == inner * (3 * 40 - 2) ** 2
    assert target_platform() == "cpu"
