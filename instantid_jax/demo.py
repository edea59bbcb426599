"""The sheet that sample.py draws where no photo is named: people who come along, each in another pose and under several prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.defaults import PROMPTS, framed, people
from instantid_jax.face import FaceAnalyzer, Identity, load_photo
from instantid_jax.output import contact_sheet, free_path, place_in_batch, run_settings, save_contact_sheet, save_picture, suffix_of, without_folders
from instantid_jax.pipeline import InstantIDPipeline
from instantid_jax.prompts import PER_PROMPT, Asked
from instantid_jax.references import read_identity

__all__ = ["Sheet", "count_people", "demo_prompts", "demo_settings", "draw_people", "save_sheet"]

_TILE = 160


class Sheet(NamedTuple):
    """What was drawn: one row a person."""

    labels: list[str]
    """Of the prompts and seeds, one a drawn picture in a row."""
    told: list[dict[str, Any]]
    """Settings of each."""
    seeds: list[int]
    per_prompt: int
    """Pictures of each prompt, one after the other."""
    rows: list[tuple[str, Image.Image, Image.Image, list[Image.Image]]]
    """(person, reference photo, keypoint picture, drawn pictures)."""


def count_people() -> int:
    """How many people are drawn."""
    return len(people())


def demo_prompts(asked: Sequence[Asked] | None, negative_prompt: str | None) -> list[tuple[str, dict[str, Any]]]:
    """(label, settings) of what is drawn of every person: of what is `asked`, or where that is None of several prompts that show the model.

    Raises ValueError where two prompts differ in something else than texts, as all pictures of a person are one batch.
    """
    if asked is None:
        return [(label, {"prompt": prompt, "negative_prompt": negative_prompt}) for label, prompt in PROMPTS.items()]
    for name in PER_PROMPT[3:]:
        if len({getattr(one.options, name) for one in asked}) > 1:
            raise ValueError(f"{name} that differs between prompts needs one person to draw; name a photo with --face")
    if len({one.options.negative_prompt is None for one in asked}) > 1:
        raise ValueError("negative_prompt of some prompts alone needs one person to draw; name a photo with --face")
    return [(one.label or "prompt", {name: getattr(one.options, name) for name in PER_PROMPT[:3]}) for one in asked]


def draw_people(
    pipe: InstantIDPipeline,
    analyzer: FaceAnalyzer,
    call: dict[str, Any],
    prompts: Sequence[tuple[str, dict[str, Any]]],
    pose: Identity | None,
    on_step: Callable[[int], None] | None,
    only: str | None = None,
) -> Sheet:
    """Draws every person of `people()`, or the one of that name, under every prompt: detected and embedded for real, then drawn in another pose.

    `call` holds the pipeline's arguments, `prompts` are `demo_prompts`. `pose` replaces everybody's own.
    """
    count = call["num_images_per_prompt"]
    side = pipe.config.unet.sample_size * pipe.config.vae.downscale
    size = (call["width"] or side, call["height"] or side)
    rows = []
    for person in people():
        if only not in (None, person.name):
            continue
        identity = read_identity((person.photo,), lambda: analyzer, pipe.config.resampler.embedding_dim)
        points = person.pose if pose is None or pose.face is None else framed(pose.face.kps)
        keypoints = Image.fromarray(draw_keypoints(size, points * np.asarray(size, np.float32), pipe.config.keypoint_scale))
        texts = {name: [told[name] for _, told in prompts] for name in ("prompt", "negative_prompt")}
        arguments: dict[str, Any] = call | texts | {"image": [keypoints], "image_embeds": identity.embedding}
        if arguments["negative_prompt"][0] is None:
            arguments["negative_prompt"] = None
        rows.append((person.name, load_photo(person.photo), keypoints, pipe(**arguments, on_step=on_step).images))
    many = [one for one in prompts for _ in range(count)]
    seeds = [(call["seed"] + i) % 2**32 for i in range(len(many))]
    return Sheet([label for label, _ in many], [told for _, told in many], seeds, count, rows)


def save_sheet(out: Path, sheet: Sheet, settings: dict[str, Any]) -> list[Path]:
    """Every picture, and all of them beside reference and keypoints. Returns the paths, the sheet last."""
    side = sheet.rows[0][3][0].size
    settings = run_settings(side, {}, settings)
    paths: list[Path] = []
    tiles: list[tuple[str, Image.Image]] = []
    for name, photo, keypoints, pictures in sheet.rows:
        tiles += [(f"{name}: reference", photo), ("asked pose", keypoints), *zip(sheet.labels, pictures, strict=True)]
        for number, picture in enumerate(pictures):
            own = demo_settings(sheet, name, number, settings)
            paths.append(free_path(out / f"{name}_{number:02d}{suffix_of(own)}", own))
            save_picture(picture, paths[-1], own)
    whole = contact_sheet(tiles, columns=2 + len(sheet.labels), side=_TILE)
    return [*paths, save_contact_sheet(out, whole, settings)]


def demo_settings(sheet: Sheet, name: str, number: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What picture `number` of a person keeps; `settings` are all pictures'."""
    texts = {f"{kind}s": [told[kind] for told in sheet.told[:: sheet.per_prompt]] for kind in ("prompt", "negative_prompt")}
    own = {key: without_folders(value) for key, value in sheet.told[number].items()}
    return {**settings, **own, "face": name, **place_in_batch(sheet.seeds[0], number, len(sheet.told), **texts)}
