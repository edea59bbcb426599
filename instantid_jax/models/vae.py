"""The autoencoder between pictures and latents (diffusers' `AutoencoderKL`).

    encode: picture in [-1, 1] -> mean and log-variance of a normal distribution over latents
    latent for diffusion = sample * scaling_factor          (0.13025 in SDXL)
    decode: latent / scaling_factor -> picture in [-1, 1]

SDXL's original weights overflow in float16 (`force_upcast`): use float32 or bfloat16.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from instantid_jax.config import AutoencoderConfig, ComputeConfig
from instantid_jax.nn.attention import Attention
from instantid_jax.nn.conv import Conv, Downsample, Upsample
from instantid_jax.nn.norm import GroupNorm
from instantid_jax.nn.resnet import ResnetBlock

_EPSILON = 1e-6


class LatentDistribution(NamedTuple):
    """A diagonal normal distribution over unscaled latents."""

    mean: Float[Array, "b h w c"]
    logvar: Float[Array, "b h w c"]

    def sample(self, noise: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """mean + exp(logvar / 2) * noise."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


class SelfAttention2D(Attention):
    """Single-head self-attention over all the pixels, after a GroupNorm and added to its input."""

    def __init__(self, channels: int, groups: int, *, compute: ComputeConfig, rngs: nnx.Rngs):
        super().__init__(channels, channels, 1, bias=True, compute=compute, rngs=rngs)
        self.group_norm = GroupNorm(channels, groups, _EPSILON, dtype=jnp.dtype(compute.dtype), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:  # type: ignore[override]
        b, h, w, c = x.shape
        return x + super().__call__(self.group_norm(x).reshape(b, h * w, c)).reshape(b, h, w, c)


class MidBlock(nnx.Module):
    """Residual block, self-attention (where the configuration has it), residual block."""

    def __init__(self, config: AutoencoderConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        channels, groups, dtype = config.block_out_channels[-1], config.norm_num_groups, jnp.dtype(compute.dtype)
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, _EPSILON, dtype=dtype, rngs=rngs) for _ in range(2)])
        count = 1 if config.mid_block_add_attention else 0
        self.attentions = nnx.List([SelfAttention2D(channels, groups, compute=compute, rngs=rngs) for _ in range(count)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class EncoderBlock(nnx.Module):
    """Residual blocks, then a halving padded only right and bottom, except in the last block."""

    def __init__(self, config: AutoencoderConfig, index: int, *, compute: ComputeConfig, rngs: nnx.Rngs):
        widths, groups, dtype = config.block_out_channels, config.norm_num_groups, jnp.dtype(compute.dtype)
        first = widths[max(index - 1, 0)]
        self.resnets = nnx.List(
            [
                ResnetBlock(first if j == 0 else widths[index], widths[index], groups, _EPSILON, dtype=dtype, rngs=rngs)
                for j in range(config.layers_per_block)
            ]
        )
        last = index == len(widths) - 1
        self.downsamplers = nnx.List([] if last else [Downsample(widths[index], asymmetric=True, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class DecoderBlock(nnx.Module):
    """One residual block more than the encoder's, then an enlargement by two, except in the last block."""

    def __init__(self, config: AutoencoderConfig, index: int, *, compute: ComputeConfig, rngs: nnx.Rngs):
        widths, groups, dtype = config.block_out_channels[::-1], config.norm_num_groups, jnp.dtype(compute.dtype)
        first = widths[max(index - 1, 0)]
        self.resnets = nnx.List(
            [
                ResnetBlock(first if j == 0 else widths[index], widths[index], groups, _EPSILON, dtype=dtype, rngs=rngs)
                for j in range(config.layers_per_block + 1)
            ]
        )
        last = index == len(widths) - 1
        self.upsamplers = nnx.List([] if last else [Upsample(widths[index], dtype=dtype, rngs=rngs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class VAEEncoder(nnx.Module):
    """Picture to the parameters of the latent distribution."""

    def __init__(self, config: AutoencoderConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        widths, dtype = config.block_out_channels, jnp.dtype(compute.dtype)
        self.conv_in = Conv(config.in_channels, widths[0], dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List([EncoderBlock(config, i, compute=compute, rngs=rngs) for i in range(len(widths))])
        self.mid_block = MidBlock(config, compute=compute, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, _EPSILON, dtype=dtype, rngs=rngs)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, dtype=dtype, rngs=rngs)

    def early(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w c2"]:
        """The convolutions down to the latent's resolution."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return x

    def late(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        """The rest."""
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class VAEDecoder(nnx.Module):
    """Latent to picture."""

    def __init__(self, config: AutoencoderConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        widths, dtype = config.block_out_channels, jnp.dtype(compute.dtype)
        self.conv_in = Conv(config.latent_channels, widths[-1], dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(config, compute=compute, rngs=rngs)
        self.up_blocks = nnx.List([DecoderBlock(config, i, compute=compute, rngs=rngs) for i in range(len(widths))])
        self.conv_norm_out = GroupNorm(widths[0], config.norm_num_groups, _EPSILON, dtype=dtype, rngs=rngs)
        self.conv_out = Conv(widths[0], config.out_channels, dtype=dtype, rngs=rngs)

    def early(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        """What is done at the latent's resolution before any enlargement."""
        return self.mid_block(self.conv_in(z))

    def late(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c2"]:
        """The rest."""
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Autoencoder(nnx.Module):
    """Encoder and decoder with the 1x1 convolutions between them and the latent."""

    def __init__(self, config: AutoencoderConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype, latent = jnp.dtype(compute.dtype), config.latent_channels
        self.config = config
        self.encoder = VAEEncoder(config, compute=compute, rngs=rngs)
        self.decoder = VAEDecoder(config, compute=compute, rngs=rngs)
        if config.use_quant_conv:
            self.quant_conv = Conv(2 * latent, 2 * latent, 1, dtype=dtype, rngs=rngs)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(latent, latent, 1, dtype=dtype, rngs=rngs)

    def encode(self, image: Float[Array, "b H W c"]) -> LatentDistribution:
        """Distribution over unscaled latents; `image` in [-1, 1]. The log-variance is clamped to [-30, 20]."""
        return self.distribution(self.encode_late(self.encode_early(image)))

    def encode_early(self, image: Float[Array, "b H W c"]) -> Float[Array, "b h w c2"]:
        """The first part of `encode`: features at the latent's resolution, each seeing only its neighbourhood (`models.tiling`)."""
        return self.encoder.early(image)

    def encode_late(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        """The second part: the distribution's numbers from those features."""
        moments = self.encoder.late(x)
        return self.quant_conv(moments) if self.config.use_quant_conv else moments

    def distribution(self, moments: Float[Array, "b h w c"]) -> LatentDistribution:
        """The distribution from its numbers."""
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return LatentDistribution(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W c2"]:
        """Picture, nominally in [-1, 1], of an unscaled latent."""
        return self.decode_late(self.decode_early(z))

    def decode_early(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        """The first part of `decode`: features at the latent's resolution, with attention over all pixels."""
        return self.decoder.early(self.post_quant_conv(z) if self.config.use_post_quant_conv else z)

    def decode_late(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c2"]:
        """The second part: the picture from those features."""
        return self.decoder.late(x)

    def scale(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Latents as the UNet sees them, from the autoencoder's own."""
        mean, std = self._statistics()
        return (z - mean) / std * self.config.scaling_factor

    def unscale(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The inverse of `scale`."""
        mean, std = self._statistics()
        return z * std / self.config.scaling_factor + mean

    def _statistics(self) -> tuple[Array | float, Array | float]:
        if self.config.latents_mean is None or self.config.latents_std is None:
            return self.config.shift_factor or 0.0, 1.0
        return jnp.asarray(self.config.latents_mean), jnp.asarray(self.config.latents_std)
