"""Poses by an ONNX model that gives keypoints, RTMPose's and DWPose's kind, drawn as OpenPose's pictures.

Such a model answers with two SimCC vectors for each keypoint, how likely it is at every place along x and along y. What goes
in and what comes out is mmpose's `projects/rtmpose` (the configurations and `examples/onnxruntime/main.py`).
"""

from __future__ import annotations

import colorsys
import dataclasses
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instantid_jax.face.errors import import_opencv
from instantid_jax.face.photo import rgb_array
from instantid_jax.onnx_map import ControlMapError, check_input, open_model, reason, shown

__all__ = ["PARTS", "THRESHOLD", "OnnxPose", "Pose", "draw_pose"]

PARTS = ("body", "hands", "face")
"""What of a person can be drawn."""
THRESHOLD = 0.3
"""Keypoints that score no more are not drawn."""
_PADDING = 1.25  # of the person's box
_MEAN, _STD = np.array([123.675, 116.28, 103.53], np.float32), np.array([58.395, 57.12, 57.375], np.float32)

_BODY, _WHOLE = 17, 133  # COCO's keypoints, and COCO-WholeBody's, which begin with them
_FACE, _HANDS = slice(23, 91), (slice(91, 112), slice(112, 133))
_SHOULDERS = [5, 6]
_OPENPOSE = [0, _BODY, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]  # the 18 points in COCO's numbers; the neck is put behind them
_LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7)),  # arms
    *((1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),  # legs
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),  # head
)
_COLOURS = (
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0)),
    *((0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255)),
    *((0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)),
)
_FINGERS = [(0 if joint == 0 else 4 * finger + joint, 4 * finger + joint + 1) for finger in range(5) for joint in range(4)]
_SIDE = 512  # the short side at which the widths below are pixels, as the published annotators work
_STICK, _HAND_LINE, _FACE_DOT = 4, 2, 3


@dataclasses.dataclass(frozen=True, eq=False)
class Pose:
    """The keypoints of one person in a photo."""

    points: np.ndarray
    """[k, 2], x and y in the photo's pixels; k is 17 (COCO) or 133 (COCO-WholeBody)."""
    scores: np.ndarray
    """[k], about 0 to 1."""


