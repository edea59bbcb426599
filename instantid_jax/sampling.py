"""From the options of sample.py to a pipeline, a checked call and what is stored in a picture: for one run and for many jobs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from instantid_jax import __version__
from instantid_jax.config import ModelConfig
from instantid_jax.defaults import DEFAULT_WEIGHTS, NOTICE, default_config, default_pipeline, framed
from instantid_jax.editing import canvas
from instantid_jax.face import FaceAnalyzer, FaceError, Identity, load_photo
from instantid_jax.face_refine import Refined, refine_face, refine_people
from instantid_jax.group import Canvas, group_of
from instantid_jax.lora import Lora
from instantid_jax.output import weights_digest
from instantid_jax.people_file import PeopleFile, read_people_file
from instantid_jax.pipeline import InstantIDPipeline, check_call, read_config
from instantid_jax.references import check_files, face_box_mask, keypoint_picture, read_mask
from instantid_jax.request import Request
from instantid_jax.sample_options import RUN_OPTIONS, SampleOptions

__all__ = [
    "conditions_of",
    "count_calls",
    "group_conditions",
    "initial_of",
    "inputs_of",
    "model_config",
    "on_initial_canvas",
    "open_pipeline",
    "read_people",
    "refined",
    "settings_of",
]

ELSEWHERE = ("num_images", "people", "face", "blend", "pose", "control_image", "control_mask", "init_image", "mask_image", *RUN_OPTIONS)
"""Options that are not stored as settings: names and hashes of the files tell them."""


def model_config(s: SampleOptions) -> ModelConfig:
    """The configuration of the weights that are named, or of the small model."""
    return default_config() if s.weights is None else read_config(s.weights)


def open_pipeline(s: SampleOptions, loras: Sequence[Lora] = ()) -> InstantIDPipeline:
    """The pipeline that the options name, with `loras` merged into its weights."""
    options: dict[str, Any] = {"dtype": s.dtype, "weights_dtype": s.weights_dtype, "loras": loras, "lora_scales": s.lora_scale}
    if s.weights is None:
        print(NOTICE, file=sys.stderr)
        return default_pipeline(**options)
    return InstantIDPipeline.from_pretrained(s.weights, controlnets=s.controlnet, **options)


def settings_of(s: SampleOptions, digest: dict[str, str] | None = None, loras: Sequence[Lora] = ()) -> dict[str, Any]:
    """What a picture keeps of its options; `digest` is the weights' where it is known already."""
    about = {"model": "the small model" if s.weights is None else s.weights.resolve().name, "version": f"instantid_jax {__version__}"}
    about |= weights_digest(s.weights or DEFAULT_WEIGHTS) if digest is None else digest
    about |= {"lora_sha256": [lora.digest for lora in loras]} if loras else {}
    return {name: value for name, value in asdict(s).items() if name not in ELSEWHERE} | about


def conditions_of(s: SampleOptions, keypoint_scale: float, pose: Identity, drawn: Image.Image | None = None) -> dict[str, Any]:
    """The pictures that go into the call: keypoints (the pose's, or those that are `drawn`), those of other ControlNets, and the mask."""
    long_side, frame = (64, framed) if s.weights is None else (1280, None)
    if s.init_image is not None and s.pose is None:
        frame = None  # the pose is where it is in the picture
    keypoints = drawn or keypoint_picture(pose, s.width, s.height, long_side, keypoint_scale, frame)
    mask = None if s.control_mask is None else read_mask(s.control_mask, keypoints.size)
    if s.enhance_non_face_region:
        mask = face_box_mask(pose, s.width, s.height, long_side, frame)
    return {"image": [keypoints, *(load_photo(path) for path in s.control_image)], "control_mask": mask}


def read_people(s: SampleOptions) -> PeopleFile | None:
    """The people file, where one is named. Raises `PhotoError` for any file of the options or of the people file that is not there."""
    check_files([*s.face, *s.blend, *s.control_image, *filter(None, (s.pose, s.control_mask, s.people, s.init_image, s.mask_image))])
    listed = None if s.people is None else read_people_file(s.people)
    check_files([] if listed is None else listed.files)
    return listed


def group_conditions(s: SampleOptions, config: ModelConfig, listed: PeopleFile, analyzer: Callable[[], FaceAnalyzer]) -> tuple[dict[str, Any], Any]:
    """The same of several people, and a picture of all their keypoints."""
    small = s.weights is None
    canvas = Canvas(s.width, s.height, 64 if small else 1024, config.keypoint_scale, framed if small else None)
    people, keypoints = group_of(listed, analyzer, config.resampler.embedding_dim, canvas)
    return {"image": [load_photo(path) for path in s.control_image], "people": people, "max_people": len(people)}, keypoints


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


def count_calls(s: SampleOptions, config: ModelConfig, request: Request, runs: int) -> int:
    """Model calls that so many runs of a request take, and the second pass over their faces."""
    first = 0 if s.only_refined else request.plan.num_calls * runs
    if not s.refine_face:
        return first
    again = check_call(config, nets=1 + len(s.controlnet), **s.call() | {"strength": s.refine_strength})
    return first + again.plan.num_calls * s.num_images


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


def inputs_of(s: SampleOptions, listed: PeopleFile | None = None) -> dict[str, Sequence[Path]]:
    """The files that go in, by what they are."""
    initial = {"init": (s.init_image,) if s.init_image else (), "redrawn": (s.mask_image,) if s.mask_image else ()}
    if listed is not None:
        poses = [listed.pose, *(person.pose for person in listed.people)]
        return {
            "people": (s.people,) if s.people else (),
            "face": [path for person in listed.people for path in person.face],
            "pose": [path for path in poses if path],
            "control": s.control_image,
            "mask": [person.mask for person in listed.people if person.mask],
        } | initial
    return {
        "face": s.face,
        "blend": s.blend,
        "pose": (s.pose,) if s.pose else (),
        "control": s.control_image,
        "mask": (s.control_mask,) if s.control_mask else (),
    } | initial
