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
        mean, variance = _moments(y, (1, 2, 4), one_pass=x.dtype != jnp.float32)
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
        mean, variance = _moments(y, (-1,), one_pass=x.dtype != jnp.float32)
        y = (y - mean) / jnp.sqrt(variance + self.epsilon)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(self.dtype)


def _moments(y: Array, axes: tuple[int, ...], *, one_pass: bool) -> tuple[Array, Array]:
    """Mean and biased variance of float32 values over `axes`, which stay as axes of length one.

    In one pass, E[y^2] - E[y]^2, an accelerator takes both sums where it makes y, and reads it once less. It loses
    (mean / deviation)^2 2^-24 of the variance, which for half-precision inputs is below their own rounding.
    """
    mean = y.mean(axes, keepdims=True)
    if one_pass:
        return mean, jnp.maximum(jnp.square(y).mean(axes, keepdims=True) - jnp.square(mean), 0.0)
    return mean, jnp.square(y - mean).mean(axes, keepdims=True)
