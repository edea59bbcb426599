"""Multi-head attention, its backends, and InstantID's decoupled cross-attention.

    Attn(q, k, v) = softmax(q k^T / sqrt(d)) v                                            (1)
    out = to_out( Attn(q, k_text, v_text) + s * M * Attn(q, k_id, v_id) )                 (2)
    out = to_out( Attn(q, k_text, v_text) + sum_p s_p * M_p * Attn(q, k_p, v_p) )         (3)

(2) is the decoupled cross-attention of InstantID (arXiv 2401.07519, section 3.3, after IP-Adapter): one query, two
softmaxes, one output projection; s is the adapter's strength and M an optional mask over the queries. (3) is the same for
several people p, each with a softmax and a mask of its own. Of one person s M may be a sum over places, sum_r s_r * M_r.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from instantid_jax.config import ComputeConfig
from instantid_jax.nn.linear import Linear
from instantid_jax.nn.placement import on_each_device
from instantid_jax.nn.platform import target_platform

_SHORT = 256  # keys: below this the scores are small and one fused einsum is best everywhere
_QUERY_BLOCK = 1024
_CUDNN_WIDEST = 128  # channels a head that every generation's kernels take
_MANY_SCORES = 1 << 26  # of one head of one example: a quarter of a gigabyte in float32


class KeysValues(NamedTuple):
    """Keys and values of one attention layer, split into heads; with a leading axis where layers are stacked."""

    k: Float[Array, "*l b m k d"]
    v: Float[Array, "*l b m k d"]


class IdentitySite(NamedTuple):
    """What one cross-attention layer needs to attend to the identity tokens, besides its queries."""

    keys_values: KeysValues
    """Of several people an axis more: [*l, b, p, m, k, d]."""
    scale: Float[Array, "*p"]
    """Strength; one for each of several people, or of several places of one person. A `Transformer2D` takes it with a leading axis of layers too."""
    mask: Float[Array, "b n p"] | Float[Array, "b H W *p"] | None
    """A weight for every query; still a picture, at any resolution, where a `Transformer2D` is given it. Several people or places need one."""


def dot_product_attention(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    *,
    mask: Bool[Array, "#b #n m"] | None = None,
    backend: str = "auto",
) -> Float[Array, "b n k d"]:
    """Equation (1), softmax in float32.

    `mask` says which keys count, broadcast over examples and queries: [b, 1, m] for padded contexts, [1, n, m] for a causal one.
    `backend` is one of `ComputeConfig.attention`; masked and short attention always take the plain form, as does what cuDNN
    or splash has no kernel for (float32, odd lengths, the autoencoder's single wide head); of large pictures that goes by
    blocks of queries.
    """
    if mask is not None or k.shape[1] <= _SHORT:
        return _plain(q, k, v, mask)
    if backend == "auto":
        backend = {"cpu": "blocked", "gpu": "cudnn", "tpu": "splash"}.get(target_platform(), "xla")
    if backend == "cudnn":
        if q.dtype != jnp.float32 and q.shape[-1] <= _CUDNN_WIDEST and q.shape[-1] % 8 == 0:
            return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        backend = "xla" if q.shape[1] * k.shape[1] <= _MANY_SCORES else "blocked"
    if backend == "splash":
        from instantid_jax.nn.splash import fits, splash_attention  # Pallas, which nothing else needs, takes a second to import

        if fits(q, k):
            return splash_attention(q, k, v)
        backend = "xla" if q.shape[1] * k.shape[1] <= _MANY_SCORES else "blocked"
    return _plain(q, k, v, mask) if backend == "xla" else on_each_device(_blocked, q, k, v)


def _plain(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    # XLA for CPU multiplies matrices that lie together up to four times as fast, and does not move heads there by itself.
    heads_first = target_platform() == "cpu"
    if heads_first:
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = jnp.einsum("bknd,bkmd->bknm" if heads_first else "bnkd,bmkd->bknm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bknm,bkmd->bknd", weights, v).transpose(0, 2, 1, 3) if heads_first else jnp.einsum("bknm,bmkd->bnkd", weights, v)


def _blocked(q: Array, k: Array, v: Array) -> Array:
    """One (example, head, block of queries) at a time: on CPU plain matrix products are several times faster so."""
    b, n, heads, d = q.shape
    m = k.shape[1]
    block = min(_QUERY_BLOCK, n)
    padded = -(-n // block) * block
    q = jnp.pad(q * d**-0.5, ((0, 0), (0, padded - n), (0, 0), (0, 0)))
    q = q.transpose(0, 2, 1, 3).reshape(b * heads, padded // block, block, d)
    k, v = (x.transpose(0, 2, 1, 3).reshape(b * heads, m, d) for x in (k, v))

    def one_head(args: tuple[Array, Array, Array]) -> Array:
        queries, keys, values = args

        def one_block(block_of_queries: Array) -> Array:
            scores = jnp.matmul(block_of_queries, keys.T, preferred_element_type=jnp.float32)
            return jax.nn.softmax(scores, axis=-1).astype(values.dtype) @ values

        return jax.lax.map(one_block, queries)

    out = jax.lax.map(one_head, (q, k, v))
    return out.reshape(b, heads, padded, d)[:, :, :n].transpose(0, 2, 1, 3)


class Attention(nnx.Module):
    """Self- or cross-attention with the published names. Queries have `channels`, the context `context_channels`.

    Only the output projection has a bias, unless `bias` (the autoencoder's attention).
    """

    def __init__(self, channels: int, context_channels: int, heads: int, *, bias: bool = False, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(compute.dtype)
        self.heads, self.backend = heads, compute.attention
        self.to_q = Linear(channels, channels, use_bias=bias, dtype=dtype, rngs=rngs)
        self.to_k = Linear(context_channels, channels, use_bias=bias, dtype=dtype, rngs=rngs)
        self.to_v = Linear(context_channels, channels, use_bias=bias, dtype=dtype, rngs=rngs)
        self.to_out_0 = Linear(channels, channels, dtype=dtype, rngs=rngs)

    def project(self, context: Float[Array, "b m c"]) -> KeysValues:
        """Keys and values of a context. A context that stays the same over the denoising steps is projected once."""
        return KeysValues(split_heads(self.to_k(context), self.heads), split_heads(self.to_v(context), self.heads))

    def __call__(
        self,
        x: Float[Array, "b n c"],
        context: KeysValues | None = None,
        mask: Bool[Array, "#b #n m"] | None = None,
        identity: IdentitySite | None = None,
    ) -> Float[Array, "b n c"]:
        """Equation (2), of several people (3); equation (1) without `identity`; self-attention without `context`."""
        q = split_heads(self.to_q(x), self.heads)
        k, v = self.project(x) if context is None else context
        out = dot_product_attention(q, k, v, mask=mask, backend=self.backend)
        if identity is not None and identity.keys_values.k.ndim > q.ndim:
            assert identity.mask is not None, "several people are told apart by masks"
            each = jax.vmap(lambda k, v: dot_product_attention(q, k, v, backend=self.backend), in_axes=1, out_axes=1)(*identity.keys_values)
            weights = (identity.scale * identity.mask).astype(out.dtype).transpose(0, 2, 1)  # [b, p, n]
            out = out + jnp.sum(weights[..., None, None] * each, axis=1)
        elif identity is not None:
            from_identity = dot_product_attention(q, *identity.keys_values, backend=self.backend)
            if identity.mask is not None and identity.mask.shape[-1] > 1:
                weights = jnp.sum(identity.scale * identity.mask, axis=-1)
                out = out + weights[..., None, None].astype(out.dtype) * from_identity
            else:
                if identity.mask is not None:
                    from_identity = from_identity * identity.mask[..., None].astype(from_identity.dtype)
                out = out + identity.scale.astype(out.dtype) * from_identity
        return self.to_out_0(out.reshape(x.shape))


def split_heads(x: Float[Array, "b n c"], heads: int) -> Float[Array, "b n {heads} d"]:
    """Head-major: channel index = head * d + position in the head."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