class OnnxPose:
    """A model of one person's keypoints, run by onnxruntime: from a photo to a pose picture.

    It takes [1, 3, H, W] float with fixed sides and gives two outputs, [1, K, r W] for x and [1, K, r H] for y, K being 17 (COCO)
    or 133 (COCO-WholeBody: feet, face and hands too): RTMPose's exports, DWPose's `dw-ll_ucoco_384.onnx`. The person's box is
    enlarged by 1.25, extended to the model's proportions and warped to H x W.

    Pixels go in as **RGB** with mean (123.675, 116.28, 103.53) and deviation (58.395, 57.12, 57.375). So the models were trained: the
    configurations of RTMPose and DWPose say `bgr_to_rgb=True` beside these numbers, and DWPose's author answers "The input is rgb"
    (IDEA-Research/DWPose, issue 25). The ONNX examples of both read the photo with `cv2.imread` and turn nothing around, which feeds BGR.

    `parts` of `PARTS` are drawn, without any all that the model gives. `box` is where the person is: left, top, right, bottom in
    parts of the photo, 0 to 1; by default all of it. **One person is read**; where a photo shows several, give the box of one.
    Raises `ControlMapError` for a file that is no such model.
    """

    def __init__(self, path: str | os.PathLike[str], *, parts: Collection[str] = (), box: Sequence[float] | None = None) -> None:
        self.path, self.parts = Path(path), tuple(part for part in PARTS if part in parts)
        if unknown := sorted(set(parts) - set(PARTS)):
            raise ControlMapError(f"pose has the parts {', '.join(PARTS)}, not {unknown[0]!r}")
        self.box = (0.0, 0.0, 1.0, 1.0) if box is None else check_box(box)
        self._session: Any = open_model(self.path)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if (len(inputs), len(outputs)) != (1, 2):
            raise ControlMapError(
                f"{path}: has {len(inputs)} inputs and {len(outputs)} outputs; pose needs one picture in and two out, SimCC along x and along y, "
                f"as RTMPose and DWPose are exported (a model that gives a picture goes with image)"
            )
        self._input = inputs[0]
        check_input(self.path, self._input)
        height, width = self._input.shape[2:]
        if not (isinstance(height, int) and isinstance(width, int)):
            raise ControlMapError(
                f"{path}: its input has the shape {shown(self._input.shape)}; export it with the height and width that it was trained at"
            )
        self.size = width, height

    def __call__(self, image: Image.Image | np.ndarray) -> Image.Image:
        """The pose in a picture (Pillow, or uint8 RGB [h, w, 3]), drawn at its size. Raises `ControlMapError`, also where nobody is found."""
        pixels = rgb_array(image, "photo")
        pose = self.predict(pixels)
        if len(pose.points) == _BODY and set(self.parts) - {"body"}:
            raise ControlMapError(f"{self.path}: gives {_BODY} points, the body alone; hands and face need a model of {_WHOLE}, as DWPose's")
        if not (pose.scores > THRESHOLD).any():
            raise ControlMapError(
                f"{self.path}: found nobody in the photo, its best keypoint scores {pose.scores.max():.2g} of at least {THRESHOLD}; "
                "take a photo that shows the person, or say where in it, as pose:0.2,0,0.7,1 (left, top, right, bottom)"
            )
        return draw_pose(pose, (pixels.shape[1], pixels.shape[0]), self.parts)

    def predict(self, image: Image.Image | np.ndarray) -> Pose:
        """The keypoints that the model finds. Raises `ControlMapError` for outputs that are no SimCC of 17 or 133 points."""
        pixels = rgb_array(image, "photo")
        centre, extent = self._frame((pixels.shape[1], pixels.shape[0]))
        zoom = self.size[0] / extent[0]
        matrix = np.array([[zoom, 0, self.size[0] / 2 - zoom * centre[0]], [0, zoom, self.size[1] / 2 - zoom * centre[1]]])
        cv2 = import_opencv()
        x = (cv2.warpAffine(pixels, matrix, self.size, flags=cv2.INTER_LINEAR).astype(np.float32) - _MEAN) / _STD
        element = np.float16 if "16" in self._input.type else np.float32
        try:
            along_x, along_y = self._session.run(None, {self._input.name: x.transpose(2, 0, 1)[None].astype(element)})
        except Exception as error:  # onnxruntime's own errors share no narrower base
            raise ControlMapError(f"{self.path}: fails on {self.size[0]} x {self.size[1]} pixels ({reason(error)}); export it again") from error
        self._check(along_x, along_y)
        along = [np.asarray(one[0], np.float32) for one in (along_x, along_y)]
        if not all(np.isfinite(one).all() for one in along):
            raise ControlMapError(f"{self.path}: gave values that are not finite; export it in float32, or check what it is fed with")
        ratio = along[0].shape[1] / self.size[0]
        places = np.stack([one.argmax(axis=1) for one in along], axis=1) / ratio
        return Pose(places / zoom + centre - extent / 2, np.minimum(along[0].max(axis=1), along[1].max(axis=1)))

    def _frame(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Centre (x, y) and extent (w, h), in pixels of a photo of that size, of what the model sees."""
        left, top, right, bottom = np.asarray(self.box) * (*size, *size)
        width, height = (right - left) * _PADDING, (bottom - top) * _PADDING
        aspect = self.size[0] / self.size[1]
        return np.array([left + right, top + bottom]) / 2, np.array([max(width, height * aspect), max(height, width / aspect)])

    def _check(self, along_x: Any, along_y: Any) -> None:
        shapes = [list(np.shape(one)) for one in (along_x, along_y)]
        given = f"{self.path}: its outputs have the shapes {shown(shapes[0])} and {shown(shapes[1])}"
        if any(len(shape) != 3 or shape[0] != 1 or 0 in shape for shape in shapes) or shapes[0][1] != shapes[1][1]:
            raise ControlMapError(f"{given}; pose needs SimCC, [1, points, places along x] and [1, points, places along y]")
        if shapes[0][1] not in (_BODY, _WHOLE):
            raise ControlMapError(f"{self.path}: gives {shapes[0][1]} points; pose knows {_BODY} (COCO) and {_WHOLE} (COCO-WholeBody)")
        if shapes[0][2] * self.size[1] != shapes[1][2] * self.size[0]:
            raise ControlMapError(f"{given}, which are not in the proportions of its input, {self.size[0]} x {self.size[1]} pixels; x is the first")


def check_box(box: Sequence[float]) -> tuple[float, float, float, float]:
    """A person's box in parts of the photo. Raises `ControlMapError`."""
    if len(box) != 4 or not all(math.isfinite(one) for one in box) or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        text = ", ".join(f"{one:g}" for one in box)
        raise ControlMapError(f"the person's box is four parts of the photo from 0 to 1, left, top, right, bottom, not {text}")
    return (float(box[0]), float(box[1]), float(box[2]), float(box[3]))


def draw_pose(pose: Pose, size: tuple[int, int], parts: Collection[str] = ()) -> Image.Image:
    """OpenPose's picture of a pose, RGB of `size` (w, h), black ground; of `PARTS` those named, without any all that there is.

    The body: 17 limbs as filled ellipses in 0.6 of their colours, and 18 points over them; the neck is the middle of the shoulders where
    both are seen. Hands: five chains of four lines in the hues of the circle, blue points. Face: white points. At a short side of 512 pixels
    sticks are 4 wide from their middle, points 4, of the face 3, hand lines 2; at other sizes in proportion, at least one. Points that
    score `THRESHOLD` or less are left out, with what hangs on them.
    """
    cv2 = import_opencv()
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    stick, line, dot = (max(1, round(width * min(size) / _SIDE)) for width in (_STICK, _HAND_LINE, _FACE_DOT))
    drawn = parts or PARTS
    if "body" in drawn:
        points = np.concatenate([pose.points[:_BODY], pose.points[_SHOULDERS].mean(axis=0, keepdims=True)])[_OPENPOSE]
        seen = np.append(pose.scores[:_BODY], pose.scores[_SHOULDERS].min())[_OPENPOSE] > THRESHOLD
        for (a, b), colour in zip(_LIMBS, _COLOURS, strict=False):
            if seen[a] and seen[b]:
                middle, (dx, dy) = (points[a] + points[b]) / 2, points[a] - points[b]
                axes, angle = (int(math.hypot(dx, dy) / 2), stick), int(math.degrees(math.atan2(dy, dx)))
                ellipse = cv2.ellipse2Poly(_whole(middle), axes, angle, 0, 360, 1)
                cv2.fillConvexPoly(canvas, ellipse, [3 * level // 5 for level in colour])
        _dots(canvas, points[seen], stick, [colour for colour, one in zip(_COLOURS, seen, strict=True) if one])
    if len(pose.points) == _BODY:
        return Image.fromarray(canvas)
    if "hands" in drawn:
        for hand in _HANDS:
            points, seen = pose.points[hand], pose.scores[hand] > THRESHOLD
            for i, (a, b) in enumerate(_FINGERS):
                if seen[a] and seen[b]:
                    colour = [round(255 * level) for level in colorsys.hsv_to_rgb(i / len(_FINGERS), 1, 1)]
                    cv2.line(canvas, _whole(points[a]), _whole(points[b]), colour, line)
            _dots(canvas, points[seen], stick, [(0, 0, 255)] * int(seen.sum()))
    if "face" in drawn:
        points = pose.points[_FACE][pose.scores[_FACE] > THRESHOLD]
        _dots(canvas, points, dot, [(255, 255, 255)] * len(points))
    return Image.fromarray(canvas)


def _dots(canvas: np.ndarray, points: np.ndarray, radius: int, colours: Sequence[Sequence[int]]) -> None:
    for point, colour in zip(points, colours, strict=True):
        import_opencv().circle(canvas, _whole(point), radius, colour, -1)


def _whole(point: np.ndarray) -> tuple[int, int]:
    """A point in whole pixels, as the published annotators cut them."""
    return int(point[0]), int(point[1])
