"""Finding and judging the faces of many pictures."""

from __future__ import annotations

import dataclasses

import numpy as np

from instantid_jax.evaluation.judges import Judge
from instantid_jax.evaluation.store import Store, digest
from instantid_jax.face import FaceAnalyzer, largest_face

__all__ = ["Examiner", "Faces"]


@dataclasses.dataclass(frozen=True, eq=False)
class Faces:
    """What was seen in n pictures."""

    found: np.ndarray
    """[n] bool: whether the detector, asked once, sees a face."""
    keypoints: np.ndarray
    """[n, 5, 2] of the largest face, NaN where none is found."""
    vectors: np.ndarray
    """[n, d]: the judge's unit vectors; of a picture without a found face, those at the asked keypoints."""


class Examiner:
    """A detector and a judge, with what they have already seen."""

    def __init__(self, analyzer: FaceAnalyzer, judge: Judge, store: Store) -> None:
        self.analyzer, self.judge, self.store = analyzer, judge, store

    def examine(self, images: np.ndarray, asked: np.ndarray) -> Faces:
        """Faces of pictures [n, s, s, 3] uint8 that were asked to have keypoints [n, 5, 2]."""
        rows = [self._one(image, keypoints) for image, keypoints in zip(images, asked, strict=True)]
        return Faces(*(np.stack([row[name] for row in rows]) for name in ("found", "keypoints", "vector")))

    def _one(self, image: np.ndarray, asked: np.ndarray) -> dict[str, np.ndarray]:
        key = digest("face 1", self.analyzer.name, self.judge.name, image, asked)
        kept = self.store.get(key)
        if kept is None:
            faces = self.analyzer.analyze(image)
            points = faces[largest_face(faces)].kps if faces else np.full((5, 2), np.nan, np.float32)
            vector = self.judge.embed(image, points if faces else asked)
            kept = {"found": np.bool_(bool(faces)), "keypoints": points, "vector": vector}
            self.store.put(key, kept)
        return kept
