"""Keypoint pictures at any size: the published drawing, and the same shapes smaller or with more points."""

from __future__ import annotations

import math

import numpy as np

from instantid_jax.face.align import check_keypoints
from instantid_jax.face.errors import KeypointError, import_opencv
from instantid_jax.face.keypoints import KEYPOINT_COLORS, draw_kps, keypoints_outside

__all__ = ["LANDMARK_COLOR", "draw_keypoints"]

LANDMARK_COLOR = (255, 255, 255)
"""RGB of denser landmarks, which the five keypoints cover."""

# The published shapes (`face.keypoints`), in pixels of a picture of about a thousand: half a stick's width, its share of the
# full colour, and a disc's radius. A landmark's disc is smaller, as there are many.
_STICK_HALF_WIDTH, _STICK_BRIGHTNESS, _DISC_RADIUS, _LANDMARK_RADIUS = 4.0, 0.6, 10.0, 3.0
_NOSE, _STICKS = 2, (0, 1, 3, 4)
_SHIFT = 4  # fractional bits of OpenCV's coordinates: a 16th of a pixel
_ANGLES = np.linspace(0.0, 2 * math.pi, 24, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


def _fixed(values: np.ndarray) -> np.ndarray:
    """Pixel positions for OpenCV, whose pixel centres are whole numbers."""
    return np.round((values - 0.5) * (1 << _SHIFT)).astype(np.int32)


def draw_keypoints(size: tuple[int, int], kps: np.ndarray, scale: float = 1.0, landmarks: np.ndarray | None = None) -> np.ndarray:
    """Keypoints [5, 2] in pixels of a picture of ``size = (width, height)``, drawn on black: uint8 [height, width, 3] RGB.

    With ``scale=1`` and no landmarks it is `draw_kps`, pixel for pixel. Any other scale multiplies stick width and disc radius
    and draws them anti-aliased at fractions of a pixel, for pictures much smaller than a thousand pixels. `landmarks` [n, 2] are
    drawn first, as small white discs. Raises `KeypointError` as `draw_kps` does.
    """
    if scale == 1.0 and landmarks is None:
        return np.asarray(draw_kps(size, kps))
    width, height = size
    points = check_keypoints(kps, "draw_keypoints").astype(np.float64)
    if keypoints_outside(points, size) == 5:
        places = points.round(1).tolist()
        raise KeypointError("keypoints_outside", f"draw_keypoints: the keypoints {places} do not belong to a picture of {width} x {height} pixels")
    cv2 = import_opencv()
    canvas = np.zeros((height, width, 3), np.uint8)
    points = np.clip(points, -4 * width - 4 * height, 4 * width + 4 * height)
    for i in _STICKS:
        axis = points[i] - points[_NOSE]
        length = math.hypot(*axis)
        along = axis / length if length > 0 else np.array([1.0, 0.0])
        across = np.array([-along[1], along[0]]) * _STICK_HALF_WIDTH * scale
        outline = (points[i] + points[_NOSE]) / 2 + _CIRCLE[:, :1] * axis / 2 + _CIRCLE[:, 1:] * across
        color = tuple(round(c * _STICK_BRIGHTNESS) for c in KEYPOINT_COLORS[i])
        cv2.fillConvexPoly(canvas, _fixed(outline), color, cv2.LINE_AA, _SHIFT)
    discs = [] if landmarks is None else [(point, LANDMARK_COLOR, _LANDMARK_RADIUS) for point in landmarks]
    discs += [(point, color, _DISC_RADIUS) for point, color in zip(points, KEYPOINT_COLORS, strict=True)]
    for point, color, radius in discs:
        x, y = _fixed(point).tolist()
        cv2.circle(canvas, (x, y), max(round(radius * scale * (1 << _SHIFT)), 1), color, -1, cv2.LINE_AA, _SHIFT)
    return canvas
