"""Which attention goes where, without the hardware."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.nn import attention
from instantid_jax.nn.attention import dot_product_attention
from instantid_jax.nn.splash import splash_attention


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: None = None) -> jax.Array:
    return attention._plain(q, k, v, mask)


@pytest.mark.parametrize(
    ("dtype", "width", "asked"),
    [("bfloat16", 64, True), ("float16", 128, True), ("bfloat16", 512, False), ("bfloat16", 20, False), ("float32", 64, False)],
)
def test_cudnn_is_asked_only_for_what_it_has_kernels_for(monkeypatch: pytest.MonkeyPatch, dtype: str, width: int, asked: bool) -> None:
    calls = []

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str) -> jax.Array:
        calls.append(implementation)
        return q

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    x = jnp.ones((1, 300, 1, width), dtype)
    assert dot_product_attention(x, x, x).shape == x.shape
    assert calls == ["cudnn"] * asked


def test_many_scores_go_by_blocks_where_cudnn_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("instantid_jax.nn.attention._MANY_SCORES", 300 * 300 - 1)
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 300, 1, 512)) for i in range(3))
    program = jax.make_jaxpr(dot_product_attention)(q, k, v)
    assert "scan" in str(program)
    np.testing.assert_allclose(dot_product_attention(q, k, v), dot_product_attention(q, k, v, backend="xla"), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "length", "width", "asked"),
    [
        ("bfloat16", 1024, 64, True),
        ("bfloat16", 300, 64, False),
        ("bfloat16", 1024, 512, False),
        ("float32", 1024, 64, False),
        ("bfloat16", 256, 64, False),
    ],
)
def test_splash_is_asked_only_for_what_it_has_a_kernel_for(monkeypatch: pytest.MonkeyPatch, dtype: str, length: int, width: int, asked: bool) -> None:
    monkeypatch.setattr(attention, "target_platform", lambda: "tpu")
    x = jnp.ones((1, length, 1, width), dtype)
    assert ("pallas_call" in str(jax.make_jaxpr(dot_product_attention)(x, x, x))) is asked


def test_splash_equals_plain_attention_forward_and_backward() -> None:
    """In Pallas' interpreter, in float32."""
    q, k, v, out = (jax.random.normal(jax.random.key(i), (2, 256 if i in (0, 3) else 384, 3, 64)) for i in range(4))

    def loss(backend, q, k, v):
        return jnp.sum(out * backend(q, k, v))

    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda q, k, v, f=f: loss(f, q, k, v), argnums=(0, 1, 2)))(q, k, v) for f in (splash_attention, _plain)
    )
    np.testing.assert_allclose(splash_attention(q, k, v), _plain(q, k, v, None), atol=2e-6)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_splash_in_half_precision_is_as_near_as_plain_attention() -> None:
    """In the type in which the kernel is used: its largest errors from float32, values and gradients, against those of the plain form."""
    q, k, v, out = (jax.random.normal(jax.random.key(i), (2, 256 if i in (0, 3) else 384, 3, 64)) for i in range(4))

    def run(backend, dtype):
        def loss(q, k, v):
            y = backend(q, k, v)
            return jnp.sum(out * y.astype(jnp.float32)), y

        gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*(x.astype(dtype) for x in (q, k, v)))
        return [np.asarray(x, np.float32) for x in (y, *gradients)]

    exact, plain, ours = run(_plain, jnp.float32), run(_plain, jnp.bfloat16), run(splash_attention, jnp.bfloat16)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert np.abs(a - c).max() <= 1.5 * np.abs(b - c).max() <= 0.05 * np.abs(c).max()


def test_blocks_have_the_gradient_of_plain_attention() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 300, 2, 16)) for i in range(3))

    def gradient(backend: str):
        return jax.grad(lambda q, k, v: jnp.sum(jnp.sin(dot_product_attention(q, k, v, backend=backend))), argnums=(0, 1, 2))(q, k, v)

    for a, b in zip(gradient("blocked"), gradient("xla"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
