"""Normalisation with float32 statistics and the biased, two-pass variance that PyTorch uses."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class GroupNorm(nnx.Module):
    """Group normalisation over (h, w, channels of the group), then a scale and a shift for every channel.

    Groups are runs of neighbouring channels, as in torch's NCHW layout. `epsilon` differs between networks: 1e-5 in the
    UNet's residual blocks, 1e-6 in `Transformer2DModel` and in the autoencoder.
    """

    def __init__(self, channels: int, groups: int, epsilon: float, *, dtype: Any, rngs: nnx.Rngs):
        self.groups, self.epsilon, self.dtype = groups, epsilon, dtype
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = x.astype(jnp.float32).reshape(b, h, w, self.groups, c // self.groups)
        mean = y.mean((1, 2, 4), keepdims=True)
        variance = jnp.square(y - mean).mean((1, 2, 4), keepdims=True)
        y = ((y - mean) / jnp.sqrt(variance + self.epsilon)).reshape(b, h, w, c)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over channels; epsilon 1e-5 everywhere in SDXL and InstantID (Flax's own default is 1e-6)."""

    def __init__(self, channels: int, epsilon: float = 1e-5, *, dtype: Any, rngs: nnx.Rngs):
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        y = x.astype(jnp.float32)
        mean = y.mean(-1, keepdims=True)
        variance = jnp.square(y - mean).mean(-1, keepdims=True)
        y = (y - mean) / jnp.sqrt(variance + self.epsilon)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(self.dtype)
