"""One call several times with one thing changed: a sheet of prompts or of views of a head, or a strip from one identity to others.

All of them are drawn from the same noise by the same compiled program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from instantid_jax.config import ModelConfig
from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.defaults import EYE_DISTANCE, EYES
from instantid_jax.face import FaceAnalyzer, Identity, interpolate_embeddings, read_view, view_keypoints
from instantid_jax.output import contact_sheet, free_path, place_in_batch, run_settings, save_contact_sheet, save_picture, suffix_of, without_folders
from instantid_jax.pipeline import InstantIDPipeline
from instantid_jax.prompts import PER_PROMPT, Asked
from instantid_jax.references import read_identity
from instantid_jax.sample_options import SampleOptions

__all__ = ["Variant", "draw_variants", "prompt_variants", "save_variants", "variants_of"]

_USUAL_EYE_DISTANCE, _USUAL_EYES, _USUAL_SIDE = 0.13, (0.5, 0.42), 1024
"""Of a head and shoulders in a picture by the published weights: parts of the picture, pixels."""
_TILE = 192


class Variant(NamedTuple):
    """One of several calls."""

    name: str
    """Of its files."""
    label: str
    """On the sheet."""
    change: dict[str, Any]
    """Arguments of the pipeline."""
    told: dict[str, Any]
    """Settings that its pictures keep beside those that all have."""


def variants_of(s: SampleOptions, config: ModelConfig, identity: Identity, analyzer: Callable[[], FaceAnalyzer]) -> list[Variant]:
    """What `--view` and `--blend` ask for; none of a plain call. Raises the face package's errors."""
    if s.view:
        side, distance, place = (64, EYE_DISTANCE, EYES) if s.weights is None else (_USUAL_SIDE, _USUAL_EYE_DISTANCE, _USUAL_EYES)
        size = s.width or s.height or side, s.height or s.width or side
        points = [view_keypoints(read_view(text), distance, place, size) for text in s.view]
        pictures = [Image.fromarray(draw_keypoints(size, kps, config.keypoint_scale)) for kps in points]
        told = [{"variant": text} for text in s.view]
        return [Variant(f"view_{i:02d}", text, {"image": picture}, told[i]) for i, (text, picture) in enumerate(zip(s.view, pictures, strict=True))]
    if not s.blend:
        return []
    others = [read_identity((path,), analyzer, config.resampler.embedding_dim).embedding for path in s.blend]
    blended = interpolate_embeddings(np.stack([identity.embedding, *others]), s.blend_steps, s.blend_how)
    labels = [f"{place:.2f}" for place in np.linspace(0, len(others), s.blend_steps)]
    return [Variant(f"blend_{i:02d}", label, {"image_embeds": blended[i]}, {"variant": label}) for i, label in enumerate(labels)]


def prompt_variants(asked: Sequence[Asked]) -> list[Variant]:
    """One for each prompt where there are several; none of a plain call. The first one's options are everybody's, but for what differs."""
    if len(asked) < 2:
        return []
    common, variants = asked[0].options, []
    first = common.call()
    for i, (label, options) in enumerate(asked):
        change = {name: value for name, value in options.call().items() if value != first[name]}
        told = {name: getattr(options, name) for name in PER_PROMPT if getattr(options, name) != getattr(common, name)}
        variants.append(Variant(f"prompt_{i:02d}", label, change, told))
    return variants


def draw_variants(
    pipe: InstantIDPipeline, call: Mapping[str, Any], variants: Sequence[Variant], on_step: Callable[[int], None]
) -> list[list[Image.Image]]:
    """Each variant's pictures. `call` holds the pipeline's arguments; a variant's keypoint picture takes the place of its first one."""
    rows = []
    for variant in variants:
        change = dict(variant.change)
        if "image" in change:
            change["image"] = [change["image"], *call["image"][1:]]
        rows.append(pipe(**{**call, **change}, on_step=on_step).images)
    return rows


def save_variants(
    out: Path,
    variants: Sequence[Variant],
    rows: Sequence[Sequence[Image.Image]],
    inputs: Mapping[str, Sequence[Path]],
    settings: Mapping[str, Any],
    columns: int | None = None,
) -> list[Path]:
    """Every picture with its settings inside, and a sheet with `columns` (one for each variant). Returns the paths, the sheet last."""
    about, paths = run_settings(rows[0][0].size, inputs, settings), []
    for variant, pictures in zip(variants, rows, strict=True):
        for i, picture in enumerate(pictures):
            own = about | {name: without_folders(value) for name, value in variant.told.items()}
            own |= place_in_batch(own["seed"], i, len(pictures))
            paths.append(free_path(out / f"{variant.name}_{own['seed']:06d}{suffix_of(own)}", own))
            save_picture(picture, paths[-1], own)
    tiles = [(variant.label, variant.change["image"]) for variant in variants if "image" in variant.change]
    tiles += [(variant.label, row[i]) for i in range(len(rows[0])) for variant, row in zip(variants, rows, strict=True)]
    sheet = contact_sheet(tiles, columns=columns or len(variants), side=_TILE)
    return [*paths, save_contact_sheet(out, sheet, about)]
