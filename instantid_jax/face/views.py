"""Five keypoints of a head that nobody photographed: a small face in three dimensions, turned, and projected.

    p = d * s * xy( R_z(roll) R_x(pitch) R_y(yaw) (P - E) ) + position

P are five points in eye distances, x to the right, y down, z towards the viewer; E is the middle of the eyes, which stays at
`position`; d is the model's usual eye distance and s the scale. Seen from the front they are the recogniser's template (`align`);
how far nose and mouth stand out is that of an average head. The projection is parallel, as of a photo taken from afar.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from instantid_jax.face.errors import KeypointError

__all__ = ["FACE_POINTS", "View", "read_view", "view_keypoints"]

FACE_POINTS = np.array([[-0.5, 0.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.57, 0.45], [-0.414, 1.155, 0.12], [0.414, 1.155, 0.12]])
"""Image-left eye, image-right eye, nose, mouth left, mouth right; the middle of the eyes is the origin."""

_RANGES = {"yaw": (-90, 90), "pitch": (-90, 90), "roll": (-180, 180), "scale": (0.1, 4), "x": (-0.5, 1.5), "y": (-0.5, 1.5)}


@dataclasses.dataclass(frozen=True)
class View:
    """How a head is seen. Raises `KeypointError` for what is out of range."""

    yaw: float = 0.0
    """Degrees; above 0 the face looks to the right of the picture."""
    pitch: float = 0.0
    """Degrees; above 0 it looks up."""
    roll: float = 0.0
    """Degrees; above 0 it leans clockwise."""
    scale: float = 1.0
    """Times the model's usual size of a face."""
    x: float | None = None
    """Where the middle of the eyes is, in parts of the picture; by default the model's usual place."""
    y: float | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise KeypointError("view", f"{name} of a view must be between {low:g} and {high:g}, not {value:g}")


def view_keypoints(view: View, eye_distance: float, place: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """The keypoints [5, 2] float32 in pixels of a picture of ``size = (width, height)``.

    `eye_distance` is the usual one in parts of the shorter side, seen from the front; `place` the usual place of the eyes' middle.
    """
    yaw, pitch, roll = (math.radians(angle) for angle in (view.yaw, view.pitch, view.roll))
    turn_y = np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
    turn_x = np.array([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]])
    turn_z = np.array([[math.cos(roll), -math.sin(roll), 0], [math.sin(roll), math.cos(roll), 0], [0, 0, 1]])
    turned = FACE_POINTS @ (turn_z @ turn_x @ turn_y).T
    middle = np.array([place[0] if view.x is None else view.x, place[1] if view.y is None else view.y]) * size
    return (turned[:, :2] * eye_distance * view.scale * min(size) + middle).astype(np.float32)


def read_view(text: str) -> View:
    """A view from ``yaw=30,pitch=-10``. Raises `KeypointError`."""
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in _RANGES or not equals or not math.isfinite(number):
            raise KeypointError("view", f"a view is written as yaw=30,pitch=-10 of {', '.join(_RANGES)}, not {text!r}")
        values[name] = number
    return View(**values)
