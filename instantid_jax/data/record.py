"""One training photo with all that is known of it, and its form on disk.

On disk a record is one `tf.train.Example`, the form of `tensorflow-datasets`, inside ArrayRecord files. `to_example` gives the
values that a TFDS builder writes; `parse_example` reads the bytes back without TensorFlow. Arrays of free shape (latents, text
states, dense landmarks) are stored in numpy's `.npy` form, which is read without pickle: data can never run code.
"""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "CachedLatents",
    "CachedText",
    "DataError",
    "Record",
    "View",
    "check_record",
    "decode_array",
    "encode_array",
    "parse_example",
    "parse_index_fields",
    "to_example",
]


class DataError(ValueError):
    """Training data that cannot be used; the message names the record or file."""


class View(NamedTuple):
    """How an upright photo becomes a picture of a fixed size: resize to (resized_h, resized_w), then cut out a window. All in pixels."""

    resized_h: int
    resized_w: int
    top: int
    left: int
    h: int
    w: int


@dataclass(frozen=True, eq=False)
class CachedLatents:
    """The autoencoder's posterior of one view of the photo, unscaled."""

    mean: np.ndarray
    """[h, w, c] float16 or float32."""
    logvar: np.ndarray
    """[h, w, c] like `mean`."""
    view: View
    """The view that was encoded; keypoints and micro-conditions follow it."""
    encoder: str = ""
    """Name or fingerprint of the autoencoder's weights."""


@dataclass(frozen=True, eq=False)
class CachedText:
    """The text encoders' output for `Record.caption`."""

    states: np.ndarray
    """[n, c] float16 or float32, both encoders side by side."""
    pooled: np.ndarray
    """[p] like `states`."""
    encoder: str = ""
    """Name or fingerprint of the text encoders' weights."""


