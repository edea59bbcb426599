"""Control pictures for other ControlNets, made of photos: edges by OpenCV, depth, poses and anything else by an ONNX model.

    python -m instantid_jax.control_maps canny photo.jpg --out edges.png
    python -m instantid_jax.control_maps depth photo.jpg --model depth_anything.onnx --out depth.png
    python -m instantid_jax.control_maps pose photo.jpg --model dw-ll_ucoco_384.onnx --out pose.png

A preprocessor is written as NAME or NAME:ARGUMENT,ARGUMENT:

    none                    the picture is the map already
    canny, canny:LOW,HIGH   edges, white on black; thresholds of the gradient, by default 100,200
    depth, image            a model's map (`onnx_map.OnnxMap`), with any of invert, symmetric, and a side in pixels: depth:invert,518
    pose                    a model's keypoints (`onnx_pose.OnnxPose`), drawn as OpenPose's pictures: with any of body, hands, face, which
                            alone are drawn then, and the box of the person in parts of the photo: pose:body,hands,0.2,0,0.7,1
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image

from instantid_jax.face import PhotoError, load_photo, resize_img
from instantid_jax.face.errors import import_opencv
from instantid_jax.face.photo import rgb_array
from instantid_jax.onnx_map import ControlMapError, MapKind, OnnxMap
from instantid_jax.onnx_pose import PARTS, OnnxPose, check_box
from instantid_jax.options import OptionError, status_of, while_read, wrong_options
from instantid_jax.published import did_you_mean

__all__ = [
    "NAMES",
    "ControlMapError",
    "OnnxMap",
    "OnnxPose",
    "Preprocessor",
    "canny",
    "check_preprocessors",
    "control_maps",
    "fitted",
    "read_preprocessor",
]

NAMES = ("none", "canny", "depth", "image", "pose")
_LOW, _HIGH = 100.0, 200.0  # the published demo's
_FLAGS = ("invert", "symmetric")
_SMALLEST, _LARGEST = 32, 4096


def canny(image: Image.Image | np.ndarray, low: float = _LOW, high: float = _HIGH) -> Image.Image:
    """Canny's edges of a picture (Pillow, or uint8 RGB [h, w, 3]): RGB of the same size, white on black, three equal channels.

    Where the gradient |dx| + |dy| of 3 x 3 Sobel filters, of the channel that has most, is above `high` there is an edge; it goes on
    where it is above `low`. As the published demo does it: `cv2.Canny` of the BGR pixels; the order counts where channels are equally steep.
    Raises `ControlMapError` for thresholds that are negative or in the wrong order.
    """
    if not (0 <= low <= high < math.inf):
        raise ControlMapError(f"canny: the thresholds must be numbers from 0 up, the lower one first, not {low:g} and {high:g}")
    edges = import_opencv().Canny(np.ascontiguousarray(rgb_array(image, "photo")[..., ::-1]), low, high)
    return Image.fromarray(np.repeat(edges[..., None], 3, axis=2))


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """What makes a control picture of a photo. `read_preprocessor` reads one."""

    name: str = "none"
    """One of `NAMES`."""
    thresholds: tuple[float, float] = (_LOW, _HIGH)
    """Of canny."""
    side: int | None = None
    """Of a model of depth or image, as the next two: see `OnnxMap`."""
    invert: bool = False
    symmetric: bool = False
    parts: tuple[str, ...] = ()
    """Of pose, as the next: see `OnnxPose`."""
    box: tuple[float, float, float, float] | None = None

    @property
    def kind(self) -> MapKind | Literal["pose"] | None:
        """What its model gives; None for those that have no model."""
        kinds: dict[str, MapKind | Literal["pose"]] = {"depth": "depth", "image": "image", "pose": "pose"}
        return kinds.get(self.name)

    def __call__(self, image: Image.Image, model: Path | None = None) -> Image.Image:
        """The map of a picture, of the same size, with the file of its model where it has one. Raises `ControlMapError`."""
        if self.name == "none":
            return image
        if self.kind is None:
            return canny(image, *self.thresholds)
        if model is None:
            raise ControlMapError(f"{self.name} needs an ONNX model that makes the map; name its file")
        return _opened(model, self)(image)


@functools.lru_cache(maxsize=4)
def _opened(path: Path, asked: Preprocessor) -> OnnxMap | OnnxPose:
    if asked.kind == "pose":
        return OnnxPose(path, parts=asked.parts, box=asked.box)
    assert asked.kind is not None
    return OnnxMap(path, asked.kind, side=asked.side, invert=asked.invert, symmetric=asked.symmetric)


def read_preprocessor(text: str) -> Preprocessor:
    """A preprocessor from its text (see the module). Raises `ControlMapError` that says what is wrong with it."""
    name, colon, rest = text.partition(":")
    arguments = [part.strip() for part in rest.split(",")] if colon else []
    if name not in NAMES:
        raise ControlMapError(f"there is no preprocessor {name!r}; known: {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
    if name == "none" and arguments:
        raise ControlMapError(f"{text!r}: none takes no arguments")
    if name == "canny" and arguments:
        return _read_canny(text, arguments)
    return _read_pose(text, arguments) if name == "pose" else _read_model(text, name, arguments)


def _read_canny(text: str, arguments: Sequence[str]) -> Preprocessor:
    try:
        low, high = map(float, arguments)
    except ValueError:
        raise ControlMapError(f"{text!r}: canny takes two thresholds, as canny:100,200") from None
    if not 0 <= low <= high < math.inf:
        raise ControlMapError(f"{text!r}: the thresholds must be numbers from 0 up, the lower one first")
    return Preprocessor("canny", thresholds=(low, high))


def _read_pose(text: str, arguments: Sequence[str]) -> Preprocessor:
    parts, box = [], []
    for argument in arguments:
        if argument in PARTS:
            parts.append(argument)
            continue
        with contextlib.suppress(ValueError):
            box.append(float(argument))
            continue
        if "." in argument or "/" in argument:
            raise ControlMapError(f"{text!r}: the model's file has an option of its own; here are body, hands, face, or the person's box")
        raise ControlMapError(
            f"{text!r}: pose takes body, hands, face, or four numbers, the person's box, not {argument!r}{did_you_mean(argument, PARTS)}"
        )
    try:
        return Preprocessor("pose", parts=tuple(parts), box=check_box(box) if box else None)
    except ControlMapError as error:
        raise ControlMapError(f"{text!r}: {error}") from None


def _read_model(text: str, name: str, arguments: Sequence[str]) -> Preprocessor:
    found = Preprocessor(name)
    for argument in arguments:
        if argument in _FLAGS:
            found = dataclasses.replace(found, **{argument: True})
        elif argument.isdecimal():
            found = dataclasses.replace(found, side=int(argument))
        elif "." in argument or "/" in argument:
            raise ControlMapError(f"{text!r}: the model's file has an option of its own; here are invert, symmetric, or a side in pixels")
        else:
            raise ControlMapError(f"{text!r}: {name} takes invert, symmetric, or a side in pixels, not {argument!r}{did_you_mean(argument, _FLAGS)}")
    if found.side is not None and not _SMALLEST <= found.side <= _LARGEST:
        raise ControlMapError(f"{text!r}: the side must be between {_SMALLEST} and {_LARGEST} pixels, not {found.side}")
    return found


def check_preprocessors(texts: Sequence[str], models: int, nets: int) -> list[Preprocessor]:
    """Those of the options ``--control-preprocess``, where there are so many --control-model and --controlnet. Raises `ControlMapError`."""
    if len(texts) not in (0, nets):
        raise ControlMapError(
            f"--control-preprocess has {len(texts)} values for {nets} --controlnet; give one for each (none leaves a picture alone)"
        )
    found = []
    for text in texts:
        try:
            found.append(read_preprocessor(text))
        except ControlMapError as error:
            raise ControlMapError(f"--control-preprocess: {error}") from None
    needed = sum(one.kind is not None for one in found)
    if models != needed:
        asked = f"--control-preprocess asks for {needed} (each depth, image and pose needs one, in their order)"
        raise ControlMapError(f"--control-model has {models} files, {asked}")
    return found


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A photo at the size (w, h) of the output, its sides in multiples of 8; of its own proportions with the pixels of `resize_img`."""
    size = size[0] // 8 * 8, size[1] // 8 * 8
    with contextlib.suppress(PhotoError):  # too narrow for it
        if (twice := resize_img(image, max(size))).size == size:
            return twice
    return image.resize(size, Image.Resampling.BILINEAR)


