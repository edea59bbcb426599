"""An invisible mark that says a picture was generated, and its detector.

    python -m instantid_jax.watermark picture.png ...

Exit status: 0 all pictures are marked, 1 at least one is not, 2 a wrong option or a file that is no picture.

The key is a tile of 256 x 256 signs s, repeated over the picture from its upper left corner. With X the cosine transform of the
picture's luminance, S that of the signs, and B the coefficients from 0.04 to 0.24 cycles a pixel (what JPEG and a halving leave),

    y = inverse transform of X / (|X| + 2) on B                                                                   (1)
    f = y folded to one tile: the sum of all tiles
    z(d) = sum_i f(i + d) s(i) / sqrt(sum_i f(i)^2)                                                               (2)

Were the signs drawn anew for every picture, z would be a standard normal variable whatever the picture, so thresholds follow from
the number of places d and sizes that are tried. Marking climbs z of the picture, and of crops of it, by gradient steps inside a
sphere that keeps the asked distance from the original: mostly coefficients that were small change. It carries no message, and
whoever has this file can find the key and take the mark out: it tells the honest, it does not stop a forger.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn, idctn
from scipy.stats import norm

from instantid_jax.options import while_read

__all__ = ["FALSE_POSITIVES", "Detection", "detect_watermark", "main", "mark_picture", "strength"]

FALSE_POSITIVES = 1e-5
"""Of unmarked pictures this part at most is taken for marked, if z is normal as said above."""

TILE = 256
_BAND = (0.04, 0.24)
_FLOOR = 2.0
_SOFT = 8.0  # of (1) while marking; larger than _FLOOR so that coefficients are moved beyond what JPEG rounds away
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_SCALES = (1.0, 2.0, 0.5, 4.0, 4 / 3, 1.5, 2 / 3, 0.75)
_MAX_PIXELS = 1 << 24


class Detection(NamedTuple):
    """What was found in a picture."""

    marked: bool
    z: float
    """Of the place and size where it stands out most from its threshold."""
    threshold: float
    scale: float
    """By which the picture had to be enlarged there: 2 of one that was halved."""
    shift: tuple[int, int]
    """(rows, columns) of the tile that were cut off above and at the left."""


def strength(width: int, height: int) -> float:
    """PSNR in dB of a marked picture of this size: 36 at 64 x 64 pixels, where there is little room, to 46 at 1024 x 1024 and above."""
    return min(max(36 + 2.5 * math.log2(math.sqrt(width * height) / 64), 36), 46)


def mark_picture(image: Image.Image, psnr: float | None = None) -> Image.Image:
    """The picture in RGB with the mark. `psnr` in dB is its distance from the original, by default `strength`. Same picture, same mark."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    h, w = pixels.shape[:2]
    luma, signs = pixels @ _LUMA, _signs(h, w)
    radius = 255 * 10 ** (-(strength(w, h) if psnr is None else psnr) / 20) * math.sqrt(h * w)
    steps, crops = (100, 4) if h * w <= 1 << 15 else (8, 1)
    rng = np.random.default_rng(0)
    change, momentum = np.zeros_like(luma), np.zeros_like(luma)
    for _ in range(steps):
        marked = np.clip(luma + change, 0, 255)
        gradient = _gradient(marked, signs)
        for _ in range(crops):
            top, left, bottom, right = rng.integers(0, np.array([h, w, h, w]) // 8 + 1)
            inside = slice(top, h - bottom), slice(left, w - right)
            gradient[inside] += _gradient(marked[inside], signs[inside]) * (2 / crops)
        momentum = 0.8 * momentum + gradient
        change += momentum * (radius * max(0.1, 2 / steps) / max(float(np.linalg.norm(momentum)), 1e-9))
        change *= min(1.0, radius / max(float(np.linalg.norm(change)), 1e-9))
    return Image.fromarray(np.clip(np.round(pixels + change[..., None]), 0, 255).astype(np.uint8))


def detect_watermark(image: Image.Image) -> Detection:
    """Looks for the mark in the picture, and in it made larger or smaller by usual factors; cut off at any place."""
    width, height = image.size
    sizes = [(scale, (max(8, round(width * scale)), max(8, round(height * scale)))) for scale in _SCALES]
    sizes = [(scale, size) for scale, size in sizes if size[0] * size[1] <= max(_MAX_PIXELS, width * height)]
    found = []
    for scale, size in sizes:
        resized = image.convert("RGB") if size == image.size else image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        z = _correlations(np.asarray(resized, np.float32) @ _LUMA)
        # The whole picture, one with a little cut off, or any part of it: the more places are tried, the higher the threshold.
        for rows, columns in ((1, 1), tuple(min(TILE, max(8, side // 5)) for side in size[::-1]), (TILE, TILE)):
            part = z[:rows, :columns]
            at = np.unravel_index(int(part.argmax()), part.shape)
            threshold = float(np.asarray(norm.isf(FALSE_POSITIVES / 3 / len(sizes) / part.size)))
            shift = int(at[0]), int(at[1])
            found.append(Detection(bool(part[at] > threshold), float(part[at]), threshold, scale, shift))
    return max(found, key=lambda one: one.z - one.threshold)


@functools.cache
def _tile() -> np.ndarray:
    return np.random.default_rng(0x1D).choice(np.array([-1, 1], np.float32), size=(TILE, TILE))


def _signs(h: int, w: int) -> np.ndarray:
    return np.tile(_tile(), (-(-h // TILE), -(-w // TILE)))[:h, :w]


def _band(h: int, w: int) -> np.ndarray:
    frequency = np.hypot(np.arange(h, dtype=np.float32)[:, None] / (2 * h), np.arange(w, dtype=np.float32) / (2 * w))
    return (frequency >= _BAND[0]) & (frequency <= _BAND[1])


def _cosines(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(dctn(pixels, norm="ortho"))


def _pixels(spectrum: np.ndarray) -> np.ndarray:
    return np.asarray(idctn(spectrum, norm="ortho"))


def _gradient(luma: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Of z, up to a factor, by the pixels."""
    spectrum, wanted = _cosines(luma), _cosines(signs)
    return _pixels(_band(*luma.shape) * wanted * _SOFT / (np.abs(spectrum) + _SOFT) ** 2)


def _correlations(luma: np.ndarray) -> np.ndarray:
    """[256, 256] z for every place of the tile, equation (2)."""
    h, w = luma.shape
    spectrum = _cosines(luma)
    evened = _pixels(np.where(_band(h, w), spectrum / (np.abs(spectrum) + _FLOOR), 0))
    whole = np.zeros((-(-h // TILE) * TILE, -(-w // TILE) * TILE), np.float32)
    whole[:h, :w] = evened
    folded = whole.reshape(whole.shape[0] // TILE, TILE, -1, TILE).sum((0, 2))
    # z(d) with d the cut at the upper left: the picture's first pixel lies on the tile's d-th.
    sums = np.fft.irfft2(np.conj(np.fft.rfft2(folded)) * np.fft.rfft2(_tile()), s=(TILE, TILE))
    return sums / max(float(np.linalg.norm(folded)), 1e-9)


@while_read
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0 where all are marked, 1 where one is not, 2 where one cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m instantid_jax.watermark", description="Says which pictures carry the mark of generated ones.")
    parser.add_argument("pictures", nargs="+", type=Path, help="files of pictures")
    status = 0
    for path in parser.parse_args(arguments).pictures:
        try:
            with warnings.catch_warnings(), Image.open(path) as image:
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                found = detect_watermark(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            print(f"watermark: {path}: cannot be read as a picture ({error})", file=sys.stderr)
            status = 2
            continue
        print(f"{path}: {'marked' if found.marked else 'not marked'} (z {found.z:.1f}, threshold {found.threshold:.1f})")
        status = max(status, 0 if found.marked else 1)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
