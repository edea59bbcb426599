"""Confidence intervals over people, and how well a recogniser tells people apart.

The people of a test are a sample, and the interval says how a figure would move with other people: the percentile bootstrap,
resampling people with everything that belongs to them. A resample is a row of weights, how often each person was drawn, so a
statistic is a function from weights [r, n] to r values, and all ones give the figure itself.

With similarities s_ij of the reference of person i and the picture of person j, and weights w:

    same  = sum_i w_i s_ii / sum_i w_i                                                            (1)
    other = sum_{i != j} w_i w_j s_ij / sum_{i != j} w_i w_j                                      (2)
    AUC   = chance that some s_ii exceeds some s_jk with j != k, equal ones counting one half     (3)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

__all__ = ["Estimate", "auc", "bootstrap", "estimate", "mean", "median", "other", "proportion", "ranks", "same"]

Statistic = Callable[[np.ndarray], np.ndarray]
"""From weights [r, n] to values [r]."""

_CHUNK = 64
_NORMAL_95 = 1.959964


class Estimate(NamedTuple):
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(people: int, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Weights [resamples, people] float64: how often each person is in each resample."""
    return np.random.default_rng(seed).multinomial(people, np.full(people, 1 / people), size=resamples).astype(np.float64)


def estimate(statistic: Statistic, weights: np.ndarray) -> Estimate:
    """The statistic of the people as they are, and the percentile interval over resamples in which it exists."""
    value = float(statistic(np.ones((1, weights.shape[1])))[0])
    drawn = statistic(weights)
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")  # interpolating would break on infinities
    return Estimate(value, float(low), float(high))


def mean(values: np.ndarray) -> Statistic:
    """The mean of values [n]; a NaN is a person who does not count."""
    counts = ~np.isnan(values)
    filled = np.where(counts, values, 0.0)

    def statistic(weights: np.ndarray) -> np.ndarray:
        total = weights @ counts
        return np.divide(weights @ filled, total, out=np.full(len(weights), np.nan), where=total > 0)

    return statistic


def median(values: np.ndarray) -> Statistic:
    """The median of values [n]; a NaN is a failure, worse than every number, and the result is infinite where most failed."""
    order = np.argsort(np.where(np.isnan(values), np.inf, values), kind="stable")
    ranked = np.where(np.isnan(values), np.inf, values)[order]

    def statistic(weights: np.ndarray) -> np.ndarray:
        reached = np.cumsum(weights[:, order], axis=1)
        half = reached[:, -1:] / 2
        low, high = ranked[(reached >= half).argmax(1)], ranked[(reached > half).argmax(1)]
        return np.where(low == high, low, (low + high) / 2)

    return statistic


def same(similarity: np.ndarray) -> Statistic:
    """Equation (1) of similarities [n, n]."""
    return mean(np.diagonal(similarity))


def other(similarity: np.ndarray) -> Statistic:
    """Equation (2)."""
    diagonal = np.diagonal(similarity)

    def statistic(weights: np.ndarray) -> np.ndarray:
        squares = weights**2
        pairs = weights.sum(1) ** 2 - squares.sum(1)
        total = np.einsum("ri,ri->r", weights @ similarity, weights) - squares @ diagonal
        return np.divide(total, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)

    return statistic


def auc(similarity: np.ndarray) -> Statistic:
    """Equation (3)."""
    people = len(similarity)
    rows, columns = np.nonzero(~np.eye(people, dtype=bool))
    order = np.argsort(similarity[rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    ranked = similarity[rows, columns]
    below, upto = (np.searchsorted(ranked, np.diagonal(similarity), side=side) for side in ("left", "right"))

    def part(weights: np.ndarray) -> np.ndarray:
        reached = np.cumsum(weights[:, rows] * weights[:, columns], axis=1)
        reached = np.concatenate([np.zeros((len(weights), 1)), reached], axis=1)
        won = (weights * (reached[:, below] + reached[:, upto]) / 2).sum(1)
        games = weights.sum(1) * reached[:, -1]
        return np.divide(won, games, out=np.full(len(weights), np.nan), where=games > 0)

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.concatenate([part(weights[i : i + _CHUNK]) for i in range(0, len(weights), _CHUNK)])

    return statistic


def ranks(similarity: np.ndarray) -> np.ndarray:
    """[n]: place of each picture's own reference among all references, from 1; equals count as worse than the others."""
    return (similarity >= np.diagonal(similarity)[None]).sum(0)


def proportion(hits: np.ndarray) -> Estimate:
    """A share of people, hits [n] bool, with Wilson's interval, which stays honest where all or none hit."""
    count, share, z = len(hits), float(np.mean(hits)), _NORMAL_95
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Estimate(share, max(float(center - reach), 0.0), min(float(center + reach), 1.0))
