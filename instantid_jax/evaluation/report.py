"""The portraits evaluation on paper: JSON, a Markdown table, a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw

from instantid_jax.evaluation.statistics import Estimate

__all__ = ["contact_sheet", "flatten", "markdown"]

_COLUMNS = {
    "gap_ratio": "gap ratio",
    "auc": "AUC",
    "retrieval_top1": "top 1",
    "retrieval_top5": "top 5",
    "cosine_same": "cosine, same",
    "cosine_other": "cosine, other",
    "detected": "detected",
    "keypoint_nme_median": "keypoint error",
    "text_control_with_identity": "text control",
}
_STRENGTHS = (0.0, 0.5, 1.0)
_TILE, _HEADER = 128, 18


def flatten(figures: Mapping[str, Estimate | None]) -> dict[str, Any]:
    """For JSON: every figure as `name` and `name_ci` [low, high]; None where there is none, or where it is not finite."""
    out: dict[str, Any] = {}
    for name, estimate in figures.items():
        values = [None] * 3 if estimate is None else [float(v) if math.isfinite(v) else None for v in estimate]
        out[name], out[f"{name}_ci"] = values[0], None if estimate is None else values[1:]
    return out


def _cell(figures: Mapping[str, Any], name: str) -> str:
    value, interval = figures.get(name), figures.get(f"{name}_ci")
    if value is None or interval is None:
        return "-"
    low, high = ("inf" if bound is None else f"{bound:.2f}" for bound in interval)
    return f"{value:.2f} [{low}, {high}]"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of what `portraits.json` holds."""
    arms, ceilings, settings = result["arms"], result["ceilings"], result["settings"]
    rows = [[name.replace("_", " "), *(_cell(figures, column) for column in _COLUMNS)] for name, figures in arms.items()]
    real = {
        "gap_ratio": "1",
        "auc": _cell(ceilings, "ceiling_auc"),
        "retrieval_top1": _cell(ceilings, "ceiling_retrieval_top1"),
        "retrieval_top5": _cell(ceilings, "ceiling_retrieval_top5"),
        "cosine_same": _cell(ceilings, "ceiling_same"),
        "cosine_other": _cell(ceilings, "ceiling_other"),
        "detected": _cell(ceilings, "ceiling_detected"),
        "keypoint_nme_median": _cell(ceilings, "keypoint_nme_ceiling"),
        "text_control_with_identity": _cell(ceilings, "ceiling_text_control"),
    }
    rows.append(["real renders", *(real[column] for column in _COLUMNS)])
    grid = [[f"IdentityNet {i:g}", *(_cell(arms.get(name, {}), "gap_ratio") for name in (_grid_name(i, a) for a in _STRENGTHS))] for i in _STRENGTHS]
    targets = [[t["target"], "met" if t["met"] else "missed"] for t in result["targets"]]
    about = (
        f"{settings['identities']} {settings['split']} people, judge {settings['judge']}, {settings['steps']} steps of {settings['sampler']}, "
        f"guidance {settings['guidance_scale']:g}, full strengths {settings['identitynet_scale']:g} (IdentityNet) and "
        f"{settings['adapter_scale']:g} (adapter), {settings['size']} pixels. In brackets: 95 % confidence intervals over people."
    )
    parts = [about, _table(["arm", *_COLUMNS.values()], rows)]
    parts += ["Gap ratio by strength:", _table(["", *(f"adapter {a:g}" for a in _STRENGTHS)], grid)]
    parts += ["Targets:", _table(["target", ""], targets)]
    return "\n\n".join(parts) + "\n"


def _grid_name(identitynet: float, adapter: float) -> str:
    corners: dict[tuple[float, float], str] = {(1, 1): "both", (1, 0): "identitynet_only", (0, 1): "adapter_only", (0, 0): "neither"}
    return corners.get((identitynet, adapter), f"grid_{identitynet:g}_{adapter:g}")


def contact_sheet(columns: Mapping[str, np.ndarray], rows: int = 12) -> Image.Image:
    """Pictures [n, s, s, 3] uint8 in titled columns, one person a row."""
    count = min(rows, *(len(pictures) for pictures in columns.values()))
    sheet = Image.new("RGB", (_TILE * len(columns), _HEADER + _TILE * count), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, pictures) in enumerate(columns.items()):
        draw.text((column * _TILE + 4, 3), title, fill="black")
        for row in range(count):
            tile = cv2.resize(pictures[row], (_TILE, _TILE), interpolation=cv2.INTER_CUBIC)
            sheet.paste(Image.fromarray(tile), (column * _TILE, _HEADER + row * _TILE))
    return sheet
