"""Which inputs become records: each filter refuses with a code that is counted and a sentence that names the sample.

`Examiner` decides on one input alone, so it runs anywhere and in any order. Duplicates are a matter between records: a record is
refused where an earlier one has nearly its `fingerprint`. To find such pairs among millions, fingerprints that differ in at most
7 of 256 bits are equal in at least one of 8 bands of 32 bits, so only records that share a band are compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from instantid_jax.data.inputs import Candidate, KnownFace, Refusal
from instantid_jax.data.record import DataError, Record, check_record
from instantid_jax.data.transforms import decode_photo
from instantid_jax.face.analyzer import Face, FaceAnalyzer
from instantid_jax.face.errors import FaceError
from instantid_jax.face.identity import check_embedding, examine_photo, largest_face
from instantid_jax.face.keypoints import keypoints_outside
from instantid_jax.options import Range

__all__ = [
    "Accepted",
    "Examiner",
    "FilterConfig",
    "FirstSeen",
    "alike",
    "bands",
    "fingerprint",
    "refuse_duplicate",
    "refuse_key",
    "split_by_share",
]


_BRIGHTER = 4
_BAND = 4
_DIFFERENT_BITS = 7
_RANGES = {
    "min_side": Range(0),
    "max_faces": Range(1),
    "min_face_share": Range(0, 1, below=True),
    "min_det_score": Range(0, 1),
    "min_eye_distance": Range(0),
}


@dataclass(frozen=True)
class FilterConfig:
    """What a photo needs to become a record."""

    min_side: int = 512
    """Shorter side in pixels, after EXIF orientation. [code: small]"""
    max_faces: int = 1
    """Faces that may be in the photo; of several the largest is taken. [no_face, several_faces]"""
    min_face_share: float = 0.01
    """Area of the face box inside the photo, over the photo's area. [face_share]"""
    min_det_score: float = 0.7
    """The detector's confidence. [det_score]"""
    min_eye_distance: float = 0.0
    """Distance between the eyes in pixels. [eye_distance]"""
    keypoints_inside: bool = True
    """Whether all five keypoints must lie inside the photo. [keypoints_outside]"""
    caption: bool = True
    """Whether there must be a caption. [no_caption]"""
    licence: bool = False
    """Whether there must be a licence. [no_licence]"""
    duplicates: Literal["picture", "bytes", "none"] = "picture"
    """What is refused as a duplicate: nearly the same picture (resized, compressed anew), only the same file, or nothing. [duplicate]"""
    search_harder: bool = False
    """Whether photos without a face are tried again at other detector sizes and with borders, at up to twelve times the time."""

    def __post_init__(self) -> None:
        for name, allowed in _RANGES.items():
            if problem := allowed.problem(getattr(self, name)):
                raise DataError(f"FilterConfig: {name} {problem}")


@dataclass(frozen=True, eq=False)
class Accepted:
    """A record that passed, with what duplicates share."""

    record: Record
    fingerprint: bytes


def fingerprint(data: bytes, image: Image.Image, kind: str) -> bytes:
    """32 bytes that duplicates share, wholly or nearly; none for ``kind="none"``.

    "bytes" is the file's SHA-256. "picture" is a difference hash: for each place of a 16 x 16 grid one bit, whether its right
    neighbour is brighter by more than four levels; resizing and compression change few of them.
    """
    if kind == "none":
        return b""
    if kind == "bytes":
        return hashlib.sha256(data).digest()
    gray = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    return np.packbits(gray[:, 1:] - gray[:, :-1] > _BRIGHTER).tobytes()


def bands(mark: bytes, kind: str) -> list[bytes]:
    """What duplicates have in common at least one of."""
    if not mark or kind == "bytes":
        return [mark] if mark else []
    return [bytes([i]) + mark[i : i + _BAND] for i in range(0, len(mark), _BAND)]


def alike(a: bytes, b: bytes, kind: str) -> bool:
    """Whether two fingerprints are of duplicates."""
    return a == b or (kind == "picture" and (int.from_bytes(a) ^ int.from_bytes(b)).bit_count() <= _DIFFERENT_BITS)


