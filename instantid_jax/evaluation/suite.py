"""The portraits evaluation: arms, figures, ceilings and targets.

For every arm each test person is drawn once from the reference, the pose and the prompt of the `Panel`, and with the same noise in
every arm. A second picture, in a style, is drawn for the control that the prompt keeps.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from instantid_jax.evaluation import statistics
from instantid_jax.evaluation.attributes import TextJudge
from instantid_jax.evaluation.faces import Examiner, Faces
from instantid_jax.evaluation.generate import Job, Painter
from instantid_jax.evaluation.keypoints import normalized_mean_error
from instantid_jax.evaluation.panel import Panel
from instantid_jax.evaluation.statistics import Estimate, Statistic

__all__ = ["ARMS", "BASE", "MAIN", "TARGETS", "Arm", "ArmResult", "Bench", "Figures", "Kept", "check_arms"]

Figures = dict[str, Estimate | None]
"""Figures by name; None where the arm has no such figure."""

_EVERYBODY, _FEW = 1000, 25  # people whose style is asked for too


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to use the model. Strengths are parts of the evaluation's full strengths."""

    identitynet: float
    adapter: float
    references: int = 1
    """How many photos are averaged."""
    prompt: bool = True
    """False asks with an empty text."""
    styled: int = _FEW
    """How many people are drawn in a style too."""


ARMS: dict[str, Arm] = {
    "both": Arm(1, 1, styled=_EVERYBODY),
    "identitynet_only": Arm(1, 0),
    "adapter_only": Arm(0, 1),
    "neither": Arm(0, 0, styled=_EVERYBODY),
    "grid_0.5_0.5": Arm(0.5, 0.5),
    "grid_0.5_1": Arm(0.5, 1),
    "grid_1_0.5": Arm(1, 0.5),
    "grid_0_0.5": Arm(0, 0.5),
    "grid_0.5_0": Arm(0.5, 0),
    "references_1": Arm(1, 1, styled=_EVERYBODY),
    "references_2": Arm(1, 1, references=2),
    "references_4": Arm(1, 1, references=4),
    "empty_prompt": Arm(1, 1, prompt=False, styled=0),
}
"""By name; grid_x_y has IdentityNet at x and the adapter at y, and the grid's corners have names of their own."""

MAIN, BASE = "both", "neither"


def _value(figures: Figures, name: str) -> float:
    estimate = figures[name]
    return float("nan") if estimate is None else estimate.value


TARGETS: tuple[tuple[str, Callable[[Figures], bool]], ...] = (
    ("gap_ratio >= 0.30", lambda f: _value(f, "gap_ratio") >= 0.30),
    ("auc >= 0.80", lambda f: _value(f, "auc") >= 0.80),
    ("detected >= 0.95", lambda f: _value(f, "detected") >= 0.95),
    ("keypoint_nme_median <= keypoint_nme_ceiling + 0.06", lambda f: _value(f, "keypoint_nme_median") <= _value(f, "keypoint_nme_ceiling") + 0.06),
    ("text_control_lost <= 0.10", lambda f: _value(f, "text_control_lost") <= 0.10),
)


def check_arms(names: Sequence[str]) -> list[str]:
    """The arms to run, in the table's order: those named (none means all), and the two that every figure needs. Raises ValueError."""
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise ValueError(f"there is no arm {unknown[0]!r}; the arms are {', '.join(ARMS)}")
    return [name for name in ARMS if not names or name in (*names, MAIN, BASE)]


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """What a set of pictures keeps of its prompts, 1 or 0 a person; NaN where nothing was asked."""

    background: np.ndarray
    hair: np.ndarray
    style: np.ndarray

    def shares(self) -> Figures:
        """The share of people who got each, among those who asked."""
        parts = {"background": self.background, "hair": self.hair, "style": self.style}
        return {name: statistics.proportion(values[~np.isnan(values)] > 0) for name, values in parts.items()}

    def mean(self) -> Statistic:
        """The mean of the three shares."""
        parts = [statistics.mean(values) for values in (self.background, self.hair, self.style)]
        return lambda weights: np.mean([part(weights) for part in parts], axis=0)


@dataclasses.dataclass(frozen=True, eq=False)
class ArmResult:
    """An arm's pictures and what was measured on them."""

    pictures: np.ndarray
    """[n, s, s, 3] uint8."""
    figures: Figures
    kept: Kept | None
    """What was kept of the prompts; None where there were none."""
    asked_crops: int
    """How many pictures were judged at the asked keypoints, since no face was found."""
    seconds: float
    """What drawing and judging took; little where the store had it all."""


