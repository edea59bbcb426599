"""The autoencoder on large pictures in tiles, so that memory grows with the tile and not with the picture.

Both layouts are approximate: GroupNorm takes its statistics from a tile instead of the whole picture.

    even        the low-resolution part with its attention over all pixels (conv_in and middle of the decoder, middle and
                conv_out of the encoder) is computed whole; only the layers beside it go by tiles, equally large ones, spread
                evenly, and blended in the middle of their overlaps
    diffusers   as `AutoencoderKL.enable_tiling` does it: everything by tiles, every 3/4 of a tile, the last ones cut off by the
                picture's edge, blended over the first quarter

Tiles are computed one after the other.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from instantid_jax.models.vae import Autoencoder, LatentDistribution

_OVERLAP = 4  # a tile's side over the blended part of it

Work = Callable[[Array], Array]


class Tiling(NamedTuple):
    """How to cut; static."""

    layout: Literal["even", "diffusers"]
    size: int
    """Side of a tile in pixels, a multiple of four latent pixels."""


def decode_tiled(vae: Autoencoder, z: Float[Array, "b h w c"], tiling: Tiling) -> Float[Array, "b H W c2"]:
    """`Autoencoder.decode` by tiles, one picture after the other. What fits into one tile is decoded whole."""
    tile, scale = _units(vae, tiling), vae.config.downscale
    if max(z.shape[1:3]) <= tile:
        return jax.lax.map(lambda one: vae.decode(one[None])[0], z)
    if tiling.layout == "diffusers":
        return jax.lax.map(lambda one: _ragged(vae.decode, one[None], tile, 1, scale)[0], z)
    return jax.lax.map(lambda one: _even(vae.decode_late, vae.decode_early(one[None]), tile, 1, scale)[0], z)


def encode_tiled(vae: Autoencoder, image: Float[Array, "b H W c"], tiling: Tiling) -> LatentDistribution:
    """`Autoencoder.encode` by tiles, one picture after the other."""
    tile, scale = _units(vae, tiling), vae.config.downscale

    def one(image: Array) -> Array:
        if max(image.shape[:2]) <= tile * scale:
            return vae.encode_late(vae.encode_early(image[None]))[0]
        if tiling.layout == "diffusers":
            return _ragged(lambda x: vae.encode_late(vae.encode_early(x)), image[None], tile, scale, 1)[0]
        return vae.encode_late(_even(vae.encode_early, image[None], tile, scale, 1))[0]

    return vae.distribution(jax.lax.map(one, image))


def _units(vae: Autoencoder, tiling: Tiling) -> int:
    """Side of a tile in latent pixels."""
    tile, rest = divmod(tiling.size, vae.config.downscale)
    if rest or tile < _OVERLAP or tile % _OVERLAP:
        raise ValueError(f"a tile of {tiling.size} pixels must be a positive multiple of {_OVERLAP * vae.config.downscale} pixels")
    return tile


def _even(work: Work, x: Array, tile: int, scale_in: int, scale_out: int) -> Array:
    """`work` over equal tiles of `x` [1, h, w, c]; scales are pixels of input and output to one latent pixel."""
    sizes = [n // scale_in for n in x.shape[1:3]]
    sides = [min(tile, n) for n in sizes]
    axes = [_positions(n, side, scale_out) for n, side in zip(sizes, sides, strict=True)]
    places = [(r, c) for r in range(len(axes[0][0])) for c in range(len(axes[1][0]))]
    tops, lefts = (jnp.asarray([axes[k][0][place[k]] for place in places]) for k in (0, 1))
    rows, columns = (jnp.asarray(np.stack([axes[k][1][place[k]] for place in places])) for k in (0, 1))
    given = (1, *(side * scale_in for side in sides), x.shape[3])
    shape = jax.eval_shape(work, jax.ShapeDtypeStruct(given, x.dtype))

    def add(out: Array, item: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        top, left, row, column = item
        done = work(jax.lax.dynamic_slice(x, (0, top * scale_in, left * scale_in, 0), given)).astype(jnp.float32)
        corner = (0, top * scale_out, left * scale_out, 0)
        there = jax.lax.dynamic_slice(out, corner, shape.shape)
        return jax.lax.dynamic_update_slice(out, there + done * row[None, :, None, None] * column[None, None, :, None], corner), None

    out = jnp.zeros((1, *(n * scale_out for n in sizes), shape.shape[3]), jnp.float32)
    return jax.lax.scan(add, out, (tops, lefts, rows, columns))[0].astype(shape.dtype)


def _positions(length: int, tile: int, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Where tiles begin along one axis, in latent pixels, and the weight [tiles, pixels] of each of their output pixels.

    Neighbours overlap by a quarter tile or more; within a quarter tile around the overlap's middle one fades into the other.
    """
    overlap = tile // _OVERLAP
    count = max(1, -(-(length - overlap) // (tile - overlap)))
    starts = np.round(np.linspace(0, length - tile, count)).astype(np.int32)
    pixels = (np.arange(tile * scale) + 0.5) / scale
    weights = np.ones((count, tile * scale), np.float32)
    for i in range(count - 1):
        middle = (starts[i] + tile + starts[i + 1]) / 2
        for k, sign in ((i, -1), (i + 1, 1)):
            weights[k] *= np.clip(0.5 + sign * (pixels + starts[k] - middle) / overlap, 0, 1)
    return starts, weights


def _ragged(work: Work, x: Array, tile: int, scale_in: int, scale_out: int) -> Array:
    """diffusers' layout: its tiles, blending and cropping."""
    step = tile - tile // _OVERLAP
    starts = [range(0, n // scale_in, step) for n in x.shape[1:3]]
    side, extent, kept = tile * scale_in, tile // _OVERLAP * scale_out, step * scale_out
    cut = {
        (i, j): x[:, top * scale_in : top * scale_in + side, left * scale_in : left * scale_in + side]
        for i, top in enumerate(starts[0])
        for j, left in enumerate(starts[1])
    }
    done: dict[tuple[int, int], Array] = {}
    for shape in dict.fromkeys(t.shape for t in cut.values()):
        places = [place for place, t in cut.items() if t.shape == shape]
        done |= zip(places, jax.lax.map(work, jnp.stack([cut[place] for place in places])), strict=True)
    for i, j in sorted(done):
        if i > 0:
            done[i, j] = _faded(done[i - 1, j], done[i, j], extent, 1)
        if j > 0:
            done[i, j] = _faded(done[i, j - 1], done[i, j], extent, 2)
    rows = [jnp.concatenate([done[i, j][:, :kept, :kept] for j in range(len(starts[1]))], axis=2) for i in range(len(starts[0]))]
    return jnp.concatenate(rows, axis=1)


def _faded(before: Array, after: Array, extent: int, axis: int) -> Array:
    """`after`, whose beginning fades in over the end of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    part = functools.partial(jax.lax.slice_in_dim, axis=axis)
    shape = [1] * after.ndim
    shape[axis] = extent
    weight = (jnp.arange(extent) / extent).reshape(shape).astype(after.dtype)
    begin = part(before, before.shape[axis] - extent, None) * (1 - weight) + part(after, 0, extent) * weight
    return jnp.concatenate([begin, part(after, extent, None)], axis=axis)
