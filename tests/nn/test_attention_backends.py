"""Which attention goes where, without the hardware."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.nn.attention import dot_product_attention


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
