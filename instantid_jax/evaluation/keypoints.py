"""Whether a face is where it was asked for."""

from __future__ import annotations

import numpy as np

__all__ = ["normalized_mean_error"]


def normalized_mean_error(found: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """[n]: mean distance of five found keypoints [n, 5, 2] from the asked ones, in distances between the asked eyes.

    NaN where a point was not found (NaN). Raises ValueError where the eyes of an asked face are in one place.
    """
    found, asked = np.asarray(found, np.float64), np.asarray(asked, np.float64)
    if found.shape != asked.shape or found.shape[1:] != (5, 2):
        raise ValueError(f"keypoint error: both need the shape [n, 5, 2], got {list(found.shape)} and {list(asked.shape)}")
    eyes = np.linalg.norm(asked[:, 1] - asked[:, 0], axis=-1)
    if not (eyes > 0).all():
        raise ValueError(f"keypoint error: the eyes of face {int(np.argmin(eyes))} are in one place")
    return np.linalg.norm(found - asked, axis=-1).mean(axis=-1) / eyes