class Bench:
    """Measures arms and ceilings on one panel, all with the same resamples of its people."""

    def __init__(self, panel: Panel, examiner: Examiner, text: TextJudge, resamples: int = 2000) -> None:
        self.panel, self._examiner, self._text = panel, examiner, text
        self.judge, self.conditioner = examiner.judge.name, examiner.analyzer.name
        self._weights = statistics.bootstrap(len(panel), resamples)
        self._references = examiner.examine(panel.references[:, 0], panel.reference_keypoints).vectors
        self._real = examiner.examine(panel.targets, panel.keypoints)
        self._ceiling = self._similarity(self._real)

    def ceilings(self) -> Figures:
        """What real renders reach, under the names of the figures that they bound."""
        kept = self._keeps(self.panel.targets, self.panel.styled_targets)
        return {
            **self._bounds(),
            "ceiling_auc": self._estimate(statistics.auc(self._ceiling)),
            **self._retrieval(self._ceiling, "ceiling_"),
            "ceiling_detected": statistics.proportion(self._real.found),
            "ceiling_text_control": self._estimate(kept.mean()),
            **{f"ceiling_{name}": share for name, share in kept.shares().items()},
        }

    def run(self, arm: Arm, painter: Painter, full: tuple[float, float], seed: int, base: ArmResult | None = None) -> ArmResult:
        """Draws and measures one arm. `full` are the full strengths of IdentityNet and adapter; person i has the noise of seed + i.

        `base` is the result of the arm without identity, with whose hold on the prompt this one's is compared; None is itself.
        """
        began = time.perf_counter()
        styled = min(arm.styled, len(self.panel))
        prompts = [*self.panel.prompts, *self.panel.styled_prompts[:styled]]
        jobs = [self._job(arm, i % len(self.panel), prompt, full, seed) for i, prompt in enumerate(prompts)]
        pictures = painter.paint(jobs)
        photos, styles = pictures[: len(self.panel)], pictures[len(self.panel) :]
        faces = self._examiner.examine(photos, self.panel.keypoints)
        kept = self._keeps(photos, styles) if arm.prompt else None
        without = kept if base is None else base.kept
        figures = self._identity(faces) | self._text_control(kept, without, whole=styled == len(self.panel))
        return ArmResult(photos, figures, kept, int(np.count_nonzero(~faces.found)), time.perf_counter() - began)

    def _job(self, arm: Arm, person: int, prompt: str, full: tuple[float, float], seed: int) -> Job:
        return Job(
            prompt=prompt if arm.prompt else "",
            embedding=self.panel.embeddings[person, : arm.references].mean(0),
            keypoints=self.panel.keypoints[person],
            seed=seed + int(self.panel.seeds[person]),
            identitynet=arm.identitynet * full[0],
            adapter=arm.adapter * full[1],
        )

    def _estimate(self, statistic: Statistic) -> Estimate:
        return statistics.estimate(statistic, self._weights)

    def _similarity(self, faces: Faces) -> np.ndarray:
        """[n, n]: row of a reference, column of a picture."""
        return (self._references @ faces.vectors.T).astype(np.float64)

    def _error(self, faces: Faces) -> Statistic:
        return statistics.median(normalized_mean_error(faces.keypoints, self.panel.keypoints))

    def _bounds(self) -> Figures:
        return {
            "ceiling_same": self._estimate(statistics.same(self._ceiling)),
            "ceiling_other": self._estimate(statistics.other(self._ceiling)),
            "keypoint_nme_ceiling": self._estimate(self._error(self._real)),
        }

    def _retrieval(self, similarity: np.ndarray, prefix: str = "") -> Figures:
        places = statistics.ranks(similarity)
        return {f"{prefix}retrieval_top{k}": statistics.proportion(places <= k) for k in (1, 5)}

    def _identity(self, faces: Faces) -> Figures:
        similarity = self._similarity(faces)
        same, other = statistics.same(similarity), statistics.other(similarity)
        real_same, real_other = statistics.same(self._ceiling), statistics.other(self._ceiling)
        return {
            "cosine_same": self._estimate(same),
            "cosine_other": self._estimate(other),
            **self._bounds(),
            "gap_ratio": self._estimate(lambda w: (same(w) - other(w)) / (real_same(w) - real_other(w))),
            "auc": self._estimate(statistics.auc(similarity)),
            **self._retrieval(similarity),
            "detected": statistics.proportion(faces.found),
            "keypoint_nme_median": self._estimate(self._error(faces)),
        }

    def _keeps(self, photos: np.ndarray, styled: np.ndarray) -> Kept:
        panel, count = self.panel, len(styled)
        hair = (self._text.hair(photos) == np.asarray(panel.hairs)).astype(float)
        style = np.full(len(panel), np.nan)
        if count:
            style[:count] = self._text.style(styled) == np.asarray(panel.styles[:count])
        return Kept(
            background=(self._text.background(photos) == np.asarray(panel.backgrounds)).astype(float),
            hair=np.where(np.asarray(panel.hairs) == "", np.nan, hair),
            style=style,
        )

    def _text_control(self, kept: Kept | None, without: Kept | None, whole: bool) -> Figures:
        """`whole` says that everybody's style was asked for, so that what is lost can be said person by person."""
        names = ("text_control_with_identity", "text_control_without_identity", "text_control_lost")
        if kept is None or without is None:
            return dict.fromkeys((*names, "background", "hair", "style"))
        held, free = kept.mean(), without.mean()
        lost = self._estimate(lambda w: free(w) - held(w)) if whole else None
        return dict(zip(names, [self._estimate(held), self._estimate(free), lost], strict=True)) | kept.shares()