@dataclass(frozen=True, eq=False)
class Record:
    """One photo of one person. Positions are x then y, in pixels of the photo after its EXIF orientation is applied."""

    key: str
    """Unique within a data set; decides the place in its files."""
    image: bytes
    """The encoded picture as it came (JPEG, PNG, WEBP, BMP, TIFF), EXIF orientation included; empty where only latents are kept."""
    size: tuple[int, int]
    """(height, width) of the upright photo."""
    keypoints: np.ndarray
    """[5, 2] float32: image-left eye, image-right eye, nose, mouth left, mouth right."""
    face_box: np.ndarray
    """[4] float32: x0, y0, x1, y1."""
    embeddings: np.ndarray
    """[n, d] float32, as the embedder gives them. Row 0 is of this photo; others are of other photos of the same person."""
    embedder: str
    """Name of the face analyzer that made `embeddings`."""
    embedding_scale: float = 1.0
    """What an embedding is multiplied with before the resampler."""
    det_score: float = 1.0
    """The detector's confidence in [0, 1]."""
    caption: str = ""
    caption_identity: str = ""
    """The caption with words for the person's looks; empty where there is none."""
    identity: str = ""
    """Who it is, as a label that photos of one person share; empty where unknown."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """Anything else, as JSON values: attributes of rendered heads, tags."""
    split: str = "train"
    source: str = ""
    """Where the photo comes from: an address, a file name, a data set."""
    licence: str = ""
    """Under which terms."""
    landmarks: np.ndarray | None = None
    """[n, 2] float32: denser landmarks, or None."""
    latents: CachedLatents | None = None
    text: CachedText | None = None


def check_record(record: Record) -> Record:
    """The record itself, once all its fields fit their description. Raises `DataError` naming the record and the field."""

    def require(good: bool, name: str, expected: str, found: Any) -> None:
        if not good:
            raise DataError(f"record {record.key!r}: {name} must be {expected}, got {found}")

    require(bool(record.key), "key", "a non-empty string", repr(record.key))
    require(len(record.size) == 2 and min(record.size) >= 1, "size", "(height, width) of at least one pixel", record.size)
    shapes = (("keypoints", record.keypoints, (5, 2)), ("face_box", record.face_box, (4,)))
    for name, array, shape in shapes:
        found = np.asarray(array)
        require(found.shape == shape and found.dtype.kind == "f" and bool(np.isfinite(found).all()), name, f"finite floats {list(shape)}", found)
    rows = np.asarray(record.embeddings)
    require(rows.ndim == 2 and min(rows.shape) >= 1 and rows.dtype.kind == "f", "embeddings", "floats [n, d]", f"{rows.dtype} {list(rows.shape)}")
    require(bool(np.isfinite(rows).all()), "embeddings", "finite", "NaN or infinity")
    require(math.isfinite(record.embedding_scale) and record.embedding_scale > 0, "embedding_scale", "positive", record.embedding_scale)
    require(bool(record.image) or record.latents is not None, "image", "given where there are no latents", "nothing")
    if record.landmarks is not None:
        shape = np.shape(record.landmarks)
        require(len(shape) == 2 and shape[1:] == (2,), "landmarks", "floats [n, 2]", list(shape))
    if record.latents is not None:
        mean, logvar = record.latents.mean, record.latents.logvar
        require(mean.ndim == 3 and mean.shape == logvar.shape, "latents", "mean and logvar [h, w, c]", f"{list(mean.shape)} and {list(logvar.shape)}")
    return record


# --- arrays as bytes ------------------------------------------------------------------------------------------------------


def encode_array(array: np.ndarray) -> bytes:
    """An array as the bytes of a `.npy` file. Raises `DataError` for arrays of Python objects."""
    if array.dtype.hasobject:
        raise DataError("an array of Python objects cannot be stored")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def decode_array(data: bytes, where: str = "array") -> np.ndarray:
    """The inverse of `encode_array`, as a read-only view of `data`. Raises `DataError` for anything but a plain array in `.npy` form."""
    if data[:8] != b"\x93NUMPY\x01\x00":
        kind = "a pickle, which is never read" if data[:1] == b"\x80" else f"something that begins with {data[:8]!r}"
        raise DataError(f"{where}: expected the bytes of a .npy file, got {kind}")
    start = 10 + int.from_bytes(data[8:10], "little")
    shape, dtype = _read_header(data[:start], where)
    expected = start + math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise DataError(f"{where}: {len(data)} bytes where an array {list(shape)} of {dtype} has {expected}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


@functools.lru_cache(maxsize=256)
def _read_header(header: bytes, where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type out of a `.npy` header; the few that a data set has are parsed once."""
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header[8:]))
    except (ValueError, SyntaxError, TypeError) as error:
        raise DataError(f"{where}: the array's header is damaged ({error})") from error
    if dtype.hasobject or fortran:
        raise DataError(f"{where}: an array of {'Python objects' if dtype.hasobject else 'Fortran order'} is not read")
    return shape, dtype


# --- records as examples --------------------------------------------------------------------------------------------------


def to_example(record: Record) -> dict[str, Any]:
    """The record as plain values for TFDS: strings, bytes and arrays, one for each feature of `builder.features`. Checks it first."""
    check_record(record)
    latents, text = record.latents, record.text
    return {
        "key": record.key,
        "image": record.image,
        "size": np.asarray(record.size, np.int32),
        "keypoints": np.asarray(record.keypoints, np.float32),
        "face_box": np.asarray(record.face_box, np.float32),
        "embeddings": np.asarray(record.embeddings, np.float32),
        "embedding_dim": np.int32(record.embeddings.shape[1]),
        "embedder": record.embedder,
        "embedding_scale": np.float32(record.embedding_scale),
        "det_score": np.float32(record.det_score),
        "caption": record.caption,
        "caption_identity": record.caption_identity,
        "identity": record.identity,
        "labels": json.dumps(dict(record.labels), sort_keys=True, ensure_ascii=False) if record.labels else "",
        "split": record.split,
        "source": record.source,
        "licence": record.licence,
        "landmarks": b"" if record.landmarks is None else encode_array(np.asarray(record.landmarks, np.float32)),
        "latent_mean": b"" if latents is None else encode_array(latents.mean),
        "latent_logvar": b"" if latents is None else encode_array(latents.logvar),
        "latent_view": np.asarray((0,) * 6 if latents is None else latents.view, np.int32),
        "latent_encoder": "" if latents is None else latents.encoder,
        "text_states": b"" if text is None else encode_array(text.states),
        "text_pooled": b"" if text is None else encode_array(text.pooled),
        "text_encoder": "" if text is None else text.encoder,
    }


