"""Whether a portrait shows what its prompt asked for: the background's colour, the hair's colour, the style.

Three small classifiers are fitted on real renders when they are needed, and their accuracy on other real renders is the ceiling.
None needs to know where the face is. Background: the colour along the upper sides. Hair: on the way down from the upper edge, in
the columns of the head, the first pixels that are not background. Style: statistics of colour, edges and blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["KernelClassifier", "NearestMean", "TextJudge", "background_color", "hair_profile", "style_statistics"]

_COLUMNS = (0.3, 0.7)  # the head, in picture widths
_DEPTH = 6  # pixels of a picture of 64, below the head's upper edge
_DIFFERENT = 0.08  # of the range of brightness: what is no background any more
_GAMMA, _RIDGE = 0.5, 0.05


class NearestMean:
    """The class whose mean feature is nearest."""

    def __init__(self, features: np.ndarray, labels: Sequence[str]) -> None:
        self.classes = sorted(set(labels))
        names = np.asarray(labels)
        self._means = np.stack([features[names == name].mean(0) for name in self.classes])

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Class names [n] of features [n, d]."""
        distance = np.linalg.norm(features[:, None] - self._means[None], axis=-1)
        return np.asarray(self.classes)[distance.argmin(1)]


class KernelClassifier:
    """Ridge regression onto the classes with a Gaussian kernel of standardised features."""

    def __init__(self, features: np.ndarray, labels: Sequence[str]) -> None:
        self.classes = sorted(set(labels))
        self._mean, self._std = features.mean(0), features.std(0) + 1e-6
        self._basis = (features - self._mean) / self._std
        targets = np.asarray([[1.0 if label == name else -1.0 for name in self.classes] for label in labels])
        gram = self._kernel(self._basis) + _RIDGE * np.eye(len(features))
        self._weights = np.linalg.solve(gram, targets)

    def _kernel(self, rows: np.ndarray) -> np.ndarray:
        squares = (rows**2).sum(1)[:, None] + (self._basis**2).sum(1)[None] - 2 * rows @ self._basis.T
        return np.exp(-_GAMMA / rows.shape[1] * np.maximum(squares, 0.0))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Class names [n] of features [n, d]."""
        scores = self._kernel((features - self._mean) / self._std) @ self._weights
        return np.asarray(self.classes)[scores.argmax(1)]


def background_color(images: np.ndarray) -> np.ndarray:
    """[n, 3] in 0..1: the median colour of the upper third of both sides of pictures [n, s, s, 3] uint8."""
    side = images.shape[1]
    high, wide = side // 3, max(side // 12, 1)
    sides = np.concatenate([images[:, :high, :wide], images[:, :high, -wide:]], axis=2)
    return np.median(sides.reshape(len(images), -1, 3), axis=1) / 255


def hair_profile(images: np.ndarray) -> np.ndarray:
    """[n, 22]: the colours of six rows from the head's upper edge down (medians over the columns), the background's, the edge's height."""
    side = images.shape[1]
    backdrop = background_color(images)
    left, right = (int(part * side) for part in _COLUMNS)
    columns = np.arange(left, right)
    pixels = images.astype(np.float64) / 255
    differs = np.abs(pixels[:, :, columns] - backdrop[:, None, None]).max(-1) > _DIFFERENT
    first = np.where(differs.any(1), differs.argmax(1), side // 4)  # [n, c]
    below = np.round(np.arange(1, _DEPTH + 1) * side / 64).astype(int)
    rows = np.minimum(first[:, None] + below[None, :, None], side - 1)
    profile = np.median(pixels[np.arange(len(images))[:, None, None], rows, columns], axis=2)
    return np.concatenate([profile.reshape(len(images), -1), backdrop, np.median(first, axis=1)[:, None] / side], axis=1)


def style_statistics(images: np.ndarray) -> np.ndarray:
    """[n, d]: brightness, saturation, fine edges, steps between even and odd pixels (blocks), and the border's colour."""
    pixels = images.astype(np.float64) / 255
    gray, saturation = pixels.mean(-1), pixels.max(-1) - pixels.min(-1)
    across, down = np.abs(np.diff(gray, axis=2)), np.abs(np.diff(gray, axis=1))
    steps = [across[:, :, 0::2], across[:, :, 1::2], down[:, 0::2], down[:, 1::2]]
    inner = gray[:, 1:-1, 1:-1]
    fine = np.abs(4 * inner - gray[:, :-2, 1:-1] - gray[:, 2:, 1:-1] - gray[:, 1:-1, :-2] - gray[:, 1:-1, 2:])
    edges = [pixels[:, :3], pixels[:, -3:], pixels[:, :, :3], pixels[:, :, -3:]]
    border = np.concatenate([edge.reshape(len(images), -1, 3) for edge in edges], axis=1)
    columns = [
        *(np.log(step.mean((1, 2)) + 1e-3)[:, None] for step in steps),
        np.quantile(saturation, (0.1, 0.5, 0.9), axis=(1, 2)).T,
        np.quantile(gray, (0.02, 0.25, 0.5, 0.75, 0.98), axis=(1, 2)).T,
        np.log(np.quantile(fine, (0.25, 0.5, 0.75, 0.95), axis=(1, 2)).T + 1e-3),
        border.mean(1),
        border.std(1),
    ]
    return np.concatenate(columns, axis=1)


class TextJudge:
    """The three classifiers.

    `images` [n, s, s, 3] uint8 are real renders. `hair` names each one's hair colour, or is "" where there is no hair. Background
    and hair are learned from the renders whose style is "photo", the style from all. Pictures to judge have the same size.
    """

    def __init__(self, images: np.ndarray, background: Sequence[str], hair: Sequence[str], style: Sequence[str]) -> None:
        photo = np.asarray(style) == "photo"
        haired = photo & (np.asarray(hair) != "")
        self._background = NearestMean(background_color(images[photo]), list(np.asarray(background)[photo]))
        self._hair = KernelClassifier(hair_profile(images[haired]), list(np.asarray(hair)[haired]))
        self._style = KernelClassifier(style_statistics(images), style)

    def background(self, images: np.ndarray) -> np.ndarray:
        """Names [n] of the backgrounds' colours, of photos."""
        return self._background.predict(background_color(images))

    def hair(self, images: np.ndarray) -> np.ndarray:
        """Names [n] of the hair's colours, of photos of people who are not bald."""
        return self._hair.predict(hair_profile(images))

    def style(self, images: np.ndarray) -> np.ndarray:
        """Names [n] of the styles."""
        return self._style.predict(style_statistics(images))