def control_maps(images: Sequence[Image.Image], texts: Sequence[str], models: Sequence[Path], size: tuple[int, int]) -> list[Image.Image]:
    """The pictures for the ControlNets: each as it is, or what its preprocessor makes of it at the output's `size` (w, h).

    `texts` are none, or one for each picture; `models` the files of those that need one, in order. Raises `ControlMapError`.
    """
    files, made = iter(models), []
    for image, one in zip(images, check_preprocessors(texts, len(models), len(images)) or [Preprocessor()] * len(images), strict=True):
        model = next(files) if one.kind else None
        made.append(image if one.name == "none" else one(fitted(image, size), model))
    return made


@dataclasses.dataclass(frozen=True)
class MapOptions:
    """Makes a control picture of a photo."""

    preprocessor: tyro.conf.Positional[
        str
    ]  # canny, canny:LOW,HIGH, depth or image with any of :invert,symmetric,SIDE, pose with any of :body,hands,face and a box.
    photo: tyro.conf.Positional[Path]  # The photo.
    model: Path | None = None  # ONNX model of depth, image or pose.
    width: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None  # Size of the map, both sides in multiples of 8; by default the photo's.
    height: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None  # Height, likewise.
    out: Path = Path("map.png")  # File of the map.


@while_read
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 1 for a file that cannot be used, 2 for a wrong option."""
    options = tyro.cli(MapOptions, args=arguments, prog="python -m instantid_jax.control_maps")
    try:
        with wrong_options():
            preprocessor = read_preprocessor(options.preprocessor)
        if (options.model is None) != (preprocessor.kind is None):
            raise OptionError(
                f"--model: {preprocessor.name} {'needs an ONNX model; name its file' if preprocessor.kind else 'has no model; leave it out'}"
            )
        if not all(side is None or 64 <= side <= 16384 for side in (options.width, options.height)):
            raise OptionError("--width and --height must be between 64 and 16384")
        if not options.out.parent.is_dir():
            raise OptionError(f"--out {options.out}: there is no folder {options.out.parent}; make it first")
        photo = load_photo(options.photo)
        if options.width or options.height:
            photo = fitted(photo, (options.width or photo.width, options.height or photo.height))
        preprocessor(photo, options.model).save(options.out)
    except (ValueError, OSError) as error:
        print(f"control_maps: {error}", file=sys.stderr)
        return status_of(error)
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
