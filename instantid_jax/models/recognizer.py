"""A small recogniser that reads a face embedding in latents: the critic of the optional identity loss.

It belongs to training alone. It is trained by the "recognize" objective to say what the face recogniser says of the same
picture, and is then frozen. Seeing latents instead of pictures, it needs no decoding.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from instantid_jax.config import ComputeConfig, ConfigError
from instantid_jax.nn.conv import Conv, Downsample
from instantid_jax.nn.linear import Linear
from instantid_jax.nn.norm import GroupNorm
from instantid_jax.nn.resnet import ResnetBlock

_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class RecognizerConfig:
    """Shape of the recogniser of latents."""

    widths: tuple[int, ...] = (96, 160, 256)
    """Channels at full, half, quarter resolution and so on."""
    layers_per_block: int = 2
    """Residual blocks at each resolution."""
    norm_num_groups: int = 16
    latent_channels: int | None = None
    """None: the autoencoder's."""
    embedding_dim: int | None = None
    """None: that of the model's face embedding."""

    def __post_init__(self) -> None:
        if not self.widths or any(width % self.norm_num_groups for width in self.widths):
            raise ConfigError(f"RecognizerConfig: widths {self.widths} must each be divisible by norm_num_groups {self.norm_num_groups}")
        if self.layers_per_block < 1:
            raise ConfigError(f"RecognizerConfig: layers_per_block must be at least 1, not {self.layers_per_block}")


class Recognizer(nnx.Module):
    """Residual blocks with halvings between, the mean over all places, one linear layer."""

    def __init__(self, config: RecognizerConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        assert config.latent_channels is not None and config.embedding_dim is not None
        widths, groups, dtype = config.widths, config.norm_num_groups, jnp.dtype(compute.dtype)
        self.layers_per_block = config.layers_per_block
        wide = [width for width in widths for _ in range(config.layers_per_block)]
        self.conv_in = Conv(config.latent_channels, widths[0], dtype=dtype, rngs=rngs)
        before = (widths[0], *wide[:-1])
        self.resnets = nnx.List([ResnetBlock(a, b, groups, _EPSILON, dtype=dtype, rngs=rngs) for a, b in zip(before, wide, strict=True)])
        self.downsamplers = nnx.List([Downsample(width, dtype=dtype, rngs=rngs) for width in widths[:-1]])
        self.norm_out = GroupNorm(widths[-1], groups, _EPSILON, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(widths[-1], config.embedding_dim, dtype=dtype, rngs=rngs)

    def __call__(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """Embedding, of any length, of latents as the UNet sees them (scaled)."""
        x = self.conv_in(latents)
        for i, block in enumerate(self.resnets, 1):
            x = block(x)
            level, rest = divmod(i, self.layers_per_block)
            if rest == 0 and level <= len(self.downsamplers):
                x = self.downsamplers[level - 1](x)
        x = jax.nn.silu(self.norm_out(x)).mean((1, 2))
        return self.proj_out(x).astype(jnp.float32)
