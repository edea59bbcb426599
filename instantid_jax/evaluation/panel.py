"""The people whom an evaluation draws, what is asked for each, and the renders that show what a perfect model would draw.

Of each person the references are plain photos of views 0, 2, 3 and 4; pose and prompt are those of view 1, which has another pose,
light, hair and background. So nothing but the person can be taken from a reference, and nothing of the person from a prompt.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from instantid_jax.data.portrait_styles import STYLES
from instantid_jax.data.portraits import Identity, Portrait, PortraitWorld, View
from instantid_jax.evaluation.attributes import TextJudge
from instantid_jax.evaluation.store import Store, digest
from instantid_jax.face import FaceAnalyzer, analyze_photo

__all__ = ["MOST_REFERENCES", "REFERENCE_SIZE", "Panel", "PanelError", "check_people", "fit_text_judge", "make_panel"]

REFERENCE_SIZE = 128
"""Side in pixels of the references, as in training."""
REFERENCE_VIEWS, TARGET_VIEW = (0, 2, 3, 4), 1
MOST_REFERENCES = len(REFERENCE_VIEWS)
_FIT_SEEDS = range(1000, 2000)  # the validation people: neither trained on nor judged
FIRST = {"test": 0, "validation": 1500}
"""Identity seed of the first person of a split; validation people are for choosing, and lie beyond those whom the text judge is fitted on."""
_FIT_PHOTOS, _FIT_OTHERS = 400, 100  # renders to fit on, in the photo style and in each other


class PanelError(ValueError):
    """People that cannot be made."""


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """What is asked for n test people; rows belong together."""

    seeds: np.ndarray
    """[n] identity seeds."""
    references: np.ndarray
    """[n, 4, 128, 128, 3] uint8."""
    reference_keypoints: np.ndarray
    """[n, 5, 2] as the detector finds them in the first reference."""
    embeddings: np.ndarray
    """[n, 4, d]: the conditioning recogniser's raw vectors."""
    keypoints: np.ndarray
    """[n, 5, 2]: the asked pose, exact, in pixels of the picture."""
    targets: np.ndarray
    """[n, s, s, 3] uint8: the asked picture, really rendered."""
    prompts: list[str]
    """In the photo style, without a word on who it is."""
    backgrounds: list[str]
    hairs: list[str]
    """Asked colours of the hair, "" for the bald."""
    styles: list[str]
    """Styles in turn, one for each person."""
    styled_prompts: list[str]
    """`prompts` in the person's style."""
    styled_targets: np.ndarray
    """[n, s, s, 3] uint8: `targets` in the person's style."""

    def __len__(self) -> int:
        return len(self.seeds)


def check_people(people: int, split: str) -> None:
    """Raises `PanelError` where a split, "test" or "validation", has not so many people, or so few would mean nothing."""
    most = {"test": _FIT_SEEDS.start, "validation": _FIT_SEEDS.stop - FIRST[split]}[split]
    if not 2 <= people <= most:
        raise PanelError(f"an evaluation needs 2 to {most} {split} people, got {people}")


def make_panel(world: PortraitWorld, people: int, analyzer: FaceAnalyzer, split: str = "test") -> Panel:
    """The first so many people of a split, "test" or "validation".

    Raises:
        PanelError: there are not so many.
        FaceError: a reference shows no face.
    """
    check_people(people, split)
    first = FIRST[split]
    rows = [_person(world, seed, analyzer) for seed in range(first, first + people)]
    arrays = ("seeds", "references", "reference_keypoints", "embeddings", "keypoints", "targets", "styled_targets")
    texts = ("prompts", "backgrounds", "hairs", "styles", "styled_prompts")
    columns: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in arrays}
    columns |= {name: [row[name] for row in rows] for name in texts}
    return Panel(**columns)


def _person(world: PortraitWorld, seed: int, analyzer: FaceAnalyzer) -> dict[str, Any]:
    person = world.identity(seed)
    photos = [world.render(person, _view(world, person, number), REFERENCE_SIZE).image for number in REFERENCE_VIEWS]
    faces = [analyze_photo(analyzer, photo, name=f"reference of person {seed}", on_several="largest") for photo in photos]
    asked = _view(world, person, TARGET_VIEW)
    target = world.render(person, asked)
    styled = dataclasses.replace(asked, style=STYLES[seed % len(STYLES)])
    return {
        "seeds": np.int64(seed),
        "references": np.stack(photos),
        "reference_keypoints": faces[0].kps,
        "embeddings": np.stack([face.embedding for face in faces]),
        "keypoints": target.keypoints,
        "targets": target.image,
        "prompts": world.caption(person, asked, identity_words=False),
        "backgrounds": asked.background,
        "hairs": _hair(asked),
        "styles": styled.style,
        "styled_prompts": world.caption(person, styled, identity_words=False),
        "styled_targets": world.render(person, styled).image,
    }


def _view(world: PortraitWorld, person: Identity, number: int, style: str = "photo") -> View:
    return dataclasses.replace(world.view(person, number), style=style)


def _hair(view: View) -> str:
    return "" if view.hair_style == "bald" else view.hair_color


def fit_text_judge(world: PortraitWorld, store: Store) -> TextJudge:
    """The judge of backgrounds, hair and styles, fitted on renders of validation people, which the store keeps."""
    wanted = [(seed, "photo") for seed in _FIT_SEEDS[:_FIT_PHOTOS]]
    wanted += [(seed, style) for style in STYLES if style != "photo" for seed in _FIT_SEEDS[:_FIT_OTHERS]]
    sample = _fitting_render(world, *wanted[0])[1]  # stands for the renderer itself in the key
    key = digest("fit 1", dataclasses.asdict(world), wanted, sample.image)
    kept = store.get(key)
    if kept is None:
        rows = []
        for seed, style in wanted:
            view, portrait = _fitting_render(world, seed, style)
            rows.append((portrait.image, view.background, _hair(view), style))
        images, *labels = zip(*rows, strict=True)
        kept = {"images": np.stack(images)} | {name: np.asarray(values) for name, values in zip(("background", "hair", "style"), labels, strict=True)}
        store.put(key, kept)
    return TextJudge(kept["images"], kept["background"].tolist(), kept["hair"].tolist(), kept["style"].tolist())


def _fitting_render(world: PortraitWorld, seed: int, style: str) -> tuple[View, Portrait]:
    person = world.identity(seed)
    view = _view(world, person, TARGET_VIEW, style)
    return view, world.render(person, view)
