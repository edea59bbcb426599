"""The text towers of SDXL: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14 (transformers' `CLIPTextModel`, `...WithProjection`).

SDXL reads the hidden states before the last layer, without the final normalisation, from both towers, and the pooled,
projected state of the first end-of-text token from the second. Attention is causal; padding is attended like any token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from instantid_jax.config import CLIPTextConfig, ComputeConfig
from instantid_jax.nn.attention import dot_product_attention, split_heads
from instantid_jax.nn.linear import Linear
from instantid_jax.nn.norm import LayerNorm
from instantid_jax.nn.stacking import scan_layers, stack_of


class TextStates(NamedTuple):
    """What a text tower gives."""

    hidden: Float[Array, "l b n c"]
    """Embeddings, then the output of every layer: l = layers + 1. The last is not normalised."""
    pooled: Float[Array, "b p"]
    """State of the first end-of-text token after the final normalisation and, where there is one, the projection."""


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), CLIP's own approximation."""
    return x * jax.nn.sigmoid(1.702 * x)


class CLIPAttention(nnx.Module):
    """Causal self-attention; all four projections have biases."""

    def __init__(self, config: CLIPTextConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype, c = jnp.dtype(compute.dtype), config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = Linear(c, c, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(c, c, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(c, c, dtype=dtype, rngs=rngs)
        self.out_proj = Linear(c, c, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None]
        return self.out_proj(dot_product_attention(q, k, v, mask=causal).reshape(x.shape))


class CLIPMLP(nnx.Module):
    """Linear, activation, linear."""

    def __init__(self, config: CLIPTextConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(compute.dtype)
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        x = self.fc1(x)
        return self.fc2(quick_gelu(x) if self.quick else jax.nn.gelu(x, approximate=False))


class CLIPLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: CLIPTextConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(compute.dtype)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.self_attn = CLIPAttention(config, compute=compute, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = CLIPMLP(config, compute=compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nnx.Module):
    """Token embedding plus position embedding.

    Rows are cast after they are looked up: the gradient of a token that stands in many places, as the padding does, is then a sum in
    the table's own float32. In bfloat16 it stops growing after some hundred terms.
    """

    def __init__(self, config: CLIPTextConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(compute.dtype)
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n c"]:
        tokens, positions = self.token_embedding(ids), self.position_embedding(jnp.arange(ids.shape[1]))
        return tokens.astype(self.dtype) + positions.astype(self.dtype)


class CLIPEncoder(nnx.Module):
    """The layers, stacked."""

    def __init__(self, config: CLIPTextConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        self.layers = stack_of(lambda r: CLIPLayer(config, compute=compute, rngs=r), config.num_hidden_layers, rngs)


class CLIPTextModel(nnx.Module):
    """Token ids [b, n] (n at most `max_position_embeddings`) to `TextStates`."""

    def __init__(self, config: CLIPTextConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(compute.dtype)
        self.config, self.compute = config, compute
        self.embeddings = CLIPEmbeddings(config, compute=compute, rngs=rngs)
        self.encoder = CLIPEncoder(config, compute=compute, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype, rngs=rngs)
        if config.with_projection:
            self.text_projection = Linear(config.hidden_size, config.projection_dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, "b n"]) -> TextStates:
        def apply(layer: CLIPLayer, x: Array, _: None) -> tuple[Array, Array]:
            x = layer(x)
            return x, x

        embedded = self.embeddings(ids)
        last, outputs = scan_layers(self.encoder.layers, apply, embedded, unroll=self.compute.unroll)
        end = jnp.argmax(ids == self.config.eos_token_id, axis=-1)
        pooled = self.final_layer_norm(jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0])
        if self.config.with_projection:
            pooled = self.text_projection(pooled)
        return TextStates(jnp.concatenate([embedded[None], outputs]), pooled)
