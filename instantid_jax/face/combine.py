"""From the embeddings of several photos of one person to one, and what each photo counted for; and from one person to another.

    mean         sum_i w_i e_i, raw embeddings, the paper's way (arXiv 2401.07519)
    normalised   the same of unit vectors, at the photos' mean length: no photo counts more because its vector is long
    trimmed      the mean of those photos whose similarity to the rest is no outlier

The weights w_i sum to 1. The similarity of a photo to the rest is the cosine of its embedding and the mean of the others' unit
vectors; it is an outlier where it lies below the median by more than three robust standard deviations, and by more than 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from instantid_jax.face.errors import EmbeddingError

__all__ = ["COMBINATIONS", "Combination", "Combined", "Interpolation", "combine_embeddings", "interpolate_embeddings"]

Combination = Literal["mean", "normalised", "trimmed"]
Interpolation = Literal["linear", "spherical"]
COMBINATIONS: tuple[Combination, ...] = ("mean", "normalised", "trimmed")
_SPREADS, _SIGMA, _FURTHER = 3.0, 1.4826, 0.1


class Combined(NamedTuple):
    """One person of k photos."""

    embedding: np.ndarray
    """(d,) float64."""
    weights: np.ndarray
    """(k,) how much each photo counted; they sum to 1, and are 0 for what was left out."""
    similarities: np.ndarray
    """(k,) cosine of each photo with the rest; NaN of a single photo."""


def combine_embeddings(embeddings: np.ndarray, how: Combination = "mean", weights: Sequence[float] | None = None) -> Combined:
    """Combines raw embeddings (k, d), none of them zero. `weights` are positive numbers of any sum; all equal by default.

    Raises `EmbeddingError` for another `how`, and for weights that are not one positive number for each photo.
    """
    raw = np.asarray(embeddings, np.float64)
    if how not in COMBINATIONS:
        raise EmbeddingError("combination", f"photos are combined by {', '.join(COMBINATIONS)}, not {how!r}")
    given = np.ones(len(raw)) if weights is None else np.asarray(weights, np.float64)
    if given.shape != (len(raw),) or not (np.isfinite(given).all() and (given > 0).all()):
        raise EmbeddingError("weights", f"each of {len(raw)} photos needs one weight above 0, got {given.tolist()}")
    lengths = np.linalg.norm(raw, axis=1)
    unit = raw / lengths[:, None]
    similarities = _similarities(unit)
    if how == "trimmed" and len(raw) > 2:
        below = np.median(similarities) - similarities
        spread = _SIGMA * np.median(np.abs(below))
        given = np.where(below > max(_SPREADS * spread, _FURTHER), 0.0, given)
    given = given / given.sum()
    mean = given @ (unit * (given @ lengths) if how == "normalised" else raw)
    return Combined(mean, given, similarities)


def _similarities(unit: np.ndarray) -> np.ndarray:
    if len(unit) < 2:
        return np.full(len(unit), np.nan)
    rest = unit.sum(axis=0) - unit
    return (unit * rest).sum(axis=1) / np.maximum(np.linalg.norm(rest, axis=1), 1e-12)


def interpolate_embeddings(embeddings: np.ndarray, count: int, how: Interpolation = "linear") -> np.ndarray:
    """`count` embeddings [count, d] float32 on the way through embeddings [k, d], evenly spaced, the first and last included.

    "linear" goes straight, "spherical" along the arc between the directions, the lengths going linearly; between two people the
    straight way is shorter than both in the middle. Raises `EmbeddingError` for fewer than two of either, another `how`, or
    opposite directions, between which there is no one arc.
    """
    points = np.asarray(embeddings, np.float64)
    if points.ndim != 2 or len(points) < 2 or count < 2:
        raise EmbeddingError("interpolation", f"an interpolation needs two embeddings [k, d] and two places, got shape {points.shape} and {count}")
    if how not in ("linear", "spherical"):
        raise EmbeddingError("interpolation", f"an interpolation is linear or spherical, not {how!r}")
    found = []
    for place in np.linspace(0, len(points) - 1, count):
        i = min(int(place), len(points) - 2)
        found.append(_between(points[i], points[i + 1], place - i, how))
    return np.stack(found).astype(np.float32)


def _between(a: np.ndarray, b: np.ndarray, t: float, how: Interpolation) -> np.ndarray:
    if how == "linear":
        return (1 - t) * a + t * b
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    angle = np.arccos(np.clip(a @ b / (lengths[0] * lengths[1]), -1, 1))
    if angle < 1e-6:
        return (1 - t) * a + t * b
    if np.pi - angle < 1e-6:
        raise EmbeddingError("interpolation", "two embeddings point in opposite directions; there is no one arc between them")
    unit = (np.sin((1 - t) * angle) * a / lengths[0] + np.sin(t * angle) * b / lengths[1]) / np.sin(angle)
    return unit * ((1 - t) * lengths[0] + t * lengths[1])
