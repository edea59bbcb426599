"""The sheet that sample.py draws where no photo is named: people who come along, each in another pose and under several prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.defaults import PROMPTS, framed, people
from instantid_jax.face import FaceAnalyzer, Identity, load_photo
from instantid_jax.output import contact_sheet, free_path, save_png, without_folders
from instantid_jax.pipeline import InstantIDPipeline
from instantid_jax.references import read_identity

__all__ = ["Sheet", "count_people", "draw_people", "save_sheet"]

_TILE = 160


class Sheet(NamedTuple):
    """What was drawn: one row a person."""

    labels: list[str]
    """Of the prompts and seeds, one a drawn picture in a row."""
    prompts: list[str]
    seeds: list[int]
    rows: list[tuple[str, Image.Image, Image.Image, list[Image.Image]]]
    """(person, reference photo, keypoint picture, drawn pictures)."""


def count_people() -> int:
    """How many people are drawn."""
    return len(people())


def draw_people(
    pipe: InstantIDPipeline, analyzer: FaceAnalyzer, call: dict[str, Any], pose: Identity | None, on_step: Callable[[int], None]
) -> Sheet:
    """Draws every person of `people()`: detected and embedded for real, then drawn in another pose.

    `call` holds the pipeline's arguments; where its prompt is None there are several. `pose` replaces everybody's own.
    """
    chosen = PROMPTS if call["prompt"] is None else {"prompt": call["prompt"]}
    count = call["num_images_per_prompt"]
    side = pipe.config.unet.sample_size * pipe.config.vae.downscale
    size = (call["width"] or side, call["height"] or side)
    rows = []
    for person in people():
        identity = read_identity((person.photo,), lambda: analyzer, pipe.config.resampler.embedding_dim)
        points = person.pose if pose is None or pose.face is None else framed(pose.face.kps)
        keypoints = Image.fromarray(draw_keypoints(size, points * np.asarray(size, np.float32), pipe.config.keypoint_scale))
        arguments = call | {"prompt": list(chosen.values()), "image": [keypoints], "image_embeds": identity.embedding}
        if call["negative_prompt"] is not None:
            arguments["negative_prompt"] = [call["negative_prompt"]] * len(chosen)
        rows.append((person.name, load_photo(person.photo), keypoints, pipe(**arguments, on_step=on_step).images))
    many = [(label, prompt) for label, prompt in chosen.items() for _ in range(count)]
    seeds = [(call["seed"] + i) % 2**32 for i in range(len(many))]
    return Sheet([label for label, _ in many], [prompt for _, prompt in many], seeds, rows)


def save_sheet(out: Path, sheet: Sheet, settings: dict[str, Any]) -> list[Path]:
    """Every picture, and all of them beside reference and keypoints. Returns the paths, the sheet last."""
    settings = {key: without_folders(value) for key, value in settings.items()}
    paths: list[Path] = []
    tiles: list[tuple[str, Image.Image]] = []
    for name, photo, keypoints, pictures in sheet.rows:
        tiles += [(f"{name}: reference", photo), ("asked pose", keypoints), *zip(sheet.labels, pictures, strict=True)]
        for number, (picture, prompt, seed) in enumerate(zip(pictures, sheet.prompts, sheet.seeds, strict=True)):
            about = settings | {"prompt": prompt, "seed": seed, "face": name, "size": f"{picture.width}x{picture.height}"}
            paths.append(free_path(out / f"{name}_{number:02d}.png", about))
            save_png(picture, paths[-1], about)
    whole = free_path(out / "sheet.png", settings)
    save_png(contact_sheet(tiles, columns=2 + len(sheet.labels), side=_TILE), whole, settings)
    return [*paths, whole]
