"""What the text towers promise beyond parity (tests/parity/test_networks.py)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from instantid_jax.config import ComputeConfig, tiny
from instantid_jax.models import build_networks
from instantid_jax.models.clip_text import CLIPEmbeddings


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    """4,096 equal terms: a bfloat16 sum stops at 256 times the term."""
    config = dataclasses.replace(tiny().text_encoder, vocab_size=8, max_position_embeddings=64)
    module = CLIPEmbeddings(config, compute=ComputeConfig(dtype="bfloat16"), rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)

    def total(state):
        return jnp.sum(nnx.merge(graph, state)(jnp.zeros((64, 64), jnp.int32)).astype(jnp.float32))

    gradient = nnx.to_pure_dict(jax.grad(total)(state))
    np.testing.assert_array_equal(gradient["token_embedding"]["embedding"][0], 4096.0)
    np.testing.assert_array_equal(gradient["position_embedding"]["embedding"], 64.0)


def test_states_have_the_type_of_the_arithmetic():
    network = build_networks(tiny(), ComputeConfig(dtype="bfloat16"))["text_encoder"]
    ids = jnp.zeros((2, 7), jnp.int32)
    states = jax.eval_shape(lambda p: network.bind(p)(ids), network.abstract)
    assert states.hidden.dtype == states.pooled.dtype == jnp.bfloat16
