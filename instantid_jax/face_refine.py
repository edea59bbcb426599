"""Face refine: a second pass over a small face at the model's own size, pasted back without a seam.

    square    side = (1 + 2 margin) * the longer side of the detector's box, around the box's centre, whole pixels, moved into the picture   (1)
    enlarge   the square to the model's size, with Pillow's Lanczos filter                                                                    (2)
    redraw    image to image with the person's identity; its keypoints are those detected, moved with the square                             (3)
    shrink    back to the square, with the same filter                                                                                        (4)
    paste     x <- w y + (1 - w) x,   w = min(1, d / (feather * side)),   d the distance to the square's edge                                 (5)

A side of the square that is the picture's own edge is no edge in (5). Outside the square, and where w = 0, pixels stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.face import Face, FaceAnalyzer, FaceError, find_faces, largest_face, to_rgb
from instantid_jax.people import Person
from instantid_jax.pipeline import InstantIDPipeline, check_call
from instantid_jax.request import PipelineError, Request, check_number
from instantid_jax.strengths import multiplied

__all__ = ["FEATHER", "MARGIN", "STRENGTH", "Refined", "crop_box", "feathered", "paste", "refine_face", "refine_people"]

STRENGTH, MARGIN, FEATHER = 0.5, 0.5, 0.15
"""How much of the face is redrawn, the border around its box, and the soft part of the square's sides, where nothing is said."""
_OWN = ("image", "image_embeds", "init_image", "mask_image", "people", "height", "width", "latents", "num_images_per_prompt", "output_type")

Box = tuple[int, int, int, int]


class Refined(NamedTuple):
    """A picture whose face was redrawn."""

    picture: Image.Image
    box: Box
    """(left, top, right, bottom) of the square in pixels; outside it nothing has changed."""
    face: Face
    """As it was found before, in pixels of the picture."""


def crop_box(bbox: np.ndarray, size: tuple[int, int], margin: float = MARGIN) -> Box:
    """Equation (1): the square around a box in a picture of ``size = (width, height)``, at most as large as the picture's shorter side."""
    left, top, right, bottom = (float(v) for v in bbox)
    side = min(max(1, math.ceil(max(right - left, bottom - top) * (1 + 2 * margin))), size[0], size[1])
    corner = [round((low + high - side) / 2) for low, high in ((left, right), (top, bottom))]
    x, y = (min(max(start, 0), whole - side) for start, whole in zip(corner, size, strict=True))
    return x, y, x + side, y + side


def feathered(box: Box, size: tuple[int, int], feather: float = FEATHER) -> np.ndarray:
    """w of equation (5) for the pixels of a square: float32 [side, side]. A pixel lies at its centre."""
    side = box[2] - box[0]
    if feather == 0:
        return np.ones((side, side), np.float32)
    place = np.arange(side) + 0.5
    axes = []
    for low, high, whole in ((box[1], box[3], size[1]), (box[0], box[2], size[0])):
        before, after = np.full(side, np.inf) if low <= 0 else place, np.full(side, np.inf) if high >= whole else side - place
        axes.append(np.minimum(before, after))
    return np.minimum(1.0, np.minimum(axes[0][:, None], axes[1][None]) / (feather * side)).astype(np.float32)


def paste(picture: Image.Image, patch: Image.Image, box: Box, feather: float = FEATHER) -> Image.Image:
    """Equations (4) and (5): a redrawn square of any size back in its place in an RGB picture."""
    side = box[2] - box[0]
    weight = feathered(box, picture.size, feather)[..., None]
    small = np.asarray(patch if patch.size == (side, side) else patch.resize((side, side), Image.Resampling.LANCZOS), np.float32)
    pixels = np.array(picture)
    there = pixels[box[1] : box[3], box[0] : box[2]]
    there[:] = np.round(weight * small + (1 - weight) * there).astype(np.uint8)
    return Image.fromarray(pixels)


def refine_face(
    pipe: InstantIDPipeline,
    picture: Image.Image | np.ndarray,
    analyzer: FaceAnalyzer,
    prompt: str,
    image_embeds: Any,
    *,
    strength: float = STRENGTH,
    margin: float = MARGIN,
    feather: float = FEATHER,
    face_index: int | None = None,
    control_images: Sequence[Any] = (),
    **call: Any,
) -> Refined:
    """Redraws one face of a picture with the identity of `image_embeds`.

    Args:
        picture: PIL, or uint8 [H, W, 3].
        analyzer: finds the face (`face.load_analyzer`).
        prompt, image_embeds: as of the pipeline's call.
        strength: how much of the face is redrawn, as of the call.
        margin: border around the face's box on each side, in parts of its longer side, 0 to 4.
        feather: soft part of each side of the square, in parts of it, 0 to 0.5.
        face_index: which face, counted from 0 from the left; the largest by default.
        control_images: the whole picture's for other ControlNets; the same square of them is taken.
        call: other arguments of the call: steps, seed, strengths, sampler.

    Raises:
        FaceError: no face is found (code "no_face"), there is no such face, or it is as large as the model draws anyway ("large_face").
        PipelineError: an argument is out of range, or is one of those that follow from the face.
    """
    picture = _rgb(picture)
    faces = find_faces(analyzer, picture, name="the picture to refine")
    if face_index is not None and not 0 <= face_index < len(faces):
        raise FaceError("bad_index", f"there is no face {face_index} in the picture to refine; {len(faces)} found, counted from 0 from the left")
    face = faces[largest_face(faces) if face_index is None else face_index]
    return _refined(pipe, picture, face, prompt, image_embeds, strength, margin, feather, control_images, call)


