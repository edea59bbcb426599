"""From photos (or a stored file) to one identity: an embedding and the face whose keypoints are drawn.

The face of a photo is the largest by area. Several photos of one person give one identity, the mean of their raw embeddings
(arXiv 2401.07519), with the keypoints of the first. A face that the detector misses at its usual size is looked for at smaller
sizes and with a border around the photo, because close-ups are missed when the face fills the frame.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from PIL import Image

from instantid_jax.face.align import check_keypoints
from instantid_jax.face.analyzer import Face, FaceAnalyzer
from instantid_jax.face.combine import Combination, combine_embeddings
from instantid_jax.face.errors import EmbeddingError, FaceError, KeypointError
from instantid_jax.face.keypoints import keypoints_outside
from instantid_jax.face.photo import rgb_array

__all__ = [
    "Identity",
    "PhotoReport",
    "analyze_photo",
    "check_embedding",
    "examine_photo",
    "find_faces",
    "identity_from_photos",
    "largest_face",
    "load_precomputed",
    "save_precomputed",
]

Photo = Image.Image | np.ndarray
OnNone = Literal["error", "skip"]
OnSeveral = Literal["error", "largest"]

DET_SIZES = tuple(range(640, 191, -64))
"""Detector sizes, tried in this order until a face is found."""

BORDERS = (0.25, 0.5)
"""Then borders around the photo, as parts of its longer side, first white and then black."""

_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class PhotoReport:
    """How the face of one photo was found."""

    name: str
    size: tuple[int, int]
    """(width, height) of the photo in pixels."""
    faces: int
    """How many faces were found; 0 for a photo that was left out."""
    det_score: float
    embedding_norm: float
    det_size: int
    """The detector size at which it was found."""
    border: int
    """Pixels of border that were needed around the photo."""
    keypoints_outside: int
    """How many of the five keypoints lie outside the photo."""
    similarity: float | None = None
    """Cosine of this photo's embedding with the mean over all photos; None for a single photo. A low one is another person."""
    rest: float | None = None
    """Cosine of this photo's embedding with the other photos; None for a single photo."""
    weight: float = 0.0
    """How much of the identity is this photo's; the photos' weights sum to 1."""


@dataclass(frozen=True, eq=False)
class Identity:
    """Whom to draw."""

    embedding: np.ndarray
    """(d,) float32, the raw embedding, or the mean of several."""
    face: Face | None
    """The first photo's face; None where only an embedding was stored (keypoints then come from a pose photo)."""
    size: tuple[int, int] | None
    """(width, height) of the photo that the keypoints belong to."""
    analyzer: str
    """Name of the face analyzer, or "precomputed"."""
    reports: tuple[PhotoReport, ...] = ()

    @property
    def kps(self) -> np.ndarray | None:
        """The five keypoints (5, 2), or None."""
        return None if self.face is None else self.face.kps


def check_embedding(embedding: Any, dim: int | None = None, where: str = "embedding") -> np.ndarray:
    """An embedding as a finite float32 (d,) array; (1, d) is accepted. Raises `EmbeddingError` naming `where`."""
    vector = np.asarray(embedding)
    if vector.ndim == 2 and vector.shape[0] == 1:
        vector = vector[0]
    if vector.ndim != 1 or vector.size == 0 or vector.dtype.kind not in "fiu":
        raise EmbeddingError("embedding_shape", f"{where}: a face embedding has shape (d,), got {vector.dtype} of shape {np.shape(embedding)}")
    if dim is not None and vector.size != dim:
        raise EmbeddingError("embedding_dim", f"{where}: has {vector.size} values where {dim} are expected; it is of another face analyzer")
    with np.errstate(over="ignore"):
        vector = vector.astype(np.float32)
    if not np.isfinite(vector).all():
        raise EmbeddingError("embedding_not_finite", f"{where}: {np.count_nonzero(~np.isfinite(vector))} of {vector.size} values are NaN or infinite")
    if np.linalg.norm(vector) < 1e-6:
        raise EmbeddingError("embedding_zero", f"{where}: all values are zero, which is no face")
    return vector


