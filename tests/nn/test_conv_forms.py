"""A 3x3 convolution as matrix products, which is what TPUs run for deep layers, and CPUs for small pictures."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from instantid_jax.nn import conv
from instantid_jax.nn.conv import Conv, Upsample, conv3x3_as_matmul, conv3x3_as_one_matmul, conv3x3_of_doubled, resize_nearest


def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def plain_of_doubled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return plain(resize_nearest(x, (2 * x.shape[1], 2 * x.shape[2])), kernel)


FORMS = [(conv3x3_as_matmul, plain), (conv3x3_as_one_matmul, plain), (conv3x3_of_doubled, plain_of_doubled)]


@pytest.mark.parametrize(("form", "plain"), FORMS)
@pytest.mark.parametrize("shape", [(2, 8, 6, 5), (1, 1, 1, 3), (1, 7, 3, 16)])
def test_equal_to_a_convolution_forward_and_backward(shape: tuple[int, ...], form: Callable[..., jax.Array], plain: Callable[..., jax.Array]) -> None:
    x = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, shape[-1], 4)) / (9 * shape[-1]) ** 0.5
    np.testing.assert_allclose(form(x, kernel), plain(x, kernel), atol=2e-6)

    def loss(form, x, kernel):
        return jnp.sum(jnp.sin(form(x, kernel)))

    ours, theirs = (jax.grad(loss, argnums=(1, 2))(which, x, kernel) for which in (form, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b).max() < 1e-6 * np.abs(b).max()  # float32's rounding of sums of a hundred products


@pytest.mark.parametrize(
    ("height", "channels", "stride", "platforms"),
    [
        (16, 1280, 1, "tpu cpu"),
        (32, 1280, 1, "tpu"),
        (64, 640, 1, "tpu"),
        (128, 320, 1, "tpu"),
        (256, 256, 1, ""),
        (16, 1280, 2, ""),
        (16, 64, 1, ""),
    ],
)
def test_the_form_goes_by_platform_and_shape(monkeypatch: pytest.MonkeyPatch, height: int, channels: int, stride: int, platforms: str) -> None:
    layer = nnx.eval_shape(lambda: Conv(channels, 8, stride=stride, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graph, weights = nnx.split(layer)
    x = jax.ShapeDtypeStruct((1, height, height, channels), jnp.float32)

    def made() -> str:
        return str(jax.make_jaxpr(lambda w, x: nnx.merge(graph, w)(x))(weights, x))

    for platform in ("tpu", "cpu", "gpu"):
        monkeypatch.setattr(conv, "target_platform", lambda platform=platform: platform)
        assert ("conv_general_dilated" not in made()) is (platform in platforms)


@pytest.mark.parametrize(("dtype", "convolutions"), [("float32", {(2, 2)}), ("bfloat16", {(3, 3)})])
def test_a_cpu_doubles_by_phases_in_float32(dtype: str, convolutions: set[tuple[int, int]]) -> None:
    """Of other types the sums of taps would be rounded before they are used."""
    layer = Upsample(4, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    x = jnp.ones((1, 6, 5, 4), dtype)
    found = {e.invars[1].aval.shape[:2] for e in jax.make_jaxpr(lambda x: layer(x))(x).eqns if e.primitive.name == "conv_general_dilated"}
    assert found == convolutions
    assert layer(x).shape == (1, 12, 10, 4) and layer(x, (11, 9)).shape == (1, 11, 9, 4)