def split_by_share(candidate: Candidate, share: float) -> str:
    """The candidate's own split, or else "test" for `share` of all persons (of all photos where persons are unknown) and "train"."""
    if candidate.split:
        return candidate.split
    digest = hashlib.sha256((candidate.identity or candidate.key).encode("utf-8")).digest()
    return "test" if int.from_bytes(digest[:8], "big") < share * 2**64 else "train"


class Examiner:
    """Applies the filters to one input after the other, and finds and embeds its face.

    `make_analyzer` is called once a thread and process, as analyzers serve one thread. `embedding_scale` is stored with every
    record. `splits` are the names that exist; `holdout` is the share of persons in "test" among inputs that name no split.
    """

    def __init__(
        self,
        config: FilterConfig,
        make_analyzer: Callable[[], FaceAnalyzer],
        embedding_scale: float = 1.0,
        splits: tuple[str, ...] = ("train",),
        holdout: float = 0.0,
    ) -> None:
        self.config, self.splits, self.holdout = config, splits, holdout
        self._make, self._scale = make_analyzer, embedding_scale
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def split(self, candidate: Candidate) -> str:
        """Which split the candidate belongs to."""
        return split_by_share(candidate, self.holdout)

    def __call__(self, candidate: Candidate) -> Accepted | Refusal:
        """A checked record, or the first reason against it. Never raises: a sample that breaks something is refused as "failed"."""
        try:
            return self._examine(candidate)
        except FaceError as error:
            return Refusal(candidate.key, error.code, str(error), candidate.source)
        except _Refused as refused:
            return Refusal(candidate.key, refused.code, f"{candidate.key}: {refused}", candidate.source)
        except DataError as error:
            return Refusal(candidate.key, "bad_record", str(error), candidate.source)
        except Exception as error:  # one sample among millions must not end the job; it is counted and named
            return Refusal(candidate.key, "failed", f"{candidate.key}: {type(error).__name__}: {error}", candidate.source)

    def _examine(self, candidate: Candidate) -> Accepted:
        config = self.config
        split = self.split(candidate)
        _require(split in self.splits, "split", f"its split {split!r} is none of {', '.join(self.splits)}")
        _require(bool(candidate.caption) or not config.caption, "no_caption", "has no caption")
        _require(bool(candidate.licence) or not config.licence, "no_licence", "has no licence")
        image = decode_photo(candidate.image, candidate.key)
        side = min(image.size)
        _require(side >= config.min_side, "small", f"{image.width} x {image.height} pixels, the shorter side must have {config.min_side}")
        pixels = np.asarray(image)
        face = self._find(candidate, pixels) if candidate.face is None else self._complete(candidate, candidate.face, pixels)
        self._check_face(face, image.size)
        record = Record(
            key=candidate.key,
            image=candidate.image,
            size=(image.height, image.width),
            keypoints=np.asarray(face.keypoints, np.float32),
            face_box=np.asarray(face.face_box, np.float32),
            embeddings=np.asarray(face.embeddings, np.float32),
            embedder=face.embedder,
            embedding_scale=self._scale,
            det_score=face.det_score,
            caption=candidate.caption,
            caption_identity=candidate.caption_identity,
            identity=candidate.identity,
            labels=candidate.labels,
            split=split,
            source=candidate.source,
            licence=candidate.licence,
            landmarks=candidate.landmarks,
        )
        return Accepted(check_record(record), fingerprint(candidate.image, image, config.duplicates))

    def _check_face(self, face: KnownFace, size: tuple[int, int]) -> None:
        config, (width, height) = self.config, size
        x0, y0, x1, y1 = np.clip(face.face_box, 0, [width, height, width, height])  # type: ignore[arg-type]
        share = float(max(x1 - x0, 0) * max(y1 - y0, 0) / (width * height))
        _require(face.det_score >= config.min_det_score, "det_score", f"the face's score {face.det_score:.2f} is below {config.min_det_score}")
        _require(share >= config.min_face_share, "face_share", f"the face takes {share:.4f} of the photo, less than {config.min_face_share}")
        eyes = float(np.hypot(*(face.keypoints[1] - face.keypoints[0])))
        _require(eyes >= config.min_eye_distance, "eye_distance", f"the eyes are {eyes:.1f} pixels apart, less than {config.min_eye_distance}")
        outside = keypoints_outside(face.keypoints, size)
        _require(not outside or (outside < 5 and not config.keypoints_inside), "keypoints_outside", f"{outside} of 5 keypoints lie outside the photo")

    @property
    def analyzer(self) -> FaceAnalyzer:
        """This thread's face analyzer."""
        if not hasattr(self._local, "analyzer"):
            self._local.analyzer = self._make()
        return self._local.analyzer

    def _find(self, candidate: Candidate, pixels: np.ndarray) -> KnownFace:
        """The largest face that the detector finds; keypoints, box and embedding are of this one face."""
        if self.config.search_harder:
            face, report = examine_photo(self.analyzer, pixels, on_none="skip", on_several="largest", name=candidate.key)
            count = report.faces
        else:
            faces = self.analyzer.analyze(pixels)
            count = len(faces)
            face = faces[largest_face(faces)] if faces else None
        if face is None:
            raise _Refused("no_face", f"no face found in {pixels.shape[1]} x {pixels.shape[0]} pixels")
        _require(count <= self.config.max_faces, "several_faces", f"{count} faces found, at most {self.config.max_faces} may be there")
        return self._known(face)

    def _known(self, face: Face) -> KnownFace:
        embedding = check_embedding(face.embedding, self.analyzer.embedding_dim)
        return KnownFace(face.kps, embedding[None], face.bbox, face.det_score, self.analyzer.name)

    def _complete(self, candidate: Candidate, face: KnownFace, pixels: np.ndarray) -> KnownFace:
        """What the input says about the face, and the embedding and box where it does not."""
        box = face.face_box
        if box is None:
            low, high = face.keypoints.min(axis=0), face.keypoints.max(axis=0)
            margin = (high - low) * np.float32(0.6)  # a detector's box reaches about that far beyond eyes and mouth
            box = np.concatenate([low - margin, high + margin]).astype(np.float32)
        if face.embeddings is not None:
            return dataclasses.replace(face, face_box=box)
        shown = pixels if candidate.face_image is None else candidate.face_image
        found = self._find(candidate, shown)
        marks = found.keypoints * (pixels.shape[1] / shown.shape[1])
        near = np.hypot(*(marks - face.keypoints).T).mean() <= np.hypot(*(face.keypoints[1] - face.keypoints[0]))
        _require(bool(near), "other_face", "the detector finds another face than the keypoints mark")
        return dataclasses.replace(face, face_box=box, embeddings=found.embeddings, embedder=found.embedder, det_score=found.det_score)


