"""From the files that a user names to an identity, the keypoint picture and control pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.face import (
    EmbeddingError,
    FaceAnalyzer,
    Identity,
    KeypointError,
    PhotoError,
    identity_from_photos,
    load_photo,
    load_precomputed,
    resize_img,
)

__all__ = ["check_files", "keypoint_picture", "read_identity", "read_mask"]

PRECOMPUTED = (".npz", ".npy")


def check_files(paths: Sequence[Path]) -> None:
    """Raises `PhotoError` for the first that is no file; for a command line to say so before anything slow."""
    for path in paths:
        if not path.is_file():
            raise PhotoError("missing", f"{path}: is not a file" if path.exists() else f"{path}: there is no such file")


def read_identity(
    paths: Sequence[Path], analyzer: Callable[[], FaceAnalyzer], embedding_dim: int | None = None, face_index: int | None = None
) -> Identity:
    """Photos of one person (raw embeddings averaged), or one .npz / .npy with a precomputed embedding.

    Photos pass through the published `resize_img` first; messages are in pixels of the files. `analyzer` gives the face backend and
    is called for photos alone: a precomputed face needs none. `embedding_dim` is what the weights expect; None for a pose, of which
    the keypoints count.
    Raises the face package's errors.
    """
    precomputed = [path for path in paths if path.suffix in PRECOMPUTED]
    if precomputed and len(paths) > 1:
        raise EmbeddingError("embedding_file", f"{precomputed[0]}: a precomputed embedding cannot be mixed with other files; name it alone")
    if precomputed:
        return load_precomputed(paths[0], embedding_dim)
    originals = [load_photo(path) for path in paths]
    photos = [_resized(photo, path) for photo, path in zip(originals, paths, strict=True)]
    backend = analyzer()
    if embedding_dim not in (None, backend.embedding_dim):
        found = f"the face analyzer {backend.name!r} gives vectors of {backend.embedding_dim}"
        raise EmbeddingError("embedding_dim", f"{found}, these weights take {embedding_dim}; choose their own with --analyzer, or leave it out")
    names, sizes = [str(path) for path in paths], [photo.size for photo in originals]
    return identity_from_photos(backend, photos, face_index=face_index, names=names, original_sizes=sizes)


def _resized(photo: Image.Image, path: Path) -> np.ndarray:
    try:
        return np.asarray(resize_img(photo))
    except PhotoError as error:
        raise PhotoError(error.code, f"{path}: {error}") from error


def keypoint_picture(
    pose: Identity,
    width: int | None,
    height: int | None,
    long_side: int,
    scale: float = 1.0,
    frame: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Image.Image:
    """The five keypoints of a pose, drawn on a canvas of the output's size; `scale` is `ModelConfig.keypoint_scale`.

    Without width and height the canvas has the photo's proportions, `long_side` pixels long, in multiples of 64; with one of them the
    other follows. The
    keypoints are moved with the photo before they are drawn, so lines and dots always have their published thickness. With
    `frame`, which takes them to parts of a square picture, the photo's own framing does not count and the canvas is square.
    """
    if pose.face is None or pose.size is None:
        raise KeypointError("no_keypoints", "the pose has no keypoints: give --pose with a photo or an .npz that holds kps and size")
    w, h = pose.size
    if frame is not None:
        square = (width or long_side, height or long_side)
        return Image.fromarray(draw_keypoints(square, frame(pose.face.kps) * np.asarray(square, np.float32), scale))
    if width and height:
        size = (width, height)
    elif width or height:  # the other side follows from the photo's proportions
        factor = width / w if width else (height or 0) / h
        size = (width or max(64, round(w * factor / 8) * 8), height or max(64, round(h * factor / 8) * 8))
    else:
        factor = long_side / max(w, h)
        size = (max(64, round(w * factor) // 64 * 64), max(64, round(h * factor) // 64 * 64))
    keypoints = np.asarray(pose.face.kps, np.float32) * np.asarray([size[0] / w, size[1] / h], np.float32)
    return Image.fromarray(draw_keypoints(size, keypoints, scale))


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A control mask from a picture file, as uint8 [h, w] for pictures of ``size = (width, height)``: white is where control acts."""
    return np.asarray(load_photo(path).convert("L").resize(size, Image.Resampling.BILINEAR))