def refine_people(
    pipe: InstantIDPipeline,
    picture: Image.Image | np.ndarray,
    analyzer: FaceAnalyzer,
    prompt: str,
    people: Sequence[Person],
    *,
    strength: float = STRENGTH,
    margin: float = MARGIN,
    feather: float = FEATHER,
    control_images: Sequence[Any] = (),
    **call: Any,
) -> list[Refined | FaceError]:
    """`refine_face` for each person of a picture whose regions are known; the last `Refined` has the picture with all of them.

    A region that is an array of another size than the picture's is resized. A face is the person's in whose region the centre of its box
    lies (of overlapping ones that with the larger weight); of several faces of one person the largest counts. For a person whose face
    is not found, or large enough already, there is the error that says so.
    """
    picture = _rgb(picture)
    request = check_call(pipe.config, prompt=prompt)
    size = picture.height, picture.width
    masks = [_region(request, person.region, picture.size) for person in people]
    owned: dict[int, Face] = {}
    for face in sorted(find_faces(analyzer, picture, name="the picture to refine"), key=lambda face: -face.area):
        x, y = np.clip(face.bbox.reshape(2, 2).mean(axis=0).astype(int), 0, (size[1] - 1, size[0] - 1))
        weights = [float(mask[y, x]) for mask in masks]
        if max(weights, default=0.0) > 0:
            owned.setdefault(int(np.argmax(weights)), face)
    done: list[Refined | FaceError] = []
    scale, own = call.pop("controlnet_conditioning_scale", 1.0), call.pop("ip_adapter_scale", pipe.ip_adapter_scale)
    for i, person in enumerate(people):
        scales = list(scale) if isinstance(scale, list | tuple) else [scale] * (1 + len(pipe.controlnets))
        strengths: dict[str, Any] = {"controlnet_conditioning_scale": [multiplied(scales[0], person.identitynet_scale), *scales[1:]]}
        strengths |= {"ip_adapter_scale": multiplied(own, person.ip_adapter_scale)}
        try:
            if i not in owned:
                raise FaceError("no_face", f"no face found in the region of person {i} (counted from 0)")
            given = prompt, person.image_embeds, strength, margin, feather, control_images, call | strengths
            refined = _refined(pipe, picture, owned[i], *given)
            picture = refined.picture
            done.append(refined)
        except FaceError as error:
            done.append(error)
    return done


def _refined(
    pipe: InstantIDPipeline,
    picture: Image.Image,
    face: Face,
    prompt: str,
    image_embeds: Any,
    strength: float,
    margin: float,
    feather: float,
    control_images: Sequence[Any],
    call: dict[str, Any],
) -> Refined:
    if own := next((name for name in _OWN if name in call), None):
        raise PipelineError(f"{own} follows from the face that is refined; leave it out")
    check_number("margin", margin, 0, 4)
    check_number("feather", feather, 0, 0.5)
    side = pipe.config.unet.sample_size * pipe.config.vae.downscale
    box = crop_box(face.bbox, picture.size, margin)
    width = box[2] - box[0]
    if width >= side:
        told = f"the face with its margin is {width} pixels wide, and the model draws {side}"
        raise FaceError("large_face", f"{told}: there is nothing to gain; give a smaller margin, or leave out the second pass")
    points = (face.kps - np.asarray(box[:2], np.float32)) * np.float32(side / width)
    keypoints = draw_keypoints((side, side), points, pipe.config.keypoint_scale)
    others = [_square(_rgb(image).resize(picture.size, Image.Resampling.LANCZOS), box, side) for image in control_images]
    enlarged = _square(picture, box, side)
    images = pipe(prompt, [keypoints, *others], image_embeds, init_image=enlarged, strength=strength, height=side, width=side, **call).images
    return Refined(paste(picture, images[0], box, feather), box, face)


def _region(request: Request, region: Any, size: tuple[int, int]) -> np.ndarray:
    """A person's region [H, W] in [0, 1] in a picture of ``size = (width, height)``."""
    shape = np.shape(region)
    mask = request.mask(region, (size[1], size[0]) if len(shape) < 2 else (shape[0], shape[1]), "region")
    if mask is None:
        raise PipelineError("region is missing; give a mask or a box")
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.BILINEAR))


def _square(picture: Image.Image, box: Box, side: int) -> Image.Image:
    """Equation (2)."""
    return picture.crop(box).resize((side, side), Image.Resampling.LANCZOS)


def _rgb(picture: Image.Image | np.ndarray) -> Image.Image:
    return to_rgb(picture if isinstance(picture, Image.Image) else Image.fromarray(picture), "the picture to refine")
