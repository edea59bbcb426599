"""Control pictures by an ONNX model that the user names: depth, lines, whatever maps a picture to a picture. Keypoints: `onnx_pose`."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from instantid_jax.face.errors import import_opencv
from instantid_jax.face.photo import rgb_array

__all__ = ["SIDES", "ControlMapError", "MapKind", "OnnxMap", "check_input", "open_model", "reason", "shown"]

MapKind = Literal["depth", "image"]
SIDES = {"depth": 448, "image": 512}
"""The short side in pixels at which a model works that takes any size."""
_MULTIPLES = {"depth": 224, "image": 64}  # 14 (vision transformers) times 16 and 32 (DPT, MiDaS); downscaling of annotators

_MEAN, _STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)  # ImageNet's
_TOLERANCE = 0.1  # by which values of a picture may leave 0 to 1


class ControlMapError(ValueError):
    """A preprocessor, or a model of one, that cannot be used; the message names it and says what is needed."""


class OnnxMap:
    """A model that makes a control picture of a photo, run by onnxruntime.

    It takes [1, 3, H, W] float and has one output. `kind` says what that is: "depth", [1, H, W] or [1, 1, H, W] in any unit, larger
    where nearer as MiDaS, DPT and Depth Anything have it; "image", [1, 3 or 1, H, W] in [0, 1], as exported annotators of poses or lines.

    `invert` turns dark and bright around: for depth that is larger where it is farther, or lines that are black on white.
    `symmetric` feeds values in [-1, 1] (DPT); without it depth models get ImageNet's mean and deviation, others [0, 1].
    `side` is the short side in pixels at which a model of free sides works, by default `SIDES`; the long one follows from the
    picture, in multiples of what `side` has in common with 224 (depth) or 64. A model of fixed sides works at those.
    Raises `ControlMapError` for a file that is no such model.
    """

    def __init__(
        self, path: str | os.PathLike[str], kind: MapKind = "depth", *, side: int | None = None, invert: bool = False, symmetric: bool = False
    ) -> None:
        self.path, self.kind, self.side, self.invert, self.symmetric = Path(path), kind, side, invert, symmetric
        if kind not in get_args(MapKind):
            raise ControlMapError(f"kind must be one of {', '.join(get_args(MapKind))}, not {kind!r}")
        self._session: Any = open_model(self.path)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if (len(inputs), len(outputs)) != (1, 1):
            raise ControlMapError(
                f"{path}: has {len(inputs)} inputs and {len(outputs)} outputs; export it with one picture in and one map out "
                f"(a model of keypoints goes with pose)"
            )
        self._input = inputs[0]
        check_input(self.path, self._input)
        sides = self._input.shape[2:]
        if side is not None and all(isinstance(one, int) for one in sides) and side not in sides:
            raise ControlMapError(f"{path}: works at {sides[1]} x {sides[0]} pixels alone; leave out the side of {side}")

    def __call__(self, image: Image.Image | np.ndarray) -> Image.Image:
        """The map of a picture (Pillow, or uint8 RGB [h, w, 3]), as RGB of the same size. Raises `ControlMapError`."""
        pixels = rgb_array(image, "photo")
        size = pixels.shape[1], pixels.shape[0]
        values = self.predict(pixels)
        return self._depth(values[0], size) if self.kind == "depth" else self._picture(values, size)

    def predict(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """What the model itself gives, as float32 [channels, height, width]. Raises `ControlMapError` for another shape or NaN."""
        picture = Image.fromarray(rgb_array(image, "photo"))
        width, height = self._sides(picture.size)
        x = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), np.float32) / np.float32(255)
        if self.symmetric:
            x = x * 2 - 1
        elif self.kind == "depth":
            x = (x - _MEAN) / _STD
        element = np.float16 if "16" in self._input.type else np.float32
        try:
            (result,) = self._session.run(None, {self._input.name: x.transpose(2, 0, 1)[None].astype(element)})
        except Exception as error:  # onnxruntime's own errors share no narrower base
            advice = f"give a side that it takes, as {self.kind}:384"
            raise ControlMapError(f"{self.path}: fails on {width} x {height} pixels ({reason(error)}); {advice}") from error
        found = list(np.shape(result))
        if self.kind == "depth" and len(found) == 3 and found[0] == 1:
            result = result[None]
        channels = (1,) if self.kind == "depth" else (1, 3)
        if np.ndim(result) != 4 or np.shape(result)[0] != 1 or np.shape(result)[1] not in channels or 0 in found:
            needed = "[1, height, width] or [1, 1, height, width]" if self.kind == "depth" else "[1, 3, height, width] or [1, 1, height, width]"
            raise ControlMapError(f"{self.path}: its output has the shape {shown(found)}; {self.kind} needs {needed}")
        values = np.asarray(result[0], np.float32)
        if not np.isfinite(values).all():
            raise ControlMapError(f"{self.path}: gave values that are not finite; export it in float32, or check what it is fed with")
        return values

    def _sides(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) at which the model sees a picture of that size."""
        side = self.side or SIDES[self.kind]
        multiple = math.gcd(side, _MULTIPLES[self.kind])
        width, height = (max(multiple, round(one * side / min(size) / multiple) * multiple) for one in size)
        fixed = self._input.shape[2:]
        return (fixed[1] if isinstance(fixed[1], int) else width), (fixed[0] if isinstance(fixed[0], int) else height)

    def _depth(self, plane: np.ndarray, size: tuple[int, int]) -> Image.Image:
        """As diffusers' examples do it: bicubic to the picture's size, the whole range to 0..255, cut to whole levels."""
        cv2 = import_opencv()
        plane = cv2.resize(plane, size, interpolation=cv2.INTER_CUBIC)
        low, high = plane.min(), plane.max()
        if not high > low:
            raise ControlMapError(f"{self.path}: gave the same depth ({low:g}) everywhere; is it a depth model, and is its input right?")
        nearness = (plane - low) / (high - low)
        return _stacked(((1 - nearness if self.invert else nearness) * 255).clip(0, 255).astype(np.uint8))

    def _picture(self, values: np.ndarray, size: tuple[int, int]) -> Image.Image:
        low, high = float(values.min()), float(values.max())
        if low < -_TOLERANCE or high > 1 + _TOLERANCE:
            raise ControlMapError(f"{self.path}: gave values from {low:g} to {high:g}, and a picture's are from 0 to 1; export it with that range")
        levels = np.round(np.clip(1 - values if self.invert else values, 0, 1) * 255).astype(np.uint8)
        picture = _stacked(levels[0]) if len(levels) == 1 else Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))
        return picture.resize(size, Image.Resampling.BICUBIC)


