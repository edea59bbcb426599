"""From the files that a user names to an identity, the keypoint picture and control pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.face import (
    Combination,
    EmbeddingError,
    Face,
    FaceAnalyzer,
    Identity,
    KeypointError,
    PhotoError,
    box_mask,
    identity_from_photos,
    load_photo,
    load_precomputed,
    resize_img,
)

__all__ = ["Frame", "check_files", "face_box_mask", "keypoint_picture", "on_canvas", "photos_table", "read_identity", "read_keypoints", "read_mask"]

Frame = Callable[[np.ndarray, np.ndarray | None], np.ndarray]
"""What `on_canvas` takes as `frame`; `defaults.framed` is one."""
PRECOMPUTED = (".npz", ".npy")


def check_files(paths: Sequence[Path]) -> None:
    """Raises `PhotoError` for the first that is no file; for a command line to say so before anything slow."""
    for path in paths:
        if not path.is_file():
            raise PhotoError("missing", f"{path}: is not a file" if path.exists() else f"{path}: there is no such file")


def read_identity(
    paths: Sequence[Path],
    analyzer: Callable[[], FaceAnalyzer],
    embedding_dim: int | None = None,
    face_index: int | None = None,
    combine: Combination = "mean",
    weights: Sequence[float] | None = None,
) -> Identity:
    """Photos of one person (put together as `combine` and `weights` of `face.combine_embeddings` say), or one .npz / .npy with a
    precomputed embedding.

    Photos pass through the published `resize_img` first; messages are in pixels of the files. `analyzer` gives the face backend and
    is called for photos alone: a precomputed face needs none. `embedding_dim` is what the weights expect; None for a pose, of which
    the keypoints count, and which may be a .json (`read_keypoints`).
    Raises the face package's errors.
    """
    if embedding_dim is None and len(paths) == 1 and paths[0].suffix == ".json":
        return read_keypoints(paths[0])
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
    options = {"combine": combine, "weights": weights}
    return identity_from_photos(backend, photos, face_index=face_index, names=names, original_sizes=sizes, **options)


def photos_table(identity: Identity) -> str:
    """Of each photo how much it counted and how similar it is to the others, one line each; empty for a single photo."""
    if len(identity.reports) < 2:
        return ""
    lines = []
    for report in identity.reports:
        told = "left out" if report.weight == 0 else f"counts {report.weight:.2f}"
        rest = "no face" if report.rest is None else f"similarity to the others {report.rest:.2f}, length {report.embedding_norm:.1f}"
        lines.append(f"{Path(report.name).name}: {told}, {rest}")
    return "\n".join(lines)


def read_keypoints(path: Path) -> Identity:
    """A pose without a face from ``{"keypoints": five [x, y], "size": [width, height]}`` in pixels. Raises `KeypointError` naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or set(content) != {"keypoints", "size"}:
            raise ValueError("needs keypoints and size, and nothing else")
        kps, size = np.asarray(content["keypoints"], np.float32), content["size"]
        if kps.shape != (5, 2) or not np.isfinite(kps).all():
            raise ValueError("keypoints must be five [x, y]")
        if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            raise ValueError(f"size must be two whole numbers (width, height), not {size!r}")
        if ((kps < 0) | (kps >= np.asarray(size))).any(axis=1).all():
            raise ValueError(f"all keypoints lie outside the picture of {size[0]} x {size[1]} pixels")
    except (ValueError, TypeError, RecursionError) as error:
        raise KeypointError("keypoints_file", f"{path}: is no file of keypoints: {error}") from error
    nobody = np.zeros(0, np.float32)
    return Identity(nobody, Face(np.concatenate([kps.min(axis=0), kps.max(axis=0)]), kps, 1.0, nobody), (size[0], size[1]), "precomputed")


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
    frame: Frame | None = None,
) -> Image.Image:
    """The five keypoints of a pose, drawn on a canvas of the output's size (`on_canvas`); `scale` is `ModelConfig.keypoint_scale`.

    The keypoints are moved with the photo before they are drawn, so lines and dots always have their published thickness.
    """
    size, moved = on_canvas(pose, width, height, long_side, frame)
    return Image.fromarray(draw_keypoints(size, moved(_keypoints(pose)), scale))


def face_box_mask(pose: Identity, width: int | None, height: int | None, long_side: int, frame: Frame | None = None) -> np.ndarray:
    """A mask that is white in the pose's face box, on the canvas of `keypoint_picture`: uint8 [h, w].

    Raises `KeypointError` where the pose has no detector's box, as it comes from a stored face.
    """
    if pose.face is None or pose.analyzer == "precomputed":
        raise KeypointError("no_box", "a stored face has no face box: give --pose with a photo, or draw the region as --control-mask")
    size, moved = on_canvas(pose, width, height, long_side, frame)
    return box_mask(size, moved(pose.face.bbox.reshape(2, 2)).ravel(), "the pose's face")


def on_canvas(
    pose: Identity, width: int | None, height: int | None, long_side: int, frame: Frame | None = None
) -> tuple[tuple[int, int], Callable[[np.ndarray], np.ndarray]]:
    """(width, height) of the output, and what moves points [n, 2] of the pose's photo to it.

    Without width and height the canvas has the photo's proportions, `long_side` pixels long, in multiples of 64; with one of them the
    other follows. With `frame`, which takes keypoints, and points beside them, to parts of a square picture, the photo's own framing
    does not count and the canvas is square.
    """
    keypoints = _keypoints(pose)
    assert pose.size is not None
    w, h = pose.size
    if frame is not None:
        square = (width or long_side, height or long_side)
        return square, lambda points: frame(keypoints, points) * np.asarray(square, np.float32)
    if width and height:
        size = (width, height)
    elif width or height:  # the other side follows from the photo's proportions
        factor = width / w if width else (height or 0) / h
        size = (width or max(64, round(w * factor / 8) * 8), height or max(64, round(h * factor / 8) * 8))
    else:
        factor = long_side / max(w, h)
        size = (max(64, round(w * factor) // 64 * 64), max(64, round(h * factor) // 64 * 64))
    return size, lambda points: np.asarray(points, np.float32) * np.asarray([size[0] / w, size[1] / h], np.float32)


def _keypoints(pose: Identity) -> np.ndarray:
    if pose.face is None or pose.size is None:
        raise KeypointError("no_keypoints", "the pose has no keypoints: give --pose with a photo or an .npz that holds kps and size")
    return pose.face.kps


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A control mask from a picture file, as uint8 [h, w] for pictures of ``size = (width, height)``: white is where control acts."""
    return np.asarray(load_photo(path).convert("L").resize(size, Image.Resampling.BILINEAR))
