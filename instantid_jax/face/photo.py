"""Reads photos safely and brings them to the sizes that the networks work in.

`load_photo` turns any usable file into upright 8-bit RGB and refuses everything else with one clear sentence. `resize_img` and
`prepare_control_image` are the two resizings of InstantID's published pipeline; both decide pixels, so both are exact.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from instantid_jax.face.errors import PhotoError

__all__ = ["FORMATS", "MAX_PIXELS", "MIN_SIDE", "load_photo", "prepare_control_image", "resize_img", "rgb_array", "to_rgb"]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""The file formats that are read, by content and not by file name. Of several frames the first is taken."""

MAX_PIXELS = 89_478_485
"""Width times height above which a picture is refused before it is decoded (a quarter of a gigabyte as RGB)."""

MIN_SIDE = 16
"""Sides in pixels below which a photo cannot show a face."""

MAX_ASPECT = 32
"""Long side over short side above which a photo cannot be analysed."""

# What Pillow's decoders raise for damaged files, beside OSError and ValueError.
_DECODER_ERRORS = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, MemoryError, struct.error, zlib.error)

_SIGNATURES = (
    (b"<", "a web page or XML, not a picture: the download may have failed"),
    (b"version https://git-lfs", "a Git LFS pointer, not the picture itself: fetch it with `git lfs pull`"),
    (b"GIF8", "a GIF"),
    (b"%PDF", "a PDF"),
    (b"SIMPLE  =", "a FITS file"),
)


def _describe(head: bytes) -> str:
    """What a file that is no known picture seems to be, from its first bytes."""
    for signature, meaning in _SIGNATURES:
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(signature):
            return meaning
    if head[4:8] == b"ftyp":
        return f"an {head[8:12].decode('latin-1').upper()} file (HEIC, AVIF or video)"
    return "empty" if not head else "in no known picture format"


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise PhotoError("too_large", f"{where}: {width} x {height} pixels are more than the limit of {MAX_PIXELS}; shrink the picture first")
    if min(size) < MIN_SIDE or max(size) > MAX_ASPECT * min(size):
        raise PhotoError(
            "too_small", f"{where}: {width} x {height} pixels cannot show a face; at least {MIN_SIDE} a side and at most {MAX_ASPECT}:1 is needed"
        )


