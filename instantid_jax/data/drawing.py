"""Keypoint pictures at any size: the published drawing, and the same shapes smaller or with more points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from instantid_jax.face.align import check_keypoints
from instantid_jax.face.errors import KeypointError, import_opencv
from instantid_jax.face.keypoints import KEYPOINT_COLORS, draw_kps, keypoints_outside

__all__ = ["LANDMARK_COLOR", "draw_keypoints"]

LANDMARK_COLOR = (255, 255, 255)
"""RGB of denser landmarks, which the five keypoints cover."""

# The published shapes (`face.keypoints`), in pixels of a picture of about a thousand: half a stick's width, its share of the
# full colour, and a disc's radius. A landmark's disc is smaller, as there are many. OpenCV's filled shapes reach half a pixel
# further than they are told.
_STICK_HALF_WIDTH, _STICK_BRIGHTNESS, _DISC_RADIUS, _LANDMARK_RADIUS = 4.0, 0.6, 10.0, 3.0
_OVERHANG = 0.5
_NOSE, _STICKS = 2, (0, 1, 3, 4)
_STICK_COLORS = [tuple(round(c * _STICK_BRIGHTNESS) for c in KEYPOINT_COLORS[i]) for i in _STICKS]
_SHIFT = 4  # fractional bits of OpenCV's coordinates: a 16th of a pixel
_ANGLES = np.linspace(0.0, 2 * math.pi, 24, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


def _fixed(values: np.ndarray) -> np.ndarray:
    """Pixel positions for OpenCV, whose pixel centres are whole numbers."""
    return np.round((values - 0.5) * (1 << _SHIFT)).astype(np.int32)


def draw_keypoints(size: tuple[int, int], kps: np.ndarray, scale: float = 1.0, landmarks: np.ndarray | None = None) -> np.ndarray:
    """Keypoints [5, 2] in pixels of a picture of ``size = (width, height)``, drawn on black: uint8 [height, width, 3] RGB.

    With ``scale=1`` and no landmarks it is `draw_kps`, pixel for pixel. Any other scale multiplies stick width and disc radius,
    with soft edges and places at fractions of a pixel, for pictures much smaller than a thousand pixels. `landmarks` [n, 2] are
    drawn first, as small white discs. Raises `KeypointError` as `draw_kps` does.
    """
    if scale == 1.0 and landmarks is None:
        return np.asarray(draw_kps(size, kps))
    points = check_keypoints(kps, "draw_keypoints").astype(np.float64)
    if keypoints_outside(points, size) == 5:
        places = points.round(1).tolist()
        raise KeypointError("keypoints_outside", f"draw_keypoints: the keypoints {places} do not belong to a picture of {size[0]} x {size[1]} pixels")
    cv2 = import_opencv()
    finer = min(max(math.ceil(0.5 / scale), 1), 8)  # drawn larger and averaged, so that a disc is at least five pixels wide
    canvas = np.zeros((size[1] * finer, size[0] * finer, 3), np.uint8)
    reach = 4 * max(size)
    points, scale = np.clip(points, -reach, reach) * finer, scale * finer
    ends = points[list(_STICKS)]
    axes = ends - points[_NOSE]
    lengths = np.hypot(axes[:, 0], axes[:, 1])[:, None]
    along = np.where(lengths > 0, axes / np.maximum(lengths, 1e-9), (1.0, 0.0))
    across = along[:, ::-1] * (-1, 1) * max((_STICK_HALF_WIDTH + _OVERHANG) * scale - _OVERHANG, 0.0)
    outlines = ((ends + points[_NOSE]) / 2)[:, None] + _CIRCLE[None, :, :1] * axes[:, None] / 2 + _CIRCLE[None, :, 1:] * across[:, None]
    for outline, color in zip(_fixed(outlines), _STICK_COLORS, strict=True):
        cv2.fillConvexPoly(canvas, outline, color, cv2.LINE_8, _SHIFT)
    discs: list[tuple[np.ndarray, Sequence[tuple[int, int, int]], float]] = [(points, KEYPOINT_COLORS, _DISC_RADIUS)]
    if landmarks is not None:
        places = np.clip(np.asarray(landmarks, np.float64), -reach, reach) * finer
        discs.insert(0, (places, (LANDMARK_COLOR,) * len(places), _LANDMARK_RADIUS))
    for centers, colors, radius in discs:
        pixels = max((radius + _OVERHANG) * scale - _OVERHANG, 0.0)
        for center, color in zip(_fixed(centers).tolist(), colors, strict=True):
            cv2.circle(canvas, center, round(pixels * (1 << _SHIFT)), color, -1, cv2.LINE_8, _SHIFT)
    return canvas if finer == 1 else cv2.resize(canvas, size, interpolation=cv2.INTER_AREA)
