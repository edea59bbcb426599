"""Image to image and inpainting: a picture to begin with, how much of it is changed, and where.

    latents of the picture      z_0 = scale * (mean + exp(logvar / 2) e'),    e' the picture's own draw, or 0            (1)
    strength                    of N steps the last min(int(N * strength), N) are made                                   (2)
    start                       z = add_noise(z_0, e) at the first of them; with a mask and strength 1 the noise alone   (3)
    mask, after each step       z <- m z + (1 - m) add_noise(z_0, e) at the level reached; after the last one z_0        (4)
    picture                     x <- M x + (1 - M) x_0                                                                   (5)

as diffusers' SDXL ControlNet pipelines for image to image and inpainting do with 4-channel UNets. M is the mask in pixels, with its blur;
m is M >= 1/2 at the first pixel of each latent one (of SDXL every eighth). The number of steps made is traced, so another strength,
picture or mask compiles nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image, ImageFilter

from instantid_jax.denoise import Edit, Inputs
from instantid_jax.face import FaceError, prepare_control_image
from instantid_jax.request import PipelineError, Request, check_number, check_picture

__all__ = ["SAMPLE_MODES", "STRENGTH", "Initial", "Placed", "begin", "canvas", "check_initial"]

STRENGTH = 0.8
"""How much of a picture is changed where nothing is said."""
SAMPLE_MODES = ("sample", "argmax")
"""Whether the picture's latents are drawn from the autoencoder's distribution, or are its most probable ones."""
_MOST_BLUR = 1024


class Placed(NamedTuple):
    """A picture to begin with and its mask at the size of the output."""

    picture: np.ndarray
    """[H, W, 3] float32 in [0, 1]."""
    mask: np.ndarray | None
    """[H, W] float32 in [0, 1], 1 where the picture is redrawn."""
    keep: bool
    """Whether pixels outside the mask stay what they are."""

    def finished(self, pictures: np.ndarray) -> np.ndarray:
        """Equation (5) for pictures [b, H, W, 3] in [0, 1]; where the mask is 0 the values are those of `picture`, bit for bit."""
        if self.mask is None or not self.keep:
            return pictures
        mask = self.mask[..., None]
        return np.where(mask == 0, self.picture, mask * pictures + (1 - mask) * self.picture).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Initial:
    """A checked picture to begin with; `check_initial` makes it."""

    image: Image.Image | np.ndarray
    mask: Any
    mask_blur: float
    keep: bool
    sample_mode: str

    def placed(self, request: Request, size: tuple[int, int]) -> Placed:
        """At the size (height, width) of the output: both are resized where they differ from it. Raises `PipelineError`."""
        try:
            picture = prepare_control_image(self.image, size[1], size[0])
        except FaceError as error:
            raise PipelineError(f"init_image: {error}") from error
        if self.mask is None:
            return Placed(picture, None, self.keep)
        mask = _mask(request, self.mask, size)
        if self.mask_blur > 0:
            blurred = Image.fromarray(np.round(mask * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(self.mask_blur))
            mask = np.asarray(blurred, np.float32) / np.float32(255)
        return Placed(picture, mask, self.keep)


def check_initial(
    init_image: Any, strength: Any, mask_image: Any, mask_blur: Any = 0, keep_unmasked: Any = True, sample_mode: Any = "sample"
) -> Initial | None:
    """The picture of a call that has one, by the pipeline's argument names. Raises `PipelineError`."""
    blur = check_number("mask_blur", mask_blur, 0, _MOST_BLUR)
    if not isinstance(keep_unmasked, bool):
        raise PipelineError(f"keep_unmasked must be True or False, not {keep_unmasked!r}")
    if sample_mode not in SAMPLE_MODES:
        raise PipelineError(f"sample_mode must be 'sample' or 'argmax', not {sample_mode!r}")
    if init_image is None:
        for name, value in (("strength", strength), ("mask_image", mask_image)):
            if value is not None:
                raise PipelineError(f"{name} must go with init_image, the picture that it changes")
        return None
    if blur and mask_image is None:
        raise PipelineError("mask_blur must go with mask_image, whose edge it makes soft")
    return Initial(check_picture("init_image", init_image), mask_image, blur, keep_unmasked, sample_mode)


def canvas(size: tuple[int, int], width: int | None, height: int | None, most: int, side: int | None = None) -> tuple[int, int]:
    """(width, height) of the output for a picture of ``size = (width, height)``, multiples of 8.

    Without width and height the picture's own, cut to multiples of 8, or where its long side is above `most` pixels, so many, and
    multiples of 64. With `side` the shorter side has so many. Of one of width and height the other follows.
    """
    if width and height:
        return width, height
    w, h = size
    if width or height:
        factor = width / w if width else (height or 0) / h
        return width or max(64, round(w * factor / 8) * 8), height or max(64, round(h * factor / 8) * 8)
    if side is not None:
        factor = side / min(size)
        return max(64, round(w * factor / 8) * 8), max(64, round(h * factor / 8) * 8)
    unit, factor = (64, most / max(size)) if max(size) > most else (8, 1.0)
    return max(64, round(w * factor) // unit * unit), max(64, round(h * factor) // unit * unit)


def _mask(request: Request, value: Any, size: tuple[int, int]) -> np.ndarray:
    """A mask as float32 [H, W] in [0, 1]; pictures of another size are resized with Pillow's Lanczos filter, as in diffusers."""
    if isinstance(value, Image.Image):
        picture = value.convert("L")
    else:
        own = size if len(np.shape(value)) < 2 else np.shape(value)[:2]
        array = request.mask(value, (own[0], own[1]), "mask_image")
        assert array is not None
        if array.shape == size:
            return array
        picture = Image.fromarray(np.round(array * 255).astype(np.uint8))
    if picture.size != (size[1], size[0]):
        picture = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.float32) / np.float32(255)


def begin(inputs: Inputs, request: Request, placed: Placed, encoded: Array, noise: Any) -> Inputs:
    """The inputs of a call that changes a picture, from those of one that begins with `noise` [b, h, w, c].

    `encoded` are the picture's latents, [b or 1, h, w, c]. Raises `PipelineError` for a mask that marks nothing.
    """
    noise = jnp.asarray(noise)
    image, mask, start = jnp.broadcast_to(encoded, noise.shape), None, inputs.latents
    if placed.mask is not None:
        down = placed.mask.shape[0] // noise.shape[1]
        marked = (placed.mask >= 0.5)[::down, ::down]
        if not marked.any():
            raise PipelineError(f"mask_image marks none of the latent's pixels, one in {down} x {down}; draw it larger, white where to redraw")
        mask = jnp.asarray(marked[None, :, :, None], jnp.float32)
    if mask is None or request.start > 0:
        start = request.solver.add_noise(image, noise, request.plan)
    plan = dataclasses.replace(request.whole, rows={name: request.filled(column) for name, column in request.plan.rows.items()})
    return inputs._replace(latents=start, plan=plan, edit=Edit(jnp.int32(request.plan.num_calls), image, noise, mask))
