"""The residual block of the UNet, of IdentityNet and of the autoencoder."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from instantid_jax.nn.conv import Conv
from instantid_jax.nn.linear import Linear
from instantid_jax.nn.norm import GroupNorm
from instantid_jax.nn.placement import by_rows


class ResnetBlock(nnx.Module):
    """conv2(silu(norm2( conv1(silu(norm1(x))) + time ))) + shortcut(x).

    Without `time_channels` (the autoencoder) nothing is added in between. The shortcut is a 1x1 convolution where the
    number of channels changes, else the identity.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        groups: int,
        epsilon: float,
        *,
        time_channels: int | None = None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.norm1 = GroupNorm(channels_in, groups, epsilon, dtype=dtype, rngs=rngs)
        self.conv1 = Conv(channels_in, channels_out, dtype=dtype, rngs=rngs)
        if time_channels is not None:
            self.time_emb_proj = Linear(time_channels, channels_out, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(channels_out, groups, epsilon, dtype=dtype, rngs=rngs)
        self.conv2 = Conv(channels_out, channels_out, dtype=dtype, rngs=rngs)
        if channels_in != channels_out:
            self.conv_shortcut = Conv(channels_in, channels_out, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], time: Float[Array, "b t"] | None = None) -> Float[Array, "b h w c2"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None:
            y = y + self.time_emb_proj(jax.nn.silu(time))[:, None, None]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return by_rows(y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x))
