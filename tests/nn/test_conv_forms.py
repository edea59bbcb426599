"""A 3x3 convolution as one matrix product, which is what TPUs run for deep layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from instantid_jax.nn import conv
from instantid_jax.nn.conv import Conv, conv3x3_as_matmul


def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("shape", [(2, 8, 6, 5), (1, 1, 1, 3), (1, 7, 3, 16)])
def test_equal_to_a_convolution_forward_and_backward(shape: tuple[int, ...]) -> None:
    x = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, shape[-1], 4)) / (9 * shape[-1]) ** 0.5
    np.testing.assert_allclose(conv3x3_as_matmul(x, kernel), plain(x, kernel), atol=2e-6)

    def loss(form, x, kernel):
        return jnp.sum(jnp.sin(form(x, kernel)))

    ours, theirs = (jax.grad(loss, argnums=(1, 2))(form, x, kernel) for form in (conv3x3_as_matmul, plain))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize(
    ("height", "channels", "stride", "matmul"),
    [(32, 1280, 1, True), (64, 640, 1, True), (128, 320, 1, True), (256, 256, 1, False), (32, 1280, 2, False), (32, 64, 1, False)],
)
def test_the_form_goes_by_platform_and_shape(monkeypatch: pytest.MonkeyPatch, height: int, channels: int, stride: int, matmul: bool) -> None:
    layer = nnx.eval_shape(lambda: Conv(channels, 8, stride=stride, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graph, weights = nnx.split(layer)
    x = jax.ShapeDtypeStruct((1, height, height, channels), jnp.float32)

    def made() -> str:
        return str(jax.make_jaxpr(lambda w, x: nnx.merge(graph, w)(x))(weights, x))

    assert "conv_general_dilated" in made()
    monkeypatch.setattr(conv, "target_platform", lambda: "tpu")
    assert ("conv_general_dilated" not in made()) is matmul
