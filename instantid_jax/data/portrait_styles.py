"""The styles of a portrait: functions from a picture to a picture.

Each takes a photo [s, s, 3] float32 in 0..1 and a random generator for grain, and returns the same kind. What a style draws scales
with the picture, so that it looks alike at every size.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

__all__ = ["STYLES", "apply_style"]

_GRAY = np.array([0.299, 0.587, 0.114], np.float32)
_BLOCKS = 32  # squares of pixel art along a side
_REFERENCE = 64  # the side at which the radii below are meant


def _blur(picture: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur; the radius is in pixels of a picture of 64."""
    sigma = max(radius * len(picture) / _REFERENCE, 0.1)
    return cv2.GaussianBlur(picture, (0, 0), sigma, borderType=2)


def _photo(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return picture + random.normal(0, 0.006, picture.shape).astype(np.float32)


def _sketch(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Pencil on paper: dark where the picture is darker than its surroundings, and hatching in the shadows."""
    gray = picture @ _GRAY
    lines, fine = (np.clip((gray + 0.05) / (_blur(gray, radius) + 0.05), 0, 1) for radius in (1.6, 0.7))
    side = len(gray)
    rows, columns = np.mgrid[:side, :side] * (_REFERENCE / side)
    hatching = 0.5 + 0.5 * np.sin((rows + columns) * 2.1)
    shadow = np.clip((0.55 - gray) / 0.55, 0, 1)
    paper = 0.96 - 0.03 * random.random((side, side))
    drawn = paper * (lines * fine) ** 1.6 * (1 - 0.5 * shadow * hatching) * (1 - 0.2 * shadow)
    return (drawn[..., None] * np.array([1.0, 0.985, 0.95])).astype(np.float32)


def _noir(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Black and white film: hard contrast, dark corners, grain."""
    gray = picture @ _GRAY
    side = len(gray)
    across = np.linspace(-1, 1, side, dtype=np.float32)
    corners = 1 - 0.55 * np.clip(across[:, None] ** 2 + across[None] ** 2 - 0.25, 0, 1)
    curve = 1 / (1 + np.exp(-9 * (gray - 0.47)))
    out = (0.02 + 0.98 * curve) * corners + random.normal(0, 0.025, gray.shape)
    return np.repeat(out[..., None], 3, axis=2).astype(np.float32)


def _watercolor(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Flat washes of colour on white paper that shows at the border, with darker edges and a few brush lines."""
    side = len(picture)
    scale = side / _REFERENCE
    wobble = cv2.resize(random.normal(0, 0.35 * scale, (12, 12, 2)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    moved = cv2.remap(picture, columns + wobble[..., 0], rows + wobble[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    wash = cv2.bilateralFilter(cv2.bilateralFilter(moved, 0, 0.14, 1.5 * scale), 0, 0.10, 2.0 * scale)
    gray = moved @ _GRAY
    lines = np.clip(_blur(gray, 1.3) - gray - 0.02, 0, 0.25)[..., None] * 2.4
    rim = np.clip(np.abs(wash - _blur(wash, 1.0)).mean(-1, keepdims=True) * 1.5, 0, 0.25)
    pigment = cv2.resize(random.random((20, 20)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)[..., None]
    color = 1 - (1 - wash) * (0.80 + 0.14 * pigment)
    tone = (color @ _GRAY)[..., None]
    color = (tone + 1.3 * (color - tone)) * (1 - rim) * (1 - lines)
    across = np.abs(np.linspace(-1, 1, side, dtype=np.float32))
    border = np.maximum(across[:, None], across[None])[..., None] + 0.07 * pigment
    paper = np.clip((border - 0.92) / 0.06, 0, 1)
    return color * (1 - paper) + np.float32(0.97) * paper


def _pixel_art(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Large squares of few colours: few steps of brightness, and within one step few hues."""
    side = len(picture)
    small = cv2.resize(picture, (_BLOCKS, _BLOCKS), interpolation=cv2.INTER_AREA)
    tone = (small @ _GRAY)[..., None]
    steps = np.round(tone * 6) / 6
    tint = np.round((small - tone) * 1.2 * 10) / 10
    return cv2.resize(steps + tint, (side, side), interpolation=cv2.INTER_NEAREST)


_FUNCTIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "photo": _photo,
    "sketch": _sketch,
    "noir": _noir,
    "watercolor": _watercolor,
    "pixel art": _pixel_art,
}

STYLES = tuple(_FUNCTIONS)
"""The names that `apply_style` knows."""


def apply_style(style: str, picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The picture [s, s, 3] (float32, 0..1) in a style, as uint8."""
    drawn = _FUNCTIONS[style](picture, random)
    return (np.clip(drawn, 0, 1) * 255 + 0.5).astype(np.uint8)
