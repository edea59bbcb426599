"""From a photo of any size to a picture of a fixed size, with everything that is tied to its pixels.

Positions are continuous: pixel i covers [i, i + 1). A `View` scales both axes so that the photo covers the bucket's size, then
cuts a window that keeps the face. Pixels, keypoints and boxes go through the same view, and keypoints are drawn afterwards, so
that dots and limbs are equally large in every training picture and at inference.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from instantid_jax.data.record import DataError, View
from instantid_jax.face.errors import PhotoError
from instantid_jax.face.photo import FORMATS, MAX_PIXELS, to_rgb

__all__ = ["aspect_buckets", "assign_buckets", "choose_view", "decode_photo", "move_box", "move_points", "render_view", "time_ids"]

_FACE_MARGIN = 0.15  # of the face box's sides, kept around it where the window has room


def decode_photo(data: bytes, where: str, shrink_to: int | None = None) -> Image.Image:
    """An encoded photo as an upright 8-bit RGB picture, as `face.load_photo` gives it.

    With `shrink_to` a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as both sides stay at least that many pixels,
    which saves most of the time. Raises `PhotoError` naming `where` for bytes that are no usable picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked right below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise PhotoError("too_large", f"{where}: {image.width} x {image.height} pixels are more than the limit of {MAX_PIXELS}")
            if shrink_to is not None:
                image.draft("RGB", (shrink_to, shrink_to))
            upright = ImageOps.exif_transpose(image)
            return to_rgb(upright, where)
    except PhotoError:
        raise
    except Image.UnidentifiedImageError as error:
        raise PhotoError("not_a_picture", f"{where}: {len(data)} bytes are none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything for damaged files
        raise PhotoError("broken", f"{where}: the picture is damaged or incomplete ({error})") from error


# --- aspect buckets -------------------------------------------------------------------------------------------------------


def aspect_buckets(resolution: int, step: int = 64, max_aspect: float = 2.0) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width), multiples of `step`, of at most ``resolution**2`` pixels, one for each height, by falling aspect.

    Long over short side is at most `max_aspect`. The square of `resolution` is always among them. Raises `DataError`.
    """
    if resolution < step or resolution % step:
        raise DataError(f"aspect_buckets: resolution {resolution} must be a positive multiple of step {step}")
    sizes = set()
    for long in range(resolution, int(resolution * max_aspect) + 1, step):
        short = resolution**2 // long // step * step
        if short >= step and long <= max_aspect * short:
            sizes |= {(long, short), (short, long)}
    return tuple(sorted(sizes, key=lambda size: (-size[0] / size[1], size)))


def assign_buckets(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The bucket nearest in log aspect ratio for photos of `sizes` [n, 2] (height, width): [n] int16. Reads 65,536 rows at a time."""
    aspects = np.log([h / w for h, w in buckets])
    out = np.zeros(len(sizes), np.int16)
    for start in range(0, len(sizes), 65_536):
        chunk = np.asarray(sizes[start : start + 65_536], np.float64)
        log_aspect = np.log(chunk[:, 0] / chunk[:, 1])
        out[start : start + len(chunk)] = np.abs(log_aspect[:, None] - aspects).argmin(axis=1)
    return out


# --- views ----------------------------------------------------------------------------------------------------------------


def choose_view(size: tuple[int, int], target: tuple[int, int], face_box: np.ndarray | None = None, draws: tuple[float, float] | None = None) -> View:
    """How a photo of `size` (height, width) becomes a picture of `target` (height, width).

    It is scaled until it just covers the target. The window is then placed at random by `draws` (vertical, horizontal; both in
    [0, 1)), or centred where they are None, but always so that `face_box` (x0, y0, x1, y1 in photo pixels) and some margin lie
    inside; a face that is too large for the window is centred in it.
    """
    height, width = size
    h, w = target
    scale = max(h / height, w / width)
    resized = max(round(height * scale), h), max(round(width * scale), w)
    corner = []
    for axis, (new, old, side) in enumerate(zip(resized, size, target, strict=True)):
        room = new - side
        low, high = 0, room
        if face_box is not None and room:
            start, end = (float(face_box[i]) * new / old for i in (1 - axis, 3 - axis))
            margin = min((end - start) * _FACE_MARGIN, max((side - (end - start)) / 2, 0.0))
            middle = (start + end - side) / 2
            low, high = math.ceil(min(end + margin - side, middle)), math.floor(max(start - margin, middle))
            if low > high:  # the face fills the window to the pixel
                low = high = round(middle)
            low, high = min(max(low, 0), room), min(max(high, 0), room)
        place = round(min(max(room / 2, low), high)) if draws is None else low + int(draws[axis] * (high - low + 1))
        corner.append(place)
    return View(resized[0], resized[1], corner[0], corner[1], h, w)


def move_points(points: np.ndarray, size: tuple[int, int], view: View) -> np.ndarray:
    """Positions [..., 2] (x, y) in pixels of a photo of `size` (height, width) in pixels of the view's picture; float32."""
    scale = np.array([view.resized_w / size[1], view.resized_h / size[0]])
    return (np.asarray(points, np.float64) * scale - (view.left, view.top)).astype(np.float32)


def move_box(box: np.ndarray, size: tuple[int, int], view: View) -> np.ndarray:
    """A box (x0, y0, x1, y1) in pixels of the view's picture, cut off at its edges; float32 [4]."""
    corners = move_points(np.asarray(box).reshape(2, 2), size, view)
    return np.clip(corners, 0, (view.w, view.h)).astype(np.float32).reshape(4)


def render_view(image: Image.Image, size: tuple[int, int], view: View) -> np.ndarray:
    """The view's pixels out of an upright RGB photo, uint8 [h, w, 3]; resizing is bilinear with antialiasing.

    `size` is the photo's full (height, width); `image` may be a version of it that was decoded smaller. Only the window is
    computed; it equals the same window of the whole resized photo.
    """
    x, y = image.width / view.resized_w, image.height / view.resized_h
    box = (view.left * x, view.top * y, min((view.left + view.w) * x, image.width), min((view.top + view.h) * y, image.height))
    if (image.height > image.width) != (size[0] > size[1]) and image.height != image.width and size[0] != size[1]:
        raise DataError(f"render_view: the picture is {image.height} x {image.width} pixels, the record says {size[0]} x {size[1]}; prepare it again")
    return np.asarray(image.resize((view.w, view.h), Image.Resampling.BILINEAR, box=box))


def time_ids(size: tuple[int, int], view: View) -> np.ndarray:
    """SDXL's micro-conditions: original height and width, crop top and left, target height and width; float32 [6].

    The crop is in pixels of the resized photo, as in SDXL's training.
    """
    return np.array([*size, view.top, view.left, view.h, view.w], np.float32)