def largest_face(faces: Sequence[Face]) -> int:
    """Index of the face with the largest box area (not of the highest score). Raises `FaceError` for an empty list."""
    if not faces:
        raise FaceError("no_face", "no face to choose from")
    return max(reversed(range(len(faces))), key=lambda i: faces[i].area)


def _attempts(image: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
    """(picture, detector size, border) in the order in which they are tried."""
    for det_size in DET_SIZES:
        yield image, det_size, 0
    for part in BORDERS:
        border = math.ceil(part * max(image.shape[:2]))
        for gray in (255, 0):
            yield np.pad(image, ((border, border), (border, border), (0, 0)), constant_values=gray), DET_SIZES[0], border


def _find(analyzer: FaceAnalyzer, image: np.ndarray) -> tuple[list[Face], int, int]:
    """Faces from left to right in pixels of `image`, with the detector size and border at which they were found."""
    for picture, det_size, border in _attempts(image):
        found = analyzer.analyze(picture, det_size)
        if found:
            shift = np.float32(border)
            faces = [replace(face, bbox=face.bbox - shift, kps=face.kps - shift) for face in found]
            return sorted(faces, key=lambda face: float(face.bbox[0] + face.bbox[2])), det_size, border
    return [], DET_SIZES[-1], 0


def find_faces(analyzer: FaceAnalyzer, image: Photo, *, name: str = "photo") -> list[Face]:
    """All faces of a photo from left to right, in pixels of that photo, looked for as in `analyze_photo`. Raises `FaceError` where there is none."""
    pixels = rgb_array(image, name)
    faces = _find(analyzer, pixels)[0]
    if not faces:
        raise FaceError("no_face", f"{name}: no face found in {pixels.shape[1]} x {pixels.shape[0]} pixels, even at smaller sizes and with borders")
    return [replace(face, kps=check_keypoints(face.kps, name).astype(np.float32)) for face in faces]


def _choose(faces: Sequence[Face], face_index: int | None, on_several: OnSeveral, name: str, scale: np.ndarray) -> Face:
    """The face that is wanted; `scale` takes (x, y) to the pixels of messages."""
    if face_index is not None:
        if not 0 <= face_index < len(faces):
            raise FaceError("bad_index", f"{name}: there is no face {face_index}; {len(faces)} found, counted 0 to {len(faces) - 1} from the left")
        return faces[face_index]
    largest = largest_face(faces)
    if len(faces) > 1 and on_several == "error":
        x0, y0, x1, y1 = (faces[largest].bbox.reshape(2, 2) * scale).ravel().round().astype(int)
        raise FaceError(
            "several_faces",
            f"{name}: {len(faces)} faces found; the largest spans x {x0} to {x1}, y {y0} to {y1}: choose it with --face-index {largest}, "
            f"or another one with 0 to {len(faces) - 1}, counted from the left",
        )
    return faces[largest]


def _check_inside(kps: np.ndarray, size: tuple[int, int], name: str) -> None:
    """Raises `KeypointError` where no keypoint lies inside the picture of ``size = (width, height)``."""
    if keypoints_outside(kps, size) == len(kps):
        places = kps.round(1).tolist()
        raise KeypointError(
            "keypoints_outside",
            f"{name}: all keypoints {places} lie outside the photo of {size[0]} x {size[1]} pixels; they belong to another picture",
        )


def examine_photo(
    analyzer: FaceAnalyzer,
    image: Photo,
    *,
    face_index: int | None = None,
    on_none: OnNone = "error",
    on_several: OnSeveral = "error",
    name: str = "photo",
    original_size: tuple[int, int] | None = None,
) -> tuple[Face | None, PhotoReport]:
    """`analyze_photo` together with the report of how the face was found.

    `original_size` is the (width, height) that the photo had before it was resized: messages then speak in its pixels, while
    the face and the report stay in those of `image`.
    """
    for argument, value, known in (("on_none", on_none, ("error", "skip")), ("on_several", on_several, ("error", "largest"))):
        if value not in known:
            raise FaceError("bad_policy", f"{argument}={value!r} is not known; use {known[0]!r} or {known[1]!r}")
    pixels = rgb_array(image, name)
    size = (pixels.shape[1], pixels.shape[0])
    shown = size if original_size is None else original_size
    scale = np.asarray(shown, np.float64) / size
    faces, det_size, border = _find(analyzer, pixels)
    if not faces:
        if on_none == "skip":
            return None, PhotoReport(name, size, 0, 0.0, 0.0, det_size, border, 0)
        raise FaceError(
            "no_face", f"{name}: no face found in {shown[0]} x {shown[1]} pixels, even at smaller sizes and with borders; use a clear frontal photo"
        )
    face = _choose(faces, face_index, on_several, name, scale)
    kps = check_keypoints(face.kps, name).astype(np.float32)
    _check_inside(kps * scale, shown, name)
    face = replace(face, kps=kps, embedding=check_embedding(face.embedding, analyzer.embedding_dim, name))
    norm = float(np.linalg.norm(face.embedding))
    return face, PhotoReport(name, size, len(faces), face.det_score, norm, det_size, border, keypoints_outside(kps, size))


@overload
def analyze_photo(
    analyzer: FaceAnalyzer,
    image: Photo,
    *,
    face_index: int | None = None,
    on_none: Literal["error"] = "error",
    on_several: OnSeveral = "error",
    name: str = "photo",
) -> Face: ...
@overload
def analyze_photo(
    analyzer: FaceAnalyzer, image: Photo, *, face_index: int | None = None, on_none: OnNone, on_several: OnSeveral = "error", name: str = "photo"
) -> Face | None: ...
def analyze_photo(
    analyzer: FaceAnalyzer,
    image: Photo,
    *,
    face_index: int | None = None,
    on_none: OnNone = "error",
    on_several: OnSeveral = "error",
    name: str = "photo",
) -> Face | None:
    """The face of a photo (a Pillow picture or uint8 RGB [h, w, 3]), in pixels of that photo.

    With several faces, `face_index` chooses, counted from the left; else ``on_several="largest"`` takes the largest by area, and
    ``"error"`` raises. Where none is found even with smaller detector sizes and borders, ``on_none="error"`` raises and
    ``"skip"`` gives None. Keypoints are never moved into the frame. Raises `FaceError` (or `PhotoError`, `KeypointError`,
    `EmbeddingError`), whose message begins with `name`.
    """
    return examine_photo(analyzer, image, face_index=face_index, on_none=on_none, on_several=on_several, name=name)[0]


def identity_from_photos(
    analyzer: FaceAnalyzer,
    images: Sequence[Photo],
    *,
    face_index: int | Sequence[int | None] | None = None,
    on_none: OnNone = "error",
    on_several: OnSeveral = "error",
    names: Sequence[str] | None = None,
    original_sizes: Sequence[tuple[int, int]] | None = None,
    combine: Combination = "mean",
    weights: Sequence[float] | None = None,
) -> Identity:
    """One person from one or more photos: the mean of the raw embeddings, and the first photo's face.

    `combine` and `weights`, one for each photo, are those of `combine_embeddings`. `face_index` is one number for all photos or one for
    each. With ``on_none="skip"`` photos without a face are left out, which their report says. `names` and `original_sizes` are used in
    messages, as in `examine_photo`. Raises as `analyze_photo`, and `FaceError` where no photo is left.
    """
    names = [f"photo {i + 1}" for i in range(len(images))] if names is None else list(names)
    sizes: list[tuple[int, int] | None] = [None] * len(images) if original_sizes is None else list(original_sizes)
    chosen = [face_index] * len(images) if face_index is None or isinstance(face_index, int) else list(face_index)
    if weights is not None and len(weights) != len(images):
        raise FaceError("no_photos", f"got {len(weights)} weights for {len(images)} photos; give one for each, or none")
    if not images or {len(names), len(chosen), len(sizes)} != {len(images)}:
        counts = f"{len(images)} photos, {len(names)} names, {len(sizes)} sizes and {len(chosen)} face indices"
        raise FaceError("no_photos", f"got {counts}; give at least one, and equally many")
    results = [
        examine_photo(analyzer, image, face_index=index, on_none=on_none, on_several=on_several, name=name, original_size=size)
        for image, index, name, size in zip(images, chosen, names, sizes, strict=True)
    ]
    found = [(face, report) for face, report in results if face is not None]
    if not found:
        raise FaceError("no_face", f"no face found in any of {len(images)} photos: {', '.join(names)}")
    raw = np.stack([face.embedding for face, _ in found])
    counted = None if weights is None else [weight for weight, (face, _) in zip(weights, results, strict=True) if face is not None]
    combined = combine_embeddings(raw, combine, counted)
    mean = check_embedding(combined.embedding, analyzer.embedding_dim, "mean of the photos' embeddings")
    shares, reports = iter(zip(combined.weights.tolist(), combined.similarities.tolist(), strict=True)), []
    for face, report in results:
        if face is not None:
            weight, rest = next(shares)
            report = replace(report, weight=weight)
            if len(found) > 1:
                report = replace(report, rest=rest, similarity=_cosine(face.embedding, mean))
        reports.append(report)
    return Identity(mean, found[0][0], found[0][1].size, analyzer.name, tuple(reports))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def load_precomputed(path: str | os.PathLike[str], embedding_dim: int | None = None) -> Identity:
    """An identity from a file in place of a photo.

    ``.npz``: `embedding` (d,), optionally `kps` (5, 2) in pixels, and with them optionally `size` (width, height). ``.npy``: the
    embedding alone. Nothing pickled is read. `embedding_dim` is what the weights expect. Raises `EmbeddingError` or `KeypointError`.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    if "embedding" not in arrays:
        raise EmbeddingError("embedding_file", f"{path}: has no array `embedding`, only {', '.join(sorted(arrays)) or 'nothing'}")
    embedding = check_embedding(arrays["embedding"], embedding_dim, str(path))
    if "kps" not in arrays:
        return Identity(embedding, None, None, "precomputed")
    kps = check_keypoints(arrays["kps"], str(path)).astype(np.float32)
    size = _read_size(arrays.get("size"), path)
    if size is not None:
        _check_inside(kps, size, str(path))
    face = Face(np.concatenate([kps.min(axis=0), kps.max(axis=0)]), kps, 1.0, embedding)
    return Identity(embedding, face, size, "precomputed")


def _read_size(size: np.ndarray | None, path: Path) -> tuple[int, int] | None:
    if size is None:
        return None
    if size.shape != (2,) or size.dtype.kind not in "iuf" or not (np.isfinite(size).all() and (size >= 1).all() and (size == np.floor(size)).all()):
        raise EmbeddingError("embedding_file", f"{path}: `size` must be two whole numbers (width, height), got {size.tolist()}")
    return int(size[0]), int(size[1])


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise EmbeddingError("embedding_file", f"{path}: there is no such file")
    if path.suffix not in (".npz", ".npy"):
        raise EmbeddingError("embedding_file", f"{path}: a precomputed face is a .npz or .npy file")
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
        else:
            unpacked = path.stat().st_size
        if unpacked > _MAX_FILE_BYTES:
            raise EmbeddingError("embedding_file", f"{path}: {unpacked} bytes are no face embedding; at most {_MAX_FILE_BYTES} are read")
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"embedding": loaded}
        with loaded:
            return {key: np.asarray(loaded[key]) for key in loaded.files}
    except EmbeddingError:
        raise
    except (OSError, ValueError, EOFError, KeyError, MemoryError, SyntaxError, NotImplementedError, zipfile.BadZipFile) as error:
        raise EmbeddingError("embedding_file", f"{path}: cannot be read as numpy arrays ({error}); write it with numpy.savez") from error


def save_precomputed(path: str | os.PathLike[str], identity: Identity) -> None:
    """Writes an identity as the ``.npz`` that `load_precomputed` reads. An embedding is biometric data: treat the file as you treat the photo."""
    arrays: dict[str, Any] = {"embedding": identity.embedding}
    if identity.kps is not None:
        arrays["kps"] = identity.kps
        if identity.size is not None:
            arrays["size"] = np.asarray(identity.size)
    with Path(path).open("wb") as file:
        np.savez(file, **arrays)
