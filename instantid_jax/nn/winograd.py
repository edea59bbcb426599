"""3x3 convolutions in fewer products, for CPUs: Winograd's F(2x2, 3x3) (Lavin & Gray, [1509.09308](https://arxiv.org/abs/1509.09308)).

A tile of two by two pixels of the result takes 16 products where the definition takes 36, and 9 where the picture was enlarged by two.
They are matrix products over the channels, one for each place in a tile; what stands before and after them only adds. Everything is
done along one direction, then along the other: B^T makes four values of four pixels, G four of a kernel's three taps, and A^T two pixels
of the four products. Equal to the definition but for rounding, which does not double (`tests/nn/test_conv_forms.py`). For a gradient the
tiles are kept, which are several times the input: four layers of 320 channels at 64 x 64 pixels, two rows, take 401 MiB where the
definition takes 90.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_STRIP = 8  # rows of a large picture that are done at once, so that their tiles stay in the processor's cache
_LARGE = 2**24  # numbers in the tiles of a picture from which on that is faster

Grid = Sequence[Sequence[Array]]  # of a tile, of a kernel: one array for each of its places, row by row


def conv3x3_winograd(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c c2"]) -> Float[Array, "b h w c2"]:
    """A 3x3 convolution with one pixel of padding; height and width must be even."""
    x, taps = _with_taps(x, kernel, lambda a, b, c: (a, (a + b + c) / 2, (a - b + c) / 2, c))

    def strip(padded: Array) -> Array:
        products = _at_each_place(jnp.matmul, _tiles(padded), taps)
        return _picture(_along_both(lambda a, b, c, d: (a + b + c, b - c - d), products))

    return _in_strips(x, strip, values=4)


def conv3x3_of_doubled(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c c2"]) -> Float[Array, "b 2*h 2*w c2"]:
    """A 3x3 convolution with one pixel of padding of the picture that is twice as large, every pixel four times.

    A tile sees three by three pixels. Of its four middle values in a direction one is nought and one a pixel itself.
    """
    x, taps = _with_taps(x, kernel, lambda a, b, c: (a, a + b + c, c))

    def strip(padded: Array) -> Array:
        h, w = padded.shape[1] - 2, padded.shape[2] - 2
        pixels = [[padded[:, i : i + h, j : j + w] for j in range(3)] for i in range(3)]
        products = _at_each_place(jnp.matmul, _along_both(lambda a, b, c: (a - b, b, b - c), pixels), taps)
        return _picture(_along_both(lambda a, b, c: (a + b, b - c), products))

    return _in_strips(x, strip, values=9)


def _along_both(transform: Callable[..., Sequence[Array]], grid: Grid) -> Grid:
    """A transform of as many values as a row, or a column, has: of every row, then of every column."""
    rows = [transform(*row) for row in grid]
    return list(zip(*(transform(*column) for column in zip(*rows, strict=True)), strict=True))


def _with_taps(x: Array, kernel: Array, transform: Callable[..., Sequence[Array]]) -> tuple[Array, Grid]:
    """G of the taps, made when `x` is there: XLA would make those of all layers at the program's start, and hold them."""
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    return x, _along_both(transform, [[kernel[i, j] for j in range(3)] for i in range(3)])


def _tiles(padded: Array) -> Grid:
    """B^T of the four by four pixels that every two by two of the result see."""
    h, w = padded.shape[1] - 2, padded.shape[2] - 2
    pixels = [[padded[:, i : i + h : 2, j : j + w : 2] for j in range(4)] for i in range(4)]
    return _along_both(lambda a, b, c, d: (a - c, b + c, c - b, b - d), pixels)


def _at_each_place(product: Callable[[Array, Array], Array], left: Grid, right: Grid) -> Grid:
    """`product` of what lies at the same place in both."""
    return [[product(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]


def _picture(tiles: Grid) -> Array:
    """Two by two pixels of every tile, put side by side."""
    b, h, w, c = tiles[0][0].shape
    return jnp.stack([jnp.stack(row, axis=3) for row in tiles], axis=2).reshape(b, 2 * h, 2 * w, c)


def _padded(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _in_strips(x: Array, strip: Callable[[Array], Array], values: int) -> Array:
    """`strip` of all rows of `x` with a pixel of padding around, at once or, of a large picture, `_STRIP` of them after each other.

    Tiles hold `values` numbers for each of `x`.
    """
    if values * x.size < _LARGE or x.shape[1] % _STRIP:
        return strip(_padded(x))

    def rows(i: Array) -> Array:
        around = i * _STRIP + jnp.arange(-1, _STRIP + 1)
        part = x.at[:, around].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return strip(jnp.pad(part, ((0, 0), (0, 0), (1, 1), (0, 0))))

    def write(i: Array, y: Array) -> Array:
        part = rows(i)
        return jax.lax.dynamic_update_slice_in_dim(y, part, i * part.shape[1], axis=1)

    count = x.shape[1] // _STRIP
    b, h, w, c = jax.eval_shape(rows, jnp.int32(0)).shape
    room = jnp.full((b, count * h, w, c), x[0, 0, 0, 0])  # of `x`, or XLA makes the room of all layers at the program's start
    return jax.lax.fori_loop(0, count, write, room)
