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
from instantid_jax.people_file import PeopleFile
from instantid_jax.pipeline import InstantIDPipeline, check_call
from instantid_jax.request import PipelineError, Request, check_strength
from instantid_jax.sample_options import SampleOptions

__all__ = ["calls_of_run", "drawn", "initial_of", "on_initial_canvas"]


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


def calls_of_run(s: SampleOptions, config: ModelConfig, calls: Sequence[dict[str, Any]], listed: PeopleFile | None) -> int:
    """Model calls that each of the `calls` takes, the second pass over the faces of its pictures with it.

    Each holds what `SampleOptions.call` gives. Raises ValueError for arguments, or strengths of people, that the model or one of the two
    passes cannot have.
    """
    nets = 1 + len(s.controlnet)
    checked = [check_call(config, nets=nets, **call) for call in calls]
    first = checked[0].plan.num_calls
    if _outside(checked) and not s.refine_face:
        if listed is not None:
            raise ValueError("a strength outside has no meaning with --people, each of whom acts in the own region; give strengths without")
        if s.control_mask is None and not s.enhance_non_face_region:
            raise ValueError("a strength outside needs --control-mask or --enhance-non-face-region, which says where that is")
    if not s.refine_face:
        return first
    try:
        second = [check_call(config, nets=nets, **call | {"strength": s.refine_strength}) for call in calls]
        for person in [] if listed is None else listed.people:
            check_strength("identitynet_scale", person.identitynet_scale, second[0].plan.steps, second[0].places[0])
            check_strength("ip_adapter_scale", person.ip_adapter_scale, second[0].plan.steps, second[0].places[1])
    except PipelineError as error:
        raise ValueError(f"the second pass of --refine-face: {error}") from error
    if _outside(second):
        raise ValueError("--refine-face draws a face alone, which has no outside; give strengths without")
    return (0 if s.only_refined else first) + second[0].plan.num_calls * s.num_images * (1 if listed is None else len(listed.people))


def _outside(requests: Sequence[Request]) -> bool:
    """Whether a strength says something of the outside of a mask."""
    return any(strength and strength.outside for request in requests for strength in (*request.scales, request.ip_adapter_scale))


def drawn(
    pipe: InstantIDPipeline, s: SampleOptions, analyzer: Callable[[], FaceAnalyzer], on_step: Callable[[int], None] | None, call: dict[str, Any]
) -> list[Image.Image]:
    """The pictures of a call of the pipeline, or the picture to begin with where nothing but its face is redrawn; faces redrawn if asked for."""
    kept = load_photo(s.init_image) if s.init_image is not None and s.only_refined else None
    images = pipe(**call, on_step=on_step).images if kept is None else [kept] * s.num_images
    return _refined(pipe, s, call, images, analyzer(), on_step) if s.refine_face else images


def _refined(
    pipe: InstantIDPipeline,
    s: SampleOptions,
    call: dict[str, Any],
    images: Sequence[Image.Image],
    analyzer: FaceAnalyzer,
    on_step: Callable[[int], None] | None,
) -> list[Image.Image]:
    """The pictures with their faces redrawn, each with its own seed. One line to stderr says of which nothing is changed, and why."""
    left_out = ("prompt", "num_images_per_prompt", "strength", "height", "width", "seed")
    same = {name: call[name] for name in s.call() if name not in left_out}
    same |= {"margin": s.refine_margin, "feather": s.refine_feather, "strength": s.refine_strength, "on_step": on_step}
    same["control_images"] = call["image"][-len(s.control_image) :] if s.control_image else []
    done = []
    for i, image in enumerate(images):
        seed, found = (call["seed"] + i) % 2**32, list[Refined | FaceError]()
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
