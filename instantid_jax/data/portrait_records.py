"""Procedural portraits as an input of `prepare`: endless labelled people with exact keypoints, and nobody's photo."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from instantid_jax.data.inputs import Candidate, KnownFace
from instantid_jax.data.portraits import PortraitWorld
from instantid_jax.data.record import DataError

__all__ = ["PortraitReader"]

_FIRST_SEED = {"train": 2000, "validation": 1000, "test": 0}
_CHUNK = 16


@dataclass(frozen=True)
class PortraitReader:
    """`views` portraits of each of so many people a split. The picture's own style is drawn, but the face is embedded from the plain photo."""

    world: PortraitWorld = field(default_factory=PortraitWorld)
    people: tuple[tuple[str, int], ...] = (("train", 3000), ("validation", 64), ("test", 64))
    """(split, how many people); no person is in two splits."""
    views: int = 4
    """Portraits of each person."""
    embed_size: int = 0
    """Side in pixels of the picture that is embedded; 0 takes the portrait's. A recogniser sees more in a larger one."""
    first_view: int = 0
    """Number of the first view; another one gives other portraits of the same people."""
    skip: int = 0
    """How many people of each split are passed over, so that a set can be made in parts."""

    def __post_init__(self) -> None:
        for split, count in self.people:
            if split not in _FIRST_SEED:
                raise DataError(f"PortraitReader: there is no split {split!r}, only {', '.join(_FIRST_SEED)}")
            first = _FIRST_SEED[split] + self.skip
            if count < 1 or self.skip < 0 or self.world.split(first + count - 1) != split:
                raise DataError(f"PortraitReader: {count} people do not fit the split {split!r}, which begins with seed {first}")

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the order given."""
        return tuple(split for split, _ in self.people)

    def shards(self, split: str | None = None) -> Iterator[tuple[int, int]]:
        """Ranges of identity seeds."""
        for name, count in self.people:
            if split in (None, name):
                first = _FIRST_SEED[name] + self.skip
                for start in range(first, first + count, _CHUNK):
                    yield start, min(start + _CHUNK, first + count)

    def read(self, shard: tuple[int, int], /) -> Iterator[Candidate]:
        """See `inputs.Reader`."""
        for seed in range(*shard):
            for number in range(self.first_view, self.first_view + self.views):
                yield self._candidate(seed, number)

    def _candidate(self, seed: int, number: int) -> Candidate:
        world = self.world
        person = world.identity(seed)
        view = world.view(person, number)
        portrait = world.render(person, view)
        size = self.embed_size or world.image_size
        plain = (
            portrait if view.style == "photo" and size == world.image_size else world.render(person, dataclasses.replace(view, style="photo"), size)
        )
        data = io.BytesIO()
        Image.fromarray(portrait.image).save(data, "PNG")
        return Candidate(
            key=f"{seed:08d}-{number:04d}",
            image=data.getvalue(),
            caption=world.caption(person, view, identity_words=False),
            caption_identity=world.caption(person, view, identity_words=True),
            identity=f"{seed:08d}",
            labels={**world.labels(person, view), "identity_seed": seed, "view_seed": number},
            split=world.split(seed),
            source="procedural portraits",
            licence="CC0-1.0",
            face=KnownFace(portrait.keypoints, None),
            face_image=plain.image,
        )
