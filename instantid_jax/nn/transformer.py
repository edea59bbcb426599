"""The transformer inside the UNet: self-attention, decoupled cross-attention, GEGLU feed-forward, scanned over equal blocks."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from instantid_jax.config import ComputeConfig
from instantid_jax.nn.attention import Attention, IdentitySite, KeysValues
from instantid_jax.nn.conv import Conv, resize_nearest
from instantid_jax.nn.linear import Linear
from instantid_jax.nn.norm import GroupNorm, LayerNorm
from instantid_jax.nn.placement import by_rows
from instantid_jax.nn.stacking import map_layers, scan_layers, stack_of


class GEGLU(nnx.Module):
    """value * gelu(gate): the first half of the projection is the value, the second the gate; gelu is the exact one (erf)."""

    def __init__(self, channels: int, inner: int, *, compute: ComputeConfig, rngs: nnx.Rngs):
        self.proj = Linear(channels, 2 * inner, dtype=jnp.dtype(compute.dtype), rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n inner"]:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, channels: int, *, compute: ComputeConfig, rngs: nnx.Rngs):
        self.net_0 = GEGLU(channels, 4 * channels, compute=compute, rngs=rngs)
        self.net_2 = Linear(4 * channels, channels, dtype=jnp.dtype(compute.dtype), rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return self.net_2(self.net_0(x))


class BasicTransformerBlock(nnx.Module):
    """x += self-attention; x += cross-attention (text, and identity beside it); x += feed-forward. Each after a LayerNorm."""

    def __init__(self, channels: int, context_channels: int, heads: int, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(compute.dtype)
        self.norm1 = LayerNorm(channels, dtype=dtype, rngs=rngs)
        self.attn1 = Attention(channels, channels, heads, compute=compute, rngs=rngs)
        self.norm2 = LayerNorm(channels, dtype=dtype, rngs=rngs)
        self.attn2 = Attention(channels, context_channels, heads, compute=compute, rngs=rngs)
        self.norm3 = LayerNorm(channels, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(channels, compute=compute, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n c"], context: KeysValues, mask: Bool[Array, "#b #n m"] | None, identity: IdentitySite | None
    ) -> Float[Array, "b n c"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, mask, identity)
        return x + self.ff(self.norm3(x))


class Transformer2D(nnx.Module):
    """Flattens a feature map row by row, runs `depth` equal transformer blocks over it, and adds the result back.

    Its GroupNorm has epsilon 1e-6, whatever the UNet's own `norm_eps`. `proj_in` and `proj_out` are linear in SDXL and
    1x1 convolutions in Stable Diffusion 1.x (`linear=False`); the two differ only in the stored shape.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        heads: int,
        depth: int,
        groups: int,
        *,
        linear: bool = True,
        compute: ComputeConfig,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(compute.dtype)
        self.compute = compute
        self.norm = GroupNorm(channels, groups, 1e-6, dtype=dtype, rngs=rngs)
        self.transformer_blocks = stack_of(lambda r: BasicTransformerBlock(channels, context_channels, heads, compute=compute, rngs=r), depth, rngs)
        if linear:
            self.proj_in = Linear(channels, channels, dtype=dtype, rngs=rngs)
            self.proj_out = Linear(channels, channels, dtype=dtype, rngs=rngs)
        else:
            self.proj_in = Conv(channels, channels, 1, dtype=dtype, rngs=rngs)
            self.proj_out = Conv(channels, channels, 1, dtype=dtype, rngs=rngs)

    def project(self, context: Float[Array, "b m c"]) -> KeysValues:
        """Cross-attention keys and values of all the blocks, stacked along a first axis."""
        return map_layers(self.transformer_blocks, lambda block: block.attn2.project(context))

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: KeysValues,
        mask: Bool[Array, "#b #n m"] | None = None,
        identity: IdentitySite | None = None,
    ) -> Float[Array, "b h w c"]:
        """`context` and `identity.keys_values` are stacked over the blocks; `identity.mask` is [b, H, W] at any resolution.

        `identity.scale` is a scalar, [l] for the blocks, or [l, p] for blocks and people (or places of one), whose masks are then [b, H, W, p].
        """
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        layers_id = mask_id = None
        if identity is not None:
            layers_id = identity.keys_values, identity.scale if jnp.ndim(identity.scale) else None
            if (picture := identity.mask) is not None:
                mask_id = resize_nearest(picture, (h, w)).reshape(-1, h * w, *picture.shape[3:] or (1,))

        def apply(block: BasicTransformerBlock, y: Array, layer: tuple[KeysValues, tuple[KeysValues, Array | None] | None]) -> tuple[Array, None]:
            text, own = layer
            site = None
            if identity is not None and own is not None:
                # One strength for all blocks stays out of the loop: XLA for TPU copied all of the blocks' weights beside a loop over it.
                site = IdentitySite(own[0], identity.scale if own[1] is None else own[1], mask_id)
            return by_rows(block(y, text, mask, site)), None

        y, _ = scan_layers(self.transformer_blocks, apply, y, (context, layers_id), unroll=self.compute.unroll, remat=self.compute.remat)
        return by_rows(self.proj_out(y.reshape(b, h, w, c)) + x)
