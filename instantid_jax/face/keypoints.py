"""Draws the five facial keypoints as the picture that IdentityNet looks at (InstantID, arXiv 2401.07519, section 3.3).

The networks were trained on pictures made by one OpenCV rasteriser, so it is used here too: four sticks from the eyes and
mouth corners to the nose, dimmed to 60 %, and on top five full-colour discs. Positions are truncated to whole pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from instantid_jax.face.align import check_keypoints
from instantid_jax.face.errors import KeypointError, PhotoError, import_opencv

__all__ = ["KEYPOINT_COLORS", "draw_kps", "keypoints_outside"]

KEYPOINT_COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
"""RGB of image-left eye, image-right eye, nose, mouth left, mouth right."""

_NOSE = 2
_STICKS = (0, 1, 3, 4)
_STICK_HALF_WIDTH = 4
_STICK_BRIGHTNESS = 0.6
_DISC_RADIUS = 10
_FURTHEST = 2.0**20  # beyond this OpenCV's fixed-point coordinates would overflow


def keypoints_outside(kps: np.ndarray, size: tuple[int, int]) -> int:
    """How many of the keypoints (5, 2) lie outside a picture of ``size = (width, height)``."""
    points = check_keypoints(kps)
    return int(np.count_nonzero(((points < 0) | (points >= np.asarray(size))).any(axis=1)))


def draw_kps(size: tuple[int, int], kps: np.ndarray, colors: Sequence[tuple[int, int, int]] = KEYPOINT_COLORS) -> Image.Image:
    """An RGB picture of ``size = (width, height)`` with the keypoints drawn on black, pixel for pixel as InstantID's code draws them.

    `kps` is (5, 2), in pixels of that picture; some may lie outside. Raises `KeypointError` where they have another shape, are
    not finite, or all lie outside (they then belong to a picture of another size), and `PhotoError` for a size below 1.
    """
    width, height = (int(side) for side in size)
    if width < 1 or height < 1:
        raise PhotoError("bad_size", f"draw_kps: the picture's size must be at least 1 x 1, got {width} x {height}")
    if len(colors) != 5:
        raise KeypointError("keypoints_shape", f"draw_kps: five colors are needed, got {len(colors)}")
    points = check_keypoints(kps, "draw_kps")
    if keypoints_outside(points, (width, height)) == 5 or np.abs(points).max() > _FURTHEST:
        places = points.round(1).tolist()
        raise KeypointError("keypoints_outside", f"draw_kps: the keypoints {places} do not belong to a picture of {width} x {height} pixels")

    cv2 = import_opencv()
    canvas = np.zeros((height, width, 3), np.uint8)
    for index in _STICKS:
        ends = points[[index, _NOSE]]
        dx, dy = ends[0] - ends[1]
        middle = (int(ends[:, 0].mean()), int(ends[:, 1].mean()))
        axes = (int((dx**2 + dy**2) ** 0.5 / 2), _STICK_HALF_WIDTH)
        outline = cv2.ellipse2Poly(middle, axes, int(math.degrees(math.atan2(dy, dx))), 0, 360, 1)
        cv2.fillConvexPoly(canvas, outline, colors[index])
    canvas = (canvas * _STICK_BRIGHTNESS).astype(np.uint8)
    for (x, y), color in zip(points, colors, strict=True):
        cv2.circle(canvas, (int(x), int(y)), _DISC_RADIUS, color, -1)
    return Image.fromarray(canvas)
