"""From the files that a user names to an identity and to the keypoint picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from instantid_jax.face import (
    EmbeddingError,
    FaceAnalyzer,
    Identity,
    KeypointError,
    draw_kps,
    identity_from_photos,
    load_photo,
    load_precomputed,
    resize_img,
)


def read_identity(paths: Sequence[Path], analyzer: FaceAnalyzer, face_index: int | None = None) -> Identity:
    """Photos of one person (raw embeddings averaged), or one .npz / .npy with a precomputed embedding.

    Photos pass through the published `resize_img` first. Raises the face package's errors.
    """
    precomputed = [path for path in paths if path.suffix in (".npz", ".npy")]
    if precomputed and len(paths) > 1:
        raise EmbeddingError("embedding_file", f"{precomputed[0]}: a precomputed embedding cannot be mixed with other files; name it alone")
    if precomputed:
        return load_precomputed(paths[0], analyzer.embedding_dim)
    photos = [np.asarray(resize_img(load_photo(path))) for path in paths]
    return identity_from_photos(analyzer, photos, face_index=face_index, names=[str(path) for path in paths])


def keypoint_picture(pose: Identity, width: int | None, height: int | None, long_side: int) -> Image.Image:
    """The five keypoints of a pose, drawn on a canvas of the output's size.

    Without width and height the canvas has the photo's proportions, `long_side` pixels long, in multiples of 64. The
    keypoints are moved with the photo before they are drawn, so lines and dots always have their published thickness.
    """
    if pose.face is None or pose.size is None:
        raise KeypointError("no_keypoints", "the pose has no keypoints: give --pose with a photo or an .npz that holds kps and size")
    w, h = pose.size
    factor = long_side / max(w, h)
    size = (width or max(64, round(w * factor) // 64 * 64), height or max(64, round(h * factor) // 64 * 64))
    keypoints = np.asarray(pose.face.kps, np.float32) * np.asarray([size[0] / w, size[1] / h], np.float32)
    return draw_kps(size, keypoints)
