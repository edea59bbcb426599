"""What sample.py does with a picture to begin with, and with faces that are redrawn: from its options to the pipeline's calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from instantid_jax.config import ModelConfig
from instantid_jax.editing import canvas
from instantid_jax.face import FaceAnalyzer, FaceError, load_photo
from instantid_jax.face_refine import Refined, refine_face, refine_people
from instantid_jax.pipeline import InstantIDPipeline, check_call
from instantid_jax.request import Request
from instantid_jax.sample_options import SampleOptions

__all__ = ["count_calls", "initial_of", "on_initial_canvas", "refined", "unchanged"]


def on_initial_canvas(s: SampleOptions) -> SampleOptions:
    """The options with the width and height that the picture to begin with gives, where they are not given."""
    if s.init_image is None:
        return s
    width, height = canvas(load_photo(s.init_image).size, s.width, s.height, 1280, 64 if s.weights is None else None)
    return replace(s, width=width, height=height)


def initial_of(s: SampleOptions) -> dict[str, Any]:
    """The picture to begin with, its mask, and what goes with them, as the pipeline takes them; nothing where there is none."""
    if s.init_image is None or s.only_refined:
        return {}
    mask = None if s.mask_image is None else load_photo(s.mask_image)
    return {"init_image": load_photo(s.init_image), "mask_image": mask} | {
        name: getattr(s, name) for name in ("mask_blur", "keep_unmasked", "sample_mode")
    }


def unchanged(s: SampleOptions) -> list[Image.Image]:
    """The picture to begin with, as often as pictures are asked for, where nothing but its face is redrawn; else nothing."""
    return [load_photo(s.init_image)] * s.num_images if s.init_image is not None and s.only_refined else []


def count_calls(s: SampleOptions, config: ModelConfig, request: Request, runs: int) -> int:
    """Model calls that so many runs of a request take, and the second pass over their faces."""
    first = 0 if s.only_refined else request.plan.num_calls * runs
    if not s.refine_face:
        return first
    again = check_call(config, nets=1 + len(s.controlnet), **s.call() | {"strength": s.refine_strength})
    return first + again.plan.num_calls * s.num_images * runs


def refined(
    pipe: InstantIDPipeline,
    s: SampleOptions,
    call: dict[str, Any],
    images: Sequence[Image.Image],
    analyzer: FaceAnalyzer,
    on_step: Callable[[int], None],
) -> list[Image.Image]:
    """The pictures with their faces redrawn, each with its own seed. One line to stderr says of which nothing is changed, and why."""
    left_out = ("prompt", "num_images_per_prompt", "strength", "height", "width", "seed")
    same = {name: value for name, value in s.call().items() if name not in left_out}
    same |= {"margin": s.refine_margin, "feather": s.refine_feather, "strength": s.refine_strength, "on_step": on_step}
    same["control_images"] = [load_photo(path) for path in s.control_image]
    done = []
    for i, image in enumerate(images):
        seed, found = (s.seed + i) % 2**32, list[Refined | FaceError]()
        try:
            if "people" in call:
                found = refine_people(pipe, image, analyzer, call["prompt"], call["people"], seed=seed, **same)
            else:
                index = s.pose_face_index if s.only_refined else None
                found = [refine_face(pipe, image, analyzer, call["prompt"], call["image_embeds"], face_index=index, seed=seed, **same)]
        except FaceError as error:
            found = [error]
        for problem in found:
            if isinstance(problem, FaceError):
                print(f"sample.py: seed {seed}: a face is left as it is: {problem}", file=sys.stderr)
        done.append(next((one.picture for one in reversed(found) if isinstance(one, Refined)), image))
    return done
