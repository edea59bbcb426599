"""The styles of a portrait: functions from a picture to a picture.

Each takes a photo [s, s, 3] float32 in 0..1 and a random generator for grain, and returns the same kind. What a style draws scales
with the picture, so that it looks alike at every size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from instantid_jax.face.errors import import_opencv

__all__ = ["STYLES", "apply_style"]

_GRAY = np.array([0.299, 0.587, 0.114], np.float32)
_REFERENCE = 64  # the side at which the radii below are meant


def _blur(picture: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur; the radius is in pixels of a picture of 64."""
    sigma = max(radius * len(picture) / _REFERENCE, 0.1)
    return import_opencv().GaussianBlur(picture, (0, 0), sigma, borderType=2)


def _photo(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return picture + random.normal(0, 0.006, picture.shape).astype(np.float32)


def _sketch(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Pencil on paper: dark where the picture is darker than its surroundings, and hatching in the shadows."""
    gray = picture @ _GRAY
    lines = np.clip(gray / (_blur(gray, 1.6) + 0.04), 0, 1)
    fine = np.clip(gray / (_blur(gray, 0.7) + 0.04), 0, 1)
    side = len(gray)
    rows, columns = np.mgrid[:side, :side] * (_REFERENCE / side)
    hatching = 0.5 + 0.5 * np.sin((rows + columns) * 2.1)
    shadow = np.clip((0.55 - gray) / 0.55, 0, 1)
    paper = 0.96 - 0.03 * random.random((side, side))
    drawn = paper * (lines * fine) ** 1.6 * (1 - 0.55 * shadow * hatching) * (1 - 0.25 * shadow)
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
    """Flat washes of colour that darken at their edges, on white paper that shows at the border."""
    cv2 = import_opencv()
    side = len(picture)
    wobble = cv2.resize(random.normal(0, 1, (10, 10, 2)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC) * (0.8 * side / _REFERENCE)
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    wash = cv2.remap(picture, columns + wobble[..., 0], rows + wobble[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    for _ in range(2):
        wash = cv2.bilateralFilter(wash, 0, 0.16, 1.6 * side / _REFERENCE)
    soft = _blur(wash, 1.2)
    edge = np.clip(np.abs(wash - soft).mean(-1, keepdims=True) * 2.2, 0, 0.35)
    pigment = cv2.resize(random.random((24, 24)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)[..., None]
    color = 1 - (1 - wash) * (0.66 + 0.28 * pigment)
    gray = color @ _GRAY
    color = gray[..., None] + 1.25 * (color - gray[..., None])
    across = np.abs(np.linspace(-1, 1, side, dtype=np.float32))
    border = np.maximum(across[:, None], across[None])[..., None] + 0.10 * pigment
    paper = np.clip((border - 0.90) / 0.08, 0, 1)
    return (color * (1 - edge)) * (1 - paper) + np.float32(0.97) * paper


def _pixel_art(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Large squares of few colours."""
    cv2 = import_opencv()
    side = len(picture)
    small = cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA)
    gray = (small @ _GRAY)[..., None]
    vivid = gray + 1.35 * (small - gray)
    few = np.round(np.clip(vivid, 0, 1) * 5) / 5
    return cv2.resize(few, (side, side), interpolation=cv2.INTER_NEAREST)


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
