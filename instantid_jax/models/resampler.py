"""The Perceiver resampler of InstantID's image adapter: one face embedding in, sixteen identity tokens out.

    L <- L + Attn(LN2(L), [LN1(x), LN2(L)]);   L <- L + FF(L)      for each layer, x staying as it is
    tokens = LN(proj_out(L))

The unconditional identity is the resampler of a zero vector, not zero tokens. Key names of the published file
(`image_proj`) are numbered sequences; here they have names: layers.{i}.0 is `attn`, layers.{i}.1 is `ff`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from instantid_jax.config import ComputeConfig, ResamplerConfig
from instantid_jax.nn.attention import split_heads
from instantid_jax.nn.linear import Linear
from instantid_jax.nn.norm import LayerNorm
from instantid_jax.nn.stacking import scan_layers, stack_of


class PerceiverAttention(nnx.Module):
    """Latents attend to the face embedding and to themselves. No biases; the scale is split evenly over q and k."""

    def __init__(self, config: ResamplerConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype, inner = jnp.dtype(compute.dtype), config.dim_head * config.heads
        self.heads = config.heads
        self.norm1 = LayerNorm(config.dim, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(config.dim, dtype=dtype, rngs=rngs)
        self.to_q = Linear(config.dim, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_kv = Linear(config.dim, 2 * inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_out = Linear(inner, config.dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b m c"], latents: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        x, latents = self.norm1(x), self.norm2(latents)
        q = self.to_q(latents)
        k, v = jnp.split(self.to_kv(jnp.concatenate([x, latents], axis=1)), 2, axis=-1)
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        quarter = q.shape[-1] ** -0.25
        scores = jnp.einsum("bnkd,bmkd->bknm", q * quarter, k * quarter, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bknm,bmkd->bnkd", weights, v)
        return self.to_out(out.reshape(*out.shape[:2], -1))


class PerceiverFeedForward(nnx.Module):
    """LayerNorm, linear, exact GELU, linear; no biases in the linear layers."""

    def __init__(self, config: ResamplerConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype, inner = jnp.dtype(compute.dtype), config.dim * config.ff_mult
        self.norm = LayerNorm(config.dim, dtype=dtype, rngs=rngs)
        self.proj_in = Linear(config.dim, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(inner, config.dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return self.proj_out(jax.nn.gelu(self.proj_in(self.norm(x)), approximate=False))


class ResamplerLayer(nnx.Module):
    """Perceiver attention and feed-forward, each added to the latents."""

    def __init__(self, config: ResamplerConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        self.attn = PerceiverAttention(config, compute=compute, rngs=rngs)
        self.ff = PerceiverFeedForward(config, compute=compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b m c"], latents: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        latents = latents + self.attn(x, latents)
        return latents + self.ff(latents)


class Resampler(nnx.Module):
    """Face embeddings [b, d] to identity tokens [b, num_queries, output_dim]."""

    def __init__(self, config: ResamplerConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(compute.dtype)
        self.config, self.compute = config, compute
        self.latents = nnx.Param(jax.random.normal(rngs.params(), (1, config.num_queries, config.dim)) * config.dim**-0.5)
        self.proj_in = Linear(config.embedding_dim, config.dim, dtype=dtype, rngs=rngs)
        self.layers = stack_of(lambda r: ResamplerLayer(config, compute=compute, rngs=r), config.depth, rngs)
        self.proj_out = Linear(config.dim, config.output_dim, dtype=dtype, rngs=rngs)
        self.norm_out = LayerNorm(config.output_dim, dtype=dtype, rngs=rngs)

    def __call__(self, embedding: Float[Array, "b d"]) -> Float[Array, "b n c"]:
        """`embedding` is the recogniser's raw vector (for antelopev2 its length is about 20), not the normalised one."""
        x = self.proj_in(prepare(embedding, self.config)[:, None])
        latents = jnp.broadcast_to(self.latents[...].astype(x.dtype), (x.shape[0], *self.latents.shape[1:]))
        latents, _ = scan_layers(self.layers, lambda layer, y, _: (layer(x, y), None), latents, unroll=self.compute.unroll)
        return self.norm_out(self.proj_out(latents))


class MLPProjector(nnx.Module):
    """Two linear layers instead of the resampler, as IP-Adapter-FaceID has them: an ablation."""

    def __init__(self, config: ResamplerConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(compute.dtype), config.num_queries * config.output_dim
        self.config = config
        self.proj_in = Linear(config.embedding_dim, 2 * config.embedding_dim, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(2 * config.embedding_dim, width, dtype=dtype, rngs=rngs)
        self.norm_out = LayerNorm(config.output_dim, dtype=dtype, rngs=rngs)

    def __call__(self, embedding: Float[Array, "b d"]) -> Float[Array, "b n c"]:
        """As `Resampler`."""
        x = jax.nn.gelu(self.proj_in(prepare(embedding, self.config)), approximate=False)
        tokens = self.proj_out(x).reshape(-1, self.config.num_queries, self.config.output_dim)
        return self.norm_out(tokens)


def make_projector(config: ResamplerConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> Resampler | MLPProjector:
    """The network from embedding to tokens that `config.kind` names."""
    return (MLPProjector if config.kind == "mlp" else Resampler)(config, compute=compute, rngs=rngs)


def prepare(embedding: Float[Array, "b d"], config: ResamplerConfig) -> Float[Array, "b d"]:
    """The embedding as it enters: raw, or of length sqrt(d); zero, which stands for nobody, stays zero."""
    if not config.normalize:
        return embedding
    length = jnp.linalg.norm(embedding, axis=-1, keepdims=True)
    return embedding * (config.embedding_dim**0.5 / jnp.maximum(length, 1e-6))
