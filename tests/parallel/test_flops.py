"""Operations counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.nn.splash import splash_attention
from instantid_jax.parallel.flops import count_flops, executed_flops, kernel_flops, minimum_flops


def counted(function, *shapes):
    return count_flops(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)))


def test_products():
    assert counted(lambda a, b: a @ b, (3, 4), (4, 5)) == 2 * 3 * 4 * 5
    assert counted(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (7, 3, 4), (7, 4, 5)) == 7 * 2 * 3 * 4 * 5


def test_a_loop_counts_as_often_as_it_runs_also_within_a_jitted_function():
    def loop(x, w):
        return jax.lax.scan(lambda c, _: (jax.jit(jnp.matmul)(c, w), None), x, None, length=6)[0]

    assert counted(loop, (3, 4), (4, 4)) == 6 * 2 * 3 * 4 * 4


def test_of_branches_the_dearest_counts():
    assert counted(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x), (4, 4)) == 2 * 4**3


def convolution(x, k, strides=(1, 1), groups=1):
    return jax.lax.conv_general_dilated(x, k, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)


@pytest.mark.parametrize(("strides", "taps"), [((1, 1), 8 * 3 - 2), ((2, 2), 4 * 3 - 1)])
def test_convolutions(strides, taps):
    one = 2 * 2 * taps**2 * 5 * 7  # batch 2, 5 to 7 channels; along an axis every output's three taps but those on padding
    assert counted(lambda x, k: convolution(x, k, strides), (2, 8, 8, 5), (3, 3, 5, 7)) == one
    both = jax.grad(lambda x, k: convolution(x, k, strides).sum(), argnums=(0, 1))
    assert counted(both, (2, 8, 8, 5), (3, 3, 5, 7)) == pytest.approx(3 * one, rel=1e-6)


def test_grouped_convolutions():
    assert counted(lambda x, k: convolution(x, k, groups=2), (1, 8, 8, 4), (3, 3, 2, 6)) == 2 * 22**2 * 2 * 6


def test_recomputation_counts_again():
    def layers(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    plain = counted(jax.grad(layers, argnums=1), (3, 4), (4, 4))
    assert plain == 5 * 2 * 3 * 4 * 4
    assert counted(jax.grad(jax.checkpoint(layers), argnums=1), (3, 4), (4, 4)) >= plain + 2 * 3 * 4 * 4


def test_of_branches_the_one_that_is_taken_counts():
    def loop(x, w, dear):
        def body(c, now):
            return jax.lax.cond(now > 1, lambda: c @ w @ w, lambda: jax.lax.cond(now > 0, jax.jit(lambda: c @ w), lambda: c)), None

        return jax.lax.scan(body, x @ w, dear + 0)[0]

    x, w, dear = jnp.zeros((3, 4)), jnp.zeros((4, 4)), jnp.array([0, 2, 1, 0])
    unknown = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, w, dear)]
    jaxpr = jax.make_jaxpr(loop)(x, w, dear)
    assert executed_flops(jaxpr, [*unknown[:2], dear]) == 4 * 2 * 3 * 4 * 4
    assert count_flops(jaxpr) == 9 * 2 * 3 * 4 * 4
    with pytest.raises(ValueError, match="not known"):
        executed_flops(jaxpr, unknown)


def test_what_is_executed_within_recomputation_devices_and_loops_of_a_known_end():
    x, unknown = jnp.zeros((4, 4)), jax.ShapeDtypeStruct((4, 4), jnp.float32)
    once = 2 * 4**3
    assert executed_flops(jax.make_jaxpr(jax.checkpoint(lambda x: x @ x))(x), [unknown]) == once
    mesh, whole = jax.sharding.AbstractMesh((2,), ("data",)), jax.sharding.PartitionSpec()

    def spread(x):
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.shard_map(lambda x: x @ x, in_specs=whole, out_specs=whole, check_vma=False)(x)

    assert executed_flops(jax.make_jaxpr(spread)(x), [unknown]) == 2 * once

    def loop(x, turns):
        return jax.lax.fori_loop(0, turns, lambda i, c: c @ x, x)

    jaxpr = jax.make_jaxpr(loop)(x, 3)
    assert executed_flops(jaxpr, [unknown, np.int32(3)]) == 3 * once
    with pytest.raises(ValueError, match="the length of a loop depends on values that are not known"):
        executed_flops(jaxpr, [unknown, jax.ShapeDtypeStruct((), jnp.int32)])
    assert minimum_flops(jaxpr, [False, False]) == once and minimum_flops(jaxpr, [True, False]) == 3 * once


def test_kernels_count_in_loops_and_in_the_dearest_branch():
    """The products q k and p v of a kernel; the softmax is none."""
    q = jnp.zeros((2, 128, 3, 64))
    once = 2 * 2 * 2 * 3 * 128 * 128 * 64

    def loop(x):
        return jax.lax.scan(
            lambda c, _: (jax.lax.cond(c[0, 0, 0, 0] > 0, lambda c: splash_attention(c, c, c), lambda c: c, c), None), x, None, length=5
        )[0]

    assert kernel_flops(jax.make_jaxpr(lambda x: splash_attention(x, x, x))(q)) == once
    assert kernel_flops(jax.make_jaxpr(loop)(q)) == 5 * once


def test_the_least_of_what_trains_nothing_is_what_it_costs_also_on_several_devices():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    rows = jax.sharding.PartitionSpec("data")

    def spread(x, w):
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.shard_map(lambda x: jax.lax.map(lambda row: row @ w, x), in_specs=rows, out_specs=rows, check_vma=False)(x)

    jaxpr = jax.make_jaxpr(spread)(jnp.zeros((8, 3, 4)), jnp.zeros((4, 5)))
    once = 8 * 2 * 3 * 4 * 5
    assert count_flops(jaxpr) == minimum_flops(jaxpr, [False, False]) == once
    assert minimum_flops(jaxpr, [False, True]) == 2 * once


def test_a_kernel_s_gradient_has_no_least():
    q = jnp.zeros((1, 128, 1, 64))
    jaxpr = jax.make_jaxpr(lambda x: splash_attention(x, x, x))(q)
    assert minimum_flops(jaxpr, [False]) == count_flops(jaxpr)
    with pytest.raises(ValueError, match="count its plain form"):
        minimum_flops(jaxpr, [True])