@functools.cache
def _example_class() -> Any:
    from tensorflow_datasets.proto import tf_example_pb2  # costs most of a second, and only disk readers need it

    return tf_example_pb2.Example  # type: ignore[attr-defined]


def _features(data: bytes, where: str) -> Any:
    try:
        return _example_class().FromString(data).features.feature
    except Exception as error:  # protobuf's DecodeError moves between its backends
        raise DataError(f"{where}: is not a tf.train.Example ({error})") from error


def parse_index_fields(data: bytes, where: str = "record") -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """(size, size of the cached view or zeros, identity) out of a serialised example, and nothing else of it. Raises `DataError`."""
    feature = _features(data, where)
    size, view, identity = feature["size"].int64_list.value, feature["latent_view"].int64_list.value, feature["identity"].bytes_list.value
    if (len(size), len(view), len(identity)) != (2, 6, 1):
        raise DataError(f"{where}: has no size, latent_view or identity; prepare the data set again with this version")
    return tuple(size), tuple(view[4:]), identity[0].decode("utf-8")


class _Features:
    """The features of a serialised example by name and kind. Each method raises `DataError` for one that is missing or of another size."""

    def __init__(self, data: bytes, where: str) -> None:
        self._feature, self._where = _features(data, where), where

    def _wrong(self, what: str) -> DataError:
        return DataError(f"{self._where}: the feature {what}; prepare the data set again with this version")

    def blob(self, name: str) -> bytes:
        values = self._feature[name].bytes_list.value
        if len(values) != 1:
            raise self._wrong(f"{name!r} is missing")
        return values[0]

    def string(self, name: str) -> str:
        return self.blob(name).decode("utf-8")

    def floats(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = np.array(self._feature[name].float_list.value, np.float32)
        if values.size == 0 or values.size % abs(math.prod(shape)):
            raise self._wrong(f"{name!r} has {values.size} values for the shape {list(shape)}")
        return values.reshape(shape)

    def integers(self, name: str, count: int) -> list[int]:
        values = list(self._feature[name].int64_list.value)
        if len(values) != count:
            raise self._wrong(f"{name!r} has {len(values)} values instead of {count}")
        return values

    def array(self, name: str) -> np.ndarray | None:
        """An array in `.npy` form, or None where none is stored."""
        stored = self.blob(name)
        return decode_array(stored, name) if stored else None


def parse_example(data: bytes, where: str = "record") -> Record:
    """A record out of a serialised `tf.train.Example`; arrays are views or copies, the picture stays encoded.

    Raises `DataError` naming `where` for bytes that are no such example or lack a feature.
    """
    f = _Features(data, where)
    mean, logvar = f.array("latent_mean"), f.array("latent_logvar")
    states, pooled = f.array("text_states"), f.array("text_pooled")
    latents = text = None
    if mean is not None and logvar is not None:
        latents = CachedLatents(mean, logvar, View(*f.integers("latent_view", 6)), f.string("latent_encoder"))
    if states is not None and pooled is not None:
        text = CachedText(states, pooled, f.string("text_encoder"))
    height, width = f.integers("size", 2)
    labels = f.blob("labels")
    return Record(
        key=f.string("key"),
        image=f.blob("image"),
        size=(height, width),
        keypoints=f.floats("keypoints", (5, 2)),
        face_box=f.floats("face_box", (4,)),
        embeddings=f.floats("embeddings", (-1, *f.integers("embedding_dim", 1))),
        embedder=f.string("embedder"),
        embedding_scale=float(f.floats("embedding_scale", (1,))[0]),
        det_score=float(f.floats("det_score", (1,))[0]),
        caption=f.string("caption"),
        caption_identity=f.string("caption_identity"),
        identity=f.string("identity"),
        labels=json.loads(labels) if labels else {},
        split=f.string("split"),
        source=f.string("source"),
        licence=f.string("licence"),
        landmarks=f.array("landmarks"),
        latents=latents,
        text=text,
    )
