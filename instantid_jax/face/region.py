"""Regions of a picture as masks: a box of pixels, such as a detector's face box.

The published demo's "enhance non-face region" lets IdentityNet and the image adapter act in the face box alone. Its corners are
cut to whole pixels, as there; what lies outside the picture is cut off, where the demo's mask may come out empty.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from instantid_jax.face.errors import FaceError

__all__ = ["box_mask", "check_box"]


def check_box(box: Any, where: str = "box") -> np.ndarray:
    """A box as float64 (left, top, right, bottom). Raises `FaceError` naming `where` for anything else, or one without an inside."""
    try:
        corners = np.asarray(box, np.float64)
    except (TypeError, ValueError) as error:
        raise FaceError("bad_box", f"{where}: a box is four numbers (left, top, right, bottom), not {box!r}") from error
    if corners.shape != (4,) or not np.isfinite(corners).all():
        raise FaceError("bad_box", f"{where}: a box is four finite numbers (left, top, right, bottom), not {box!r}")
    if corners[0] >= corners[2] or corners[1] >= corners[3]:
        raise FaceError("bad_box", f"{where}: the box {corners.tolist()} has no inside; left must be below right, and top below bottom")
    return corners


def box_mask(size: tuple[int, int], box: Any, where: str = "box") -> np.ndarray:
    """255 inside a box and 0 elsewhere: uint8 [height, width] for a picture of ``size = (width, height)``.

    `box` is (left, top, right, bottom) in pixels, truncated to whole ones; parts outside the picture do not count. Raises
    `FaceError` naming `where` where no pixel is left.
    """
    corners = np.clip(check_box(box, where), -(2.0**30), 2.0**30)
    left, top, right, bottom = np.clip(corners.astype(np.int64), 0, [size[0], size[1], size[0], size[1]])
    if left >= right or top >= bottom:
        raise FaceError("bad_box", f"{where}: the box {corners.round(1).tolist()} holds no whole pixel of a picture of {size[0]} x {size[1]}")
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask
