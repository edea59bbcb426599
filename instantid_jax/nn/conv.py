"""Convolution, and the two resizings by a factor of two, in NHWC."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]
_he = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Conv(nnx.Module):
    """A square 2-d convolution with bias. Kernel layout is (height, width, in, out).

    Padding is always explicit: "SAME" in XLA pads (0, 1) before a stride of two where torch pads (1, 1).
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: Padding | None = None,
        zero: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.stride, self.dtype = stride, dtype
        self.padding = ((size // 2, size // 2),) * 2 if padding is None else padding
        initializer = nnx.initializers.zeros if zero else _he
        self.kernel = nnx.Param(initializer(rngs.params(), (size, size, channels_in, channels_out)))
        self.bias = nnx.Param(jnp.zeros((channels_out,)))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        if kernel.shape[:2] == (1, 1) and self.stride == 1:
            return x.astype(self.dtype) @ kernel[0, 0] + bias
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x.astype(self.dtype), kernel, (self.stride,) * 2, self.padding, dimension_numbers=dimensions)
        return y + bias


class Downsample(nnx.Module):
    """Halves height and width with a 3x3 convolution of stride two.

    The UNet pads one pixel on every side; the autoencoder (`asymmetric`) pads only right and bottom.
    """

    def __init__(self, channels: int, *, asymmetric: bool = False, dtype: Any, rngs: nnx.Rngs):
        padding = ((0, 1), (0, 1)) if asymmetric else ((1, 1), (1, 1))
        self.conv = Conv(channels, channels, stride=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour enlargement, by two or to a given size, then a 3x3 convolution."""

    def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None) -> Float[Array, "b h2 w2 c"]:
        h, w = x.shape[1:3]
        return self.conv(resize_nearest(x, (2 * h, 2 * w) if size is None else size))


def resize_nearest(x: Float[Array, "b h w *c"], size: Sequence[int]) -> Float[Array, "b h2 w2 *c"]:
    """Torch's "nearest": output pixel i shows input pixel floor(i * in / out). No half-pixel centres."""
    for axis, new in zip((1, 2), size, strict=True):
        old = x.shape[axis]
        if new == 2 * old:
            x = jnp.repeat(x, 2, axis=axis)
        elif new != old:
            x = jnp.take(x, jnp.arange(new) * old // new, axis=axis)
    return x