def load_photo(path: str | os.PathLike[str]) -> Image.Image:
    """Reads a photo as an upright 8-bit RGB picture.

    The EXIF orientation is applied. Gray, palette, CMYK and 16-bit pictures are converted, transparency is laid on white, a
    colour profile is ignored (as in diffusers), and of an animation the first frame is taken. GIF and every format outside
    `FORMATS` is refused. Raises `PhotoError` with the file's name; a picture above `MAX_PIXELS` is refused before decoding.
    """
    path = Path(path)
    if not path.is_file():
        raise PhotoError("missing", f"{path}: there is no such file" if not path.exists() else f"{path}: is not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked right below
            with Image.open(path, formats=FORMATS) as image:
                _check_size(image.size, str(path))
                ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image, str(path))
    except PhotoError:
        raise
    except Image.DecompressionBombError as error:
        raise PhotoError("too_large", f"{path}: the picture has far more than the limit of {MAX_PIXELS} pixels; shrink it first") from error
    except UnidentifiedImageError as error:
        with path.open("rb") as file:
            kind = _describe(file.read(64))
        raise PhotoError("not_a_picture", f"{path}: the file is {kind}; save the photo as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error
    except _DECODER_ERRORS as error:
        raise PhotoError("broken", f"{path}: the picture is damaged or incomplete ({error}); save or download it again") from error


def to_rgb(image: Image.Image, where: str = "picture") -> Image.Image:
    """A Pillow picture of any mode as 8-bit RGB, transparency on white. Raises `PhotoError` for pixels of unknown range (float, 32-bit)."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise PhotoError("bad_values", f"{where}: pixels from {values.min()} to {values.max()} are neither 8- nor 16-bit; save it with 8 bits")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise PhotoError("bad_values", f"{where}: floating-point pixels have no known range; save the picture with 8 bits")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def rgb_array(image: Image.Image | np.ndarray, where: str = "photo") -> np.ndarray:
    """A picture as a uint8 [h, w, 3] RGB array of a size that can be analysed. Raises `PhotoError` for anything else."""
    pixels = np.asarray(to_rgb(image, where)) if isinstance(image, Image.Image) else np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise PhotoError(
            "bad_values", f"{where}: a photo is a Pillow picture or a uint8 RGB array [h, w, 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    _check_size((pixels.shape[1], pixels.shape[0]), where)
    return pixels


def resize_img(
    image: Image.Image, max_side: int = 1280, min_side: int = 1024, size: tuple[int, int] | None = None, pad_to_max_side: bool = False, base: int = 64
) -> Image.Image:
    """InstantID's resizing of face and pose photos: the long side becomes `max_side`, both sides multiples of `base`.

    The picture is resized twice with Pillow's bilinear filter, first in its own proportions and then to the multiples; both
    passes are needed for equal pixels. `min_side` only enters the rounding of the proportions. `size` (w, h) replaces all of
    that by one resize. `pad_to_max_side` centres the result on a white square. Raises `PhotoError` where a side would be 0.
    """
    bilinear = Image.Resampling.BILINEAR
    if size is None:
        to_min = min_side / min(image.size)
        w, h = (round(to_min * side) for side in image.size)
        to_max = max_side / max(w, h)
        w, h = round(to_max * w), round(to_max * h)
        size = (w // base * base, h // base * base)
        if min(size) > 0:
            image = image.resize((w, h), bilinear)
    if min(size) < 1:
        raise PhotoError("bad_size", f"resize_img: {image.width} x {image.height} would become {size[0]} x {size[1]}; crop the picture less narrow")
    image = image.resize(size, bilinear)
    if not pad_to_max_side:
        return image
    if max(size) > max_side:
        raise PhotoError("bad_size", f"resize_img: {size[0]} x {size[1]} does not fit on a square of {max_side}; raise max_side")
    square = Image.new("RGB", (max_side, max_side), "white")
    square.paste(image, ((max_side - size[0]) // 2, (max_side - size[1]) // 2))
    return square


def prepare_control_image(image: Image.Image | np.ndarray, width: int | None = None, height: int | None = None) -> np.ndarray:
    """A control picture (drawn keypoints, depth, edges) as float32 [h, w, 3] RGB in [0, 1], as diffusers' VaeImageProcessor gives it.

    `image` is a Pillow picture, a uint8 RGB array, or a float RGB array in [0, 1], which is never rounded to 8 bits. `width` and
    `height` default to the picture's own; both are floored to multiples of 8, and the picture is resized with Pillow's Lanczos
    filter where its size differs. Raises `PhotoError`.
    """
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "uf" or (image.dtype.kind == "u" and image.dtype != np.uint8) or image.ndim != 3 or image.shape[2] != 3:
            raise PhotoError("bad_values", f"control image: an array must be uint8 or float RGB [h, w, 3], got {image.dtype} {list(image.shape)}")
        if image.dtype != np.uint8 and not (image >= 0).all() & (image <= 1).all():
            raise PhotoError("bad_values", "control image: the values of a float array must lie in [0, 1]")
        own = (image.shape[1], image.shape[0])
    else:
        image = to_rgb(image, "control image")
        own = image.size
    across, down = own[0] if width is None else width, own[1] if height is None else height
    size = (across - across % 8, down - down % 8)
    if min(size) < 8:
        raise PhotoError("bad_size", f"control image: a size of {size[0]} x {size[1]} is below 8 x 8 pixels")
    lanczos = Image.Resampling.LANCZOS
    if isinstance(image, np.ndarray) and image.dtype != np.uint8:
        planes = [image[..., c].astype(np.float32) for c in range(3)]
        resized = planes if own == size else [np.asarray(Image.fromarray(plane).resize(size, lanczos)) for plane in planes]
        return np.clip(np.stack(resized, axis=-1), 0.0, 1.0)
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return np.asarray(picture.resize(size, lanczos), np.float32) / np.float32(255)
