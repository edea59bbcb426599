"""From the options of sample.py to a pipeline, a checked call and what is stored in a picture: for one run and for many jobs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from instantid_jax import __version__
from instantid_jax.config import ModelConfig
from instantid_jax.control_maps import control_maps
from instantid_jax.defaults import DEFAULT_WEIGHTS, NOTICE, default_config, default_pipeline, framed
from instantid_jax.face import FaceAnalyzer, Identity, load_photo
from instantid_jax.group import Canvas, group_of
from instantid_jax.lora import Lora
from instantid_jax.output import weights_digest
from instantid_jax.people_file import PeopleFile, read_people_file
from instantid_jax.pipeline import InstantIDPipeline, read_config
from instantid_jax.references import check_files, face_box_mask, keypoint_picture, read_mask
from instantid_jax.sample_options import RUN_OPTIONS, SampleOptions

__all__ = [
    "conditions_of",
    "control_pictures",
    "face_facts",
    "group_conditions",
    "inputs_of",
    "made_maps",
    "model_config",
    "open_pipeline",
    "read_people",
    "settings_of",
]

ELSEWHERE = ("num_images", "style_file", "wildcards", "prompt_file", "people", "face", "blend", "pose", "control_image", "control_mask")
ELSEWHERE += ("control_model", "init_image", "mask_image", *RUN_OPTIONS)
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


def settings_of(s: SampleOptions, loras: Sequence[Lora] = ()) -> dict[str, Any]:
    """What a picture keeps of its options, and hashes of the weights."""
    about: dict[str, Any] = {"model": "the small model" if s.weights is None else s.weights.resolve().name}
    about |= {"version": f"instantid_jax {__version__}", "weights_sha256": weights_digest(s.weights or DEFAULT_WEIGHTS)}
    about |= {"lora_sha256": [lora.digest for lora in loras]} if loras else {}
    about |= {"controlnet_sha256": [weights_digest(folder) for folder in s.controlnet]} if s.controlnet else {}
    about |= {"analyzer_sha256": weights_digest(s.analyzer_root)} if s.analyzer_root else {}
    return {name: value for name, value in asdict(s).items() if name not in ELSEWHERE} | about


def face_facts(identity: Identity) -> dict[str, Any]:
    """What a picture keeps of a face where that is asked for: vector, keypoints and size of their photo."""
    about: dict[str, Any] = {"face_vector": [float(value) for value in identity.embedding]}
    if identity.face is not None and identity.size is not None:
        about |= {"face_keypoints": identity.face.kps.astype(float).tolist(), "face_size": list(identity.size)}
    return about


def conditions_of(s: SampleOptions, keypoint_scale: float, pose: Identity, drawn: Image.Image | None = None) -> dict[str, Any]:
    """The pictures that go into the call: keypoints (the pose's, or those that are `drawn`), those of other ControlNets, and the mask."""
    long_side, frame = (64, framed) if s.weights is None else (1280, None)
    if s.init_image is not None and s.pose is None:
        frame = None  # the pose is where it is in the picture
    keypoints = drawn or keypoint_picture(pose, s.width, s.height, long_side, keypoint_scale, frame)
    mask = None if s.control_mask is None else read_mask(s.control_mask, keypoints.size)
    if s.enhance_non_face_region:
        mask = face_box_mask(pose, s.width, s.height, long_side, frame)
    return {"image": [keypoints, *control_pictures(s, keypoints.size)], "control_mask": mask}


def control_pictures(s: SampleOptions, size: tuple[int, int]) -> list[Image.Image]:
    """The pictures of other ControlNets: maps already, or made at the output's size (w, h). Raises `ControlMapError`."""
    return control_maps([load_photo(path) for path in s.control_image], s.control_preprocess, s.control_model, size)


def made_maps(s: SampleOptions, images: Sequence[Image.Image]) -> list[tuple[str, Image.Image]]:
    """Those of a call's `images` that a preprocessor made, each with a label."""
    named = zip(s.control_preprocess, s.control_image, images[len(images) - len(s.control_image) :], strict=False)
    return [(f"{text} of {path.name}", image) for text, path, image in named if text != "none"]


def read_people(s: SampleOptions) -> PeopleFile | None:
    """The people file, where one is named. Raises `PhotoError` for any file of the options or of the people file that is not there."""
    check_files(
        [*s.face, *s.blend, *s.control_image, *s.control_model, *filter(None, (s.pose, s.control_mask, s.people, s.init_image, s.mask_image))]
    )
    listed = None if s.people is None else read_people_file(s.people)
    check_files([] if listed is None else listed.files)
    return listed


def group_conditions(s: SampleOptions, config: ModelConfig, listed: PeopleFile, analyzer: Callable[[], FaceAnalyzer]) -> tuple[dict[str, Any], Any]:
    """The same of several people, and a picture of all their keypoints."""
    small = s.weights is None
    canvas = Canvas(s.width, s.height, 64 if small else 1024, config.keypoint_scale, framed if small else None)
    people, keypoints = group_of(listed, analyzer, config.resampler.embedding_dim, canvas)
    return {"image": control_pictures(s, keypoints.size), "people": people, "max_people": len(people)}, keypoints


def inputs_of(s: SampleOptions, listed: PeopleFile | None = None) -> dict[str, Sequence[Path]]:
    """The files that go in, by what they are."""
    initial: dict[str, Sequence[Path]] = {"init": (s.init_image,) if s.init_image else (), "redrawn": (s.mask_image,) if s.mask_image else ()}
    if listed is not None:
        poses = [listed.pose, *(person.pose for person in listed.people)]
        return {
            "people": (s.people,) if s.people else (),
            "face": [path for person in listed.people for path in person.face],
            "pose": [path for path in poses if path],
            "control": s.control_image,
            "preprocessor": s.control_model,
            "mask": [person.mask for person in listed.people if person.mask],
        } | initial
    return {
        "face": s.face,
        "blend": s.blend,
        "pose": (s.pose,) if s.pose else (),
        "control": s.control_image,
        "preprocessor": s.control_model,
        "mask": (s.control_mask,) if s.control_mask else (),
    } | initial
