"""Convolution, and the two resizings by a factor of two, in NHWC."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from instantid_jax.nn.placement import gathered
from instantid_jax.nn.platform import target_platform
from instantid_jax.nn.winograd import conv3x3_of_doubled, conv3x3_winograd

_MATMUL_PIXELS = 128 * 128  # up to here three matrix products take a TPU fewer cycles than a convolution, and compile several times faster
_MATMUL_CHANNELS = 256  # below this the taps fill no multiplier
_CPU_PIXELS = 16 * 16  # up to here a CPU is faster with one matrix product (1280 channels, forward: 1.5 times; 8 x 8, with gradient: 3 times)
_TILED_PIXELS = 32 * 32  # from here a CPU is faster with tiles (`nn.winograd`): before, it takes as long to sum the kernel's taps
_TILED_PRODUCTS = 10**8  # of every tap, of one picture; smaller ones are not worth the compiling

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
Padding = tuple[tuple[int, int], tuple[int, int]]
_lecun = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Conv(nnx.Module):
    """A square 2-d convolution with bias. Kernel layout is (height, width, in, out).

    Padding is always explicit: "SAME" in XLA pads (0, 1) before a stride of two where torch pads (1, 1). The kernel may be
    8-bit with a scale for every output channel (`nn.linear`).
    """

    kernel_scale: nnx.Param[Array]

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
        initializer = nnx.initializers.zeros if zero else _lecun
        self.kernel = nnx.Param(initializer(rngs.params(), (size, size, channels_in, channels_out)))
        self.bias = nnx.Param(jnp.zeros((channels_out,)))

    def __call__(self, x: Float[Array, "b h w c"], *, doubled: bool = False) -> Float[Array, "b h2 w2 c2"]:
        """The convolution of `x`, or with `doubled` (3 x 3, stride one) of `x` enlarged to twice its height and width by nearest neighbours."""
        as_tiles = doubled and self._is_plain_3x3 and target_platform() == "cpu" and self.dtype == jnp.float32
        if doubled and not as_tiles:
            x = resize_nearest(x, (2 * x.shape[1], 2 * x.shape[2]))
        kernel, bias, rounded = self.kernel[...], self.bias[...].astype(self.dtype), hasattr(self, "kernel_scale")
        if rounded:
            kernel, x = inside_the_loop(kernel, x)
        kernel = gathered(kernel, self.dtype)
        if as_tiles:
            y = conv3x3_of_doubled(x.astype(self.dtype), kernel)
        elif kernel.shape[:2] == (1, 1) and self.stride == 1:
            y = x.astype(self.dtype) @ kernel[0, 0]
        elif (form := self._as_products(x.shape)) is not None:
            y = form(x.astype(self.dtype), kernel)
        else:
            y = jax.lax.conv_general_dilated(x.astype(self.dtype), kernel, (self.stride,) * 2, self.padding, dimension_numbers=_DIMENSIONS)
        if rounded:
            y = y * self.kernel_scale[...].astype(self.dtype)
        return y + bias

    @property
    def _is_plain_3x3(self) -> bool:
        return self.stride == 1 and self.kernel.shape[:2] == (3, 3) and self.padding == ((1, 1), (1, 1))

    def _as_products(self, shape: tuple[int, ...]) -> Callable[[Array, Array], Array] | None:
        """The form in matrix products, where this platform is faster with one at this shape."""
        _, h, w, channels = shape
        if not self._is_plain_3x3:
            return None
        deep, platform = channels >= _MATMUL_CHANNELS, target_platform()
        if platform == "tpu":
            return conv3x3_as_matmul if deep and h * w <= _MATMUL_PIXELS else None
        if platform != "cpu":
            return None
        if deep and h * w <= _CPU_PIXELS:
            return conv3x3_as_one_matmul
        worth = h * w >= _TILED_PIXELS and h * w * channels * self.kernel.shape[3] >= _TILED_PRODUCTS
        return conv3x3_winograd if worth and not h % 2 and not w % 2 and self.dtype == jnp.float32 else None


@jax.checkpoint  # the taps are several times the input: made again for a gradient
def conv3x3_as_matmul(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c c2"]) -> Float[Array, "b h w c2"]:
    """A 3x3 convolution with one pixel of padding as three matrix products, one for each row of the kernel.

    The picture, shifted left and right, lies beside itself in the channels (a row's three taps at once); rows above and below are
    slices of that. The same numbers in another order of summation, in float32.
    """
    _, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = jnp.concatenate([padded[:, :, j : j + w] for j in range(3)], axis=-1)
    rows = kernel.reshape(3, 3 * c, -1)
    above, here, below = (jnp.matmul(taps[:, i : i + h], rows[i], preferred_element_type=jnp.float32) for i in range(3))
    return (above + here + below).astype(x.dtype)


@jax.checkpoint
def conv3x3_as_one_matmul(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c c2"]) -> Float[Array, "b h w c2"]:
    """The same as a single matrix product over all nine taps."""
    b, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = jnp.concatenate([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=-1)
    return (taps.reshape(b * h * w, 9 * c) @ kernel.reshape(9 * c, -1)).reshape(b, h, w, -1)


def inside_the_loop(kernel: Array, x: Array) -> tuple[Array, Array]:
    """Both as they are, but the compiler must not compute with `kernel` before `x` is there.

    Else it casts 8-bit kernels before the loop over the denoising steps, and holds a large copy of all of them throughout.
    """
    return jax.lax.optimization_barrier((kernel, x))


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
        if size is None or tuple(size) == (2 * h, 2 * w):
            return self.conv(x, doubled=True)
        return self.conv(resize_nearest(x, size))


def resize_nearest(x: Float[Array, "b h w *c"], size: Sequence[int]) -> Float[Array, "b h2 w2 *c"]:
    """Torch's "nearest": output pixel i shows input pixel floor(i * in / out). No half-pixel centres."""
    for axis, new in zip((1, 2), size, strict=True):
        old = x.shape[axis]
        if new == 2 * old:
            x = jnp.repeat(x, 2, axis=axis)
        elif new != old:
            x = jnp.take(x, jnp.arange(new) * old // new, axis=axis)
    return x
