"""The shape annotations of the layers are checked while tests run, so that a wrong one cannot stay."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from instantid_jax.models.vae import LatentDistribution
from instantid_jax.nn.attention import dot_product_attention
from instantid_jax.nn.norm import GroupNorm


def test_a_wrong_rank_is_refused() -> None:
    norm = GroupNorm(8, 2, 1e-5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert norm(jnp.zeros((1, 2, 2, 8))).shape == (1, 2, 2, 8)
    with pytest.raises(TypeCheckError, match="b h w c"):
        norm(jnp.zeros((2, 2, 8)))


def test_axes_of_one_letter_must_agree() -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 2, 4))
    assert dot_product_attention(q, k[:, :5], k[:, :5]).shape == (1, 6, 2, 4)
    with pytest.raises(TypeCheckError, match="b m k d"):
        dot_product_attention(q, k, k[:, :5])
    with pytest.raises(TypeCheckError, match="noise"):
        LatentDistribution(jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 2, 2, 4))).sample(jnp.zeros((1, 4)))
