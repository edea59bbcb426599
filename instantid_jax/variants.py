"""One call several times with one thing changed: a sheet of prompts, of strengths or of views of a head, or a strip from one identity to others.

All of them are drawn from the same noise by the same compiled program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from instantid_jax.config import ModelConfig
from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.defaults import EYE_DISTANCE, EYES
from instantid_jax.face import FaceAnalyzer, Identity, interpolate_embeddings, read_view, view_keypoints
from instantid_jax.output import contact_sheet, free_path, place_in_batch, run_settings, save_contact_sheet, save_picture, suffix_of, without_folders
from instantid_jax.pipeline import check_call
from instantid_jax.prompts import PER_PROMPT, Asked
from instantid_jax.references import read_identity
from instantid_jax.sample_options import SampleOptions

__all__ = ["Variant", "compared_variants", "draw_variants", "prompt_variants", "save_variants", "variants_of"]

_USUAL_EYE_DISTANCE, _USUAL_EYES, _USUAL_SIDE = 0.13, (0.5, 0.42), 1024
"""Of a head and shoulders in a picture by the published weights: parts of the picture, pixels."""
_TILE = 192
_COLOURS = ("crimson", "royalblue", "darkgreen", "darkorange", "purple")


class Variant(NamedTuple):
    """One of several calls."""

    name: str
    """Of its files."""
    label: str
    """On the sheet."""
    change: dict[str, Any]
    """Arguments of the pipeline."""
    told: dict[str, Any]
    """Settings that its pictures keep in place of those that all have: what makes this one again."""
    shown: Image.Image | None = None
    """What stands above the pictures on the sheet."""


def variants_of(s: SampleOptions, config: ModelConfig, identity: Identity, analyzer: Callable[[], FaceAnalyzer]) -> list[Variant]:
    """What `--view` and `--blend` ask for; none of a plain call. Raises the face package's errors."""
    if s.view:
        side, distance, place = (64, EYE_DISTANCE, EYES) if s.weights is None else (_USUAL_SIDE, _USUAL_EYE_DISTANCE, _USUAL_EYES)
        size = s.width or s.height or side, s.height or s.width or side
        points = [view_keypoints(read_view(text), distance, place, size) for text in s.view]
        pictures = [Image.fromarray(draw_keypoints(size, kps, config.keypoint_scale)) for kps in points]
        return [Variant(f"view_{i:02d}", text, {"image": p}, {"variant": text}, p) for i, (text, p) in enumerate(zip(s.view, pictures, strict=True))]
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


def compared_variants(s: SampleOptions, config: ModelConfig) -> list[Variant]:
    """What `--compare` asks for: of each the one option that is another, and above it a strength over the steps, where it is one.

    Raises ValueError for a value that the model or the steps cannot have.
    """
    variants, usual = [], s.call()
    for i, (name, other) in enumerate(s.compared()):
        call = other.call()
        request, shown = check_call(config, nets=1 + len(s.controlnet), **call), None
        strengths = {"identitynet_scale": (request.scales[0], request.places[0]), "ip_adapter_scale": (request.ip_adapter_scale, request.places[1])}
        strength, places = strengths.get(name, (None, []))
        if strength is not None:
            shown = _curves(strength.table(request.plan.steps, places, 2 if strength.outside else 1))
        change = {key: value for key, value in call.items() if value != usual[key]}
        variants.append(Variant(f"compare_{i:02d}", s.compare[i], change, {name: getattr(other, name), "compare": ()}, shown))
    return variants


def _curves(table: np.ndarray) -> Image.Image:
    """A strength [calls, sides, 1 or layers] over the calls, from left to right; a line each for layers and sides that differ. Grey is 0 and 1."""
    picture = Image.new("RGB", (_TILE, _TILE), "white")
    low, high = min(0.0, float(table.min())), max(1.0, float(table.max()))
    draw, pad = ImageDraw.Draw(picture), 8

    def y(value: float) -> float:
        return pad + (_TILE - 2 * pad) * (high - value) / (high - low)

    for level in (0, 1):
        draw.line([(0, y(level)), (_TILE, y(level))], fill="lightgray")
    width = _TILE / len(table)
    for i, line in enumerate(np.unique(table.reshape(len(table), -1), axis=1).T):
        points = [(x, y(float(value))) for call, value in enumerate(line) for x in (call * width, (call + 1) * width)]
        draw.line(points, fill=_COLOURS[i % len(_COLOURS)], width=3)
    return picture


def draw_variants(
    draw: Callable[[dict[str, Any]], list[Image.Image]], call: Mapping[str, Any], variants: Sequence[Variant]
) -> list[list[Image.Image]]:
    """Each variant's pictures. `call` holds the pipeline's arguments; a variant's keypoint picture takes the place of its first one."""
    rows = []
    for variant in variants:
        change = dict(variant.change)
        if "image" in change:
            change["image"] = [change["image"], *call["image"][1:]]
        rows.append(draw({**call, **change}))
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
    above = any(variant.shown for variant in variants)
    blank = Image.new("RGB", (_TILE, _TILE), "white")
    tiles = [(variant.label, variant.shown or blank) for variant in variants if above]
    tiles += [(variant.label, row[i]) for i in range(len(rows[0])) for variant, row in zip(variants, rows, strict=True)]
    side = max(_TILE, 7 * max(len(variant.label) for variant in variants)) if above else _TILE
    sheet = contact_sheet(tiles, columns=columns or len(variants), side=side)
    return [*paths, save_contact_sheet(out, sheet, about)]
