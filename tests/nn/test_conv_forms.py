"""A 3x3 convolution as matrix products, which is what TPUs run for deep layers, and CPUs for nearly all."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from instantid_jax.nn import conv, winograd
from instantid_jax.nn.conv import Conv, Upsample, conv3x3_as_matmul, conv3x3_as_one_matmul, resize_nearest
from instantid_jax.nn.winograd import conv3x3_of_doubled, conv3x3_winograd


def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def plain_of_doubled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return plain(resize_nearest(x, (2 * x.shape[1], 2 * x.shape[2])), kernel)


ANY = [(2, 8, 6, 5), (1, 1, 1, 3), (1, 7, 3, 16)]
EVEN = [(2, 8, 6, 5), (1, 2, 2, 3), (1, 10, 4, 16)]
FORMS = [
    *((form, plain, shape) for form in (conv3x3_as_matmul, conv3x3_as_one_matmul) for shape in ANY),
    *((conv3x3_of_doubled, plain_of_doubled, shape) for shape in ANY),
    *((conv3x3_winograd, plain, shape) for shape in EVEN),
]


@pytest.mark.parametrize(("form", "plain", "shape"), FORMS)
def test_equal_to_a_convolution_forward_and_backward(form: Callable[..., jax.Array], plain: Callable[..., jax.Array], shape: tuple[int, ...]) -> None:
    x = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, shape[-1], 4)) / (9 * shape[-1]) ** 0.5
    np.testing.assert_allclose(form(x, kernel), plain(x, kernel), atol=2e-6)

    def loss(form, x, kernel):
        return jnp.sum(jnp.sin(form(x, kernel)))

    ours, theirs = (jax.grad(loss, argnums=(1, 2))(which, x, kernel) for which in (form, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b).max() < 1e-6 * np.abs(b).max()  # float32's rounding of sums of a hundred products


@pytest.mark.parametrize(("form", "plain"), [(conv3x3_winograd, plain), (conv3x3_of_doubled, plain_of_doubled)])
def test_large_pictures_go_by_strips_of_rows(
    monkeypatch: pytest.MonkeyPatch, form: Callable[..., jax.Array], plain: Callable[..., jax.Array]
) -> None:
    monkeypatch.setattr(winograd, "_LARGE", 4 * 2 * 24 * 6 * 5)
    x = jax.random.normal(jax.random.key(0), (2, 24, 6, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 5, 4)) / 45**0.5
    assert "scan" in str(jax.make_jaxpr(form)(x, kernel))
    np.testing.assert_allclose(form(x, kernel), plain(x, kernel), atol=2e-6)
    ours, theirs = (jax.grad(lambda x, k, f=f: jnp.sum(jnp.sin(f(x, k))), argnums=(0, 1))(x, kernel) for f in (form, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b).max() < 1e-6 * np.abs(b).max()


def test_winograd_rounds_less_than_a_plain_sum_at_sdxls_widths() -> None:
    """Against float64, results of about one. How much a product rounds depends on the order in which a processor sums: the definition
    was 3.9e-7 and 7.5e-7 apart on two, Winograd's form 6.4e-7 and 1.05e-6 (rms). The definition's products summed in float32 one after
    another round alike on all."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((1, 16, 16, 1280)), rng.standard_normal((3, 3, 1280, 64)) / (9 * 1280) ** 0.5
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [(padded[:, i : i + 16, j : j + 16].reshape(256, 1280), kernel[i, j]) for i in range(3) for j in range(3)]
    exact = sum(pixels @ weights for pixels, weights in taps)
    one_by_one = np.zeros((256, 64), np.float32)
    for pixels, weights in taps:
        for column, row in zip(pixels.astype(np.float32).T, weights.astype(np.float32), strict=True):
            one_by_one += column[:, None] * row

    def error(result: jax.Array | np.ndarray) -> float:
        return float(np.sqrt(np.mean((np.asarray(result).reshape(256, 64) - exact) ** 2)))

    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    ours = error(conv3x3_winograd(x, kernel))
    assert ours < error(one_by_one) < 2e-6
    assert ours < 2 * error(plain(x, kernel)) < 2e-6


@pytest.mark.parametrize(
    ("height", "channels", "stride", "platforms"),
    [
        (8, 1280, 1, "tpu cpu"),
        (15, 1280, 1, "tpu cpu"),
        (16, 1280, 1, "tpu cpu"),
        (30, 1280, 1, "tpu"),
        (32, 1280, 1, "tpu cpu"),
        (33, 1280, 1, "tpu"),
        (128, 320, 1, "tpu cpu"),
        (256, 256, 1, "cpu"),
        (512, 128, 1, "cpu"),
        (32, 128, 1, ""),
        (16, 1280, 2, ""),
    ],
)
def test_the_form_goes_by_platform_and_shape(monkeypatch: pytest.MonkeyPatch, height: int, channels: int, stride: int, platforms: str) -> None:
    layer = nnx.eval_shape(lambda: Conv(channels, 128, stride=stride, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graph, weights = nnx.split(layer)
    x = jax.ShapeDtypeStruct((1, height, height, channels), jnp.float32)

    def made() -> str:
        return str(jax.make_jaxpr(lambda w, x: nnx.merge(graph, w)(x))(weights, x))

    for platform in ("tpu", "cpu", "gpu"):
        monkeypatch.setattr(conv, "target_platform", lambda platform=platform: platform)
        assert ("conv_general_dilated" not in made()) is (platform in platforms)


@pytest.mark.parametrize(("dtype", "convolutions"), [("float32", 0), ("bfloat16", 1)])
def test_a_cpu_doubles_by_tiles_in_float32(dtype: str, convolutions: int) -> None:
    """Of other types the sums of taps would be rounded before they are used."""
    layer = Upsample(4, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    x = jnp.ones((1, 6, 5, 4), dtype)
    assert str(jax.make_jaxpr(lambda x: layer(x))(x)).count("conv_general_dilated[") == convolutions
    assert layer(x).shape == (1, 12, 10, 4) and layer(x, (11, 9)).shape == (1, 11, 9, 4)