def _stacked(levels: np.ndarray) -> Image.Image:
    """Gray levels [h, w] as RGB."""
    return Image.fromarray(np.repeat(levels[..., None], 3, axis=2))


def open_model(path: Path) -> Any:
    """onnxruntime's session of a model. Raises `ControlMapError` for a file that is none."""
    if not path.is_file():
        raise ControlMapError(f"{path}: there is no such file; name an ONNX model")
    runtime = importlib.import_module("onnxruntime")
    quiet = runtime.SessionOptions()
    quiet.log_severity_level = 3  # errors, which are raised too
    providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in runtime.get_available_providers()]
    try:
        return runtime.InferenceSession(str(path), quiet, providers=providers)
    except Exception as error:  # onnxruntime's own errors share no narrower base
        raise ControlMapError(f"{path}: cannot be loaded as an ONNX model ({reason(error)}); export or download it again") from error


def check_input(path: Path, tensor: Any) -> None:
    """Raises `ControlMapError` where a model's input is not one RGB picture of floats."""
    shape, element = list(tensor.shape), tensor.type
    if element not in ("tensor(float)", "tensor(float16)"):
        raise ControlMapError(f"{path}: its input is a {element}; export it for float pictures")
    if len(shape) != 4 or (isinstance(shape[0], int) and shape[0] != 1) or (isinstance(shape[1], int) and shape[1] != 3):
        raise ControlMapError(f"{path}: its input has the shape {shown(shape)}; needed is [1, 3, height, width], one RGB picture")


def shown(shape: Sequence[Any]) -> str:
    """A shape in words; a side that is free is a question mark."""
    return f"[{', '.join('?' if one is None else str(one) for one in shape)}]"


def reason(error: Exception) -> str:
    """The first line of what onnxruntime says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
