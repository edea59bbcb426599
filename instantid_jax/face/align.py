"""Moves a face to the place where a face recogniser expects it.

A recogniser of the ArcFace family is trained on 112 x 112 crops whose five keypoints lie near a fixed template. The crop is a
similarity transform of the photo (rotation, one scale, translation), the least-squares solution of Umeyama (1991):

    source x_i, target y_i, means m_x, m_y, n points
    A = (1/n) sum_i (y_i - m_y)(x_i - m_x)^T = U diag(s) V^T                (1)
    D = diag(1, det(U) det(V)), so that R is no reflection                  (2)
    R = U D V^T,    scale = sum(s D) / ((1/n) sum_i |x_i - m_x|^2)          (3)
    t = m_y - scale R m_x                                                   (4)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from instantid_jax.face.errors import KeypointError, import_opencv

__all__ = ["ARCFACE_SIZE", "ARCFACE_TEMPLATE", "align", "check_keypoints", "umeyama"]

ARCFACE_SIZE = 112
"""Side of the recogniser's crop in pixels."""

ARCFACE_TEMPLATE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32)
"""Where the five keypoints belong in the crop: (5, 2) float32 pixels, x then y; image-left eye, image-right eye, nose, mouth left, mouth right."""
ARCFACE_TEMPLATE.setflags(write=False)


def check_keypoints(kps: Any, where: str = "kps") -> np.ndarray:
    """`kps` as a floating (5, 2) array (the dtype is kept if it is floating). Raises `KeypointError` naming `where`."""
    points = np.asarray(kps)
    if points.shape != (5, 2) or points.dtype.kind not in "fiu":
        raise KeypointError("keypoints_shape", f"{where}: keypoints must be numbers of shape (5, 2), got {points.dtype} of shape {points.shape}")
    if points.dtype.kind != "f":
        points = points.astype(np.float64)
    if not np.isfinite(points).all():
        bad = int(np.count_nonzero(~np.isfinite(points).all(axis=1)))
        raise KeypointError("keypoints_not_finite", f"{where}: {bad} of 5 keypoints are NaN or infinite; detect the face again or mark it by hand")
    return points


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The similarity transform that maps `source` (n, 2) onto `target` (n, 2) with the least squared error, equations (1) to (4).

    Returns a (2, 3) float64 matrix for ``matrix @ (x, y, 1)``. Raises `KeypointError` where the source points coincide.
    """
    x, y = np.asarray(source, np.float64), np.asarray(target, np.float64)
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    x_centred, y_centred = x - mean_x, y - mean_y
    variance = (x_centred**2).sum() / len(x)
    covariance = y_centred.T @ x_centred / len(x)
    if variance < 1e-12:
        raise KeypointError("keypoints_degenerate", "the keypoints lie in one place; a face needs five different ones")
    u, s, vt = np.linalg.svd(covariance)
    d = np.array([1.0, 1.0 if np.linalg.det(u) * np.linalg.det(vt) > 0 else -1.0])
    rotation = (u * d) @ vt
    scale = (s * d).sum() / variance
    return np.hstack([scale * rotation, (mean_y - scale * rotation @ mean_x)[:, None]])


def align(image: np.ndarray, kps: np.ndarray, size: int = ARCFACE_SIZE) -> np.ndarray:
    """The recogniser's crop: `image` uint8 [h, w, 3] (any channel order) to uint8 [size, size, 3], bilinear, black outside the photo.

    `kps` is (5, 2) in pixels of `image`. Raises `KeypointError` for keypoints that are not finite or coincide.
    """
    matrix = umeyama(check_keypoints(kps), ARCFACE_TEMPLATE * (size / ARCFACE_SIZE))
    return import_opencv().warpAffine(image, matrix, (size, size), borderValue=0)