class _Refused(Exception):
    """A filter's verdict on its way out."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _require(good: bool, code: str, message: str) -> None:
    if not good:
        raise _Refused(code, message)


class FirstSeen:
    """Lets the first of equal keys and of duplicates pass, in the order in which they are shown; about 2 kB a record."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._keys: set[bytes] = set()
        self._marks: list[tuple[bytes, str]] = []
        self._bands: dict[bytes, list[int]] = {}

    def __call__(self, accepted: Accepted) -> Accepted | Refusal:
        """What is given, or its refusal as "duplicate_key" or "duplicate"."""
        record, mark = accepted.record, accepted.fingerprint
        key = hashlib.sha256(record.key.encode("utf-8")).digest()[:16]
        if key in self._keys:
            return refuse_key(accepted)
        self._keys.add(key)
        shared = bands(mark, self._kind)
        near = sorted({i for band in shared for i in self._bands.get(band, ())})
        first = next((self._marks[i][1] for i in near if alike(mark, self._marks[i][0], self._kind)), None)
        for band in shared:
            self._bands.setdefault(band, []).append(len(self._marks))
        self._marks.append((mark, record.key))
        return accepted if first is None else refuse_duplicate(accepted, first)


def refuse_key(accepted: Accepted) -> Refusal:
    """The refusal of a record whose key another one has."""
    return Refusal(accepted.record.key, "duplicate_key", f"{accepted.record.key}: another record has this key", accepted.record.source)


def refuse_duplicate(accepted: Accepted, first: str) -> Refusal:
    """The refusal of a record that shows the same picture as the record `first`."""
    return Refusal(accepted.record.key, "duplicate", f"{accepted.record.key}: is the same picture as {first}", accepted.record.source)
