"""What a data set is prepared from: a folder, a manifest, or img2dataset's WebDataset shards.

A reader splits its input into shards, small picklable descriptions of work, and reads one shard at a time. That is all that an
engine needs: a loop on one machine, or Beam's workers on many. Nothing is listed or parsed as a whole, and no pickle is read:
embeddings come as numbers or as ``.npy`` files.

Every entry of an input becomes a `Candidate` or a `Refusal`; none is passed over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from etils import epath

from instantid_jax.data.record import DataError, decode_array
from instantid_jax.face.align import check_keypoints
from instantid_jax.face.errors import FaceError
from instantid_jax.face.identity import check_embedding
from instantid_jax.options import OptionError
from instantid_jax.published import did_you_mean, nearest

__all__ = ["Candidate", "FolderReader", "KnownFace", "ManifestReader", "Reader", "Refusal", "WebDatasetReader", "candidate_from_fields"]

_CHUNK_FILES = 256
_CHUNK_BYTES = 4 << 20
_SIDECARS = (".txt", ".json")
_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")


@dataclass(frozen=True, eq=False)
class KnownFace:
    """A face that the input already describes, so that no detector is run; positions in pixels of the upright photo."""

    keypoints: np.ndarray
    """[5, 2] float32."""
    embeddings: np.ndarray | None
    """[n, d] float32; None where the analyzer must still embed."""
    face_box: np.ndarray | None = None
    """[4] float32; by default the keypoints' bounds, widened to a face."""
    det_score: float = 1.0
    embedder: str = ""


@dataclass(frozen=True, eq=False)
class Candidate:
    """An input that may become a record; fields as in `Record`."""

    key: str
    image: bytes
    caption: str = ""
    caption_identity: str = ""
    identity: str = ""
    labels: Mapping[str, Any] = field(default_factory=dict)
    split: str = ""
    source: str = ""
    licence: str = ""
    landmarks: np.ndarray | None = None
    face: KnownFace | None = None
    face_image: np.ndarray | None = None
    """uint8 [h, w, 3]: the same face at the same place, maybe at another size, to embed in place of `image`."""


@dataclass(frozen=True)
class Refusal:
    """An input that does not become a record, and why."""

    key: str
    code: str
    """A short reason that can be counted."""
    message: str
    """A sentence for people."""
    source: str = ""

    def to_json(self) -> str:
        """One line of the quarantine file."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


Entry = Candidate | Refusal


class Reader(Protocol):
    """Splits an input into shards and reads them; picklable."""

    def shards(self, split: str | None = None) -> Iterator[Any]:
        """Picklable descriptions, each of a part of the input, in a fixed order; parts known to hold nothing of `split` may be left out."""
        ...

    def read(self, shard: Any, /) -> Iterator[Entry]:
        """The entries of one shard, in a fixed order."""
        ...


# --- from fields to a candidate ---------------------------------------------------------------------------------------------

_ALIASES = {"text": "caption", "url": "source", "license": "licence", "bbox": "face_box", "landmarks5": "keypoints"}
_STRINGS = ("caption", "caption_identity", "identity", "split", "source", "licence")
_FACE = ("keypoints", "face_box", "det_score", "embedding", "embedder", "landmarks")
FIELDS = frozenset((*_STRINGS, *_FACE, "labels", *_ALIASES))
"""What `candidate_from_fields` knows."""
_TYPO = 0.8


def candidate_from_fields(key: str, image: bytes, fields: Mapping[str, Any], folder: epath.Path | None = None) -> Candidate:
    """A candidate from the fields of a manifest row or of a shard's JSON.

    Known are the strings of `Candidate`, `labels` (an object), `keypoints` [5][2], `face_box` [4], `det_score`, `embedding` (a
    list of numbers, several such lists, or the name of a ``.npy`` file in `folder`), `embedder`, `landmarks` [n][2]; also `text`,
    `url`, `license` and `bbox`. Others are left alone; `refuse_unknown` refuses them. Raises `DataError` for a value of the wrong kind.
    """
    named = {_ALIASES.get(name, name): value for name, value in fields.items() if value is not None}
    strings = {}
    for name in _STRINGS:
        value = named.get(name, "")
        if not isinstance(value, str):
            raise DataError(f"{key}: {name} must be a string, got {value!r}")
        strings[name] = value.strip()
    labels = named.get("labels", {})
    if not isinstance(labels, Mapping):
        raise DataError(f"{key}: labels must be an object, got {labels!r}")
    landmarks = _numbers(key, "landmarks", named["landmarks"], (-1, 2)) if "landmarks" in named else None
    return Candidate(key, image, labels=dict(labels), landmarks=landmarks, face=_known_face(key, named, folder), **strings)


def refuse_unknown(where: str, names: Iterable[str], known: Collection[str] = FIELDS, near: float = 0.0) -> None:
    """Raises `DataError` for the first of `names` that is no field, naming the most alike; with `near`, only where one is so alike."""
    for name in names:
        if name not in known and (not near or nearest(name, known, near)):
            raise DataError(f"{where}: there is no field {name!r}{did_you_mean(name, known) or '; labels may hold anything else'}")


def _known_face(key: str, named: Mapping[str, Any], folder: epath.Path | None) -> KnownFace | None:
    if "keypoints" not in named:
        if "embedding" in named:
            raise DataError(f"{key}: has an embedding but no keypoints, which say whose it is; give both, or neither")
        return None
    embeddings = None
    if "embedding" in named:
        value = named["embedding"]
        array = _load_embedding(key, value, folder) if isinstance(value, str) else _numbers(key, "embedding", value, None)
        try:
            embeddings = np.stack([check_embedding(row, where=f"{key}: embedding") for row in np.atleast_2d(array)])
        except FaceError as error:
            raise DataError(str(error)) from error
        if not isinstance(named.get("embedder"), str):
            raise DataError(f"{key}: an embedding needs `embedder`, the name of the face analyzer that made it")
    try:
        keypoints = check_keypoints(_numbers(key, "keypoints", named["keypoints"], (5, 2)), f"{key}: keypoints")
    except FaceError as error:
        raise DataError(str(error)) from error
    box = _numbers(key, "face_box", named["face_box"], (4,)) if "face_box" in named else None
    score = float(_numbers(key, "det_score", named.get("det_score", 1.0), ()))
    return KnownFace(keypoints, embeddings, box, score, named.get("embedder", ""))


def _numbers(key: str, name: str, value: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    try:
        array = np.asarray(value, np.float32)
        array = array if shape is None else array.reshape(shape)
    except (ValueError, TypeError) as error:
        raise DataError(f"{key}: {name} must be numbers{f' of shape {list(shape)}' if shape is not None else ''}, got {value!r:.80}") from error
    if not np.isfinite(array).all():
        raise DataError(f"{key}: {name} holds NaN or infinity")
    return array


def _load_embedding(key: str, name: str, folder: epath.Path | None) -> np.ndarray:
    path = (folder or epath.Path(".")) / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{key}: the embedding {path} cannot be read ({error})") from error
    return decode_array(data, f"{key}: the embedding {name}")


# --- readers ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderReader:
    """Pictures in a folder and below it, each with an optional ``.txt`` (caption) or ``.json`` (fields) of the same name."""

    folder: str
    identity_from_folder: bool = False
    """Whether pictures in one sub-folder show one person, named by it."""
    source: str = ""
    """Source of records that name none; the file name is added."""
    licence: str = ""
    """Licence of records that name none."""

    def shards(self, split: str | None = None) -> Iterator[list[str]]:
        """Up to 256 file names, relative to the folder, in sorted order."""
        root = epath.Path(self.folder)
        if not root.is_dir():
            raise DataError(f"{self.folder}: {'is a file; name a folder' if root.exists() else 'there is no such folder'}")
        chunk: list[str] = []
        for name in _walk(root, ""):
            chunk.append(name)
            if len(chunk) == _CHUNK_FILES:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def read(self, shard: list[str], /) -> Iterator[Entry]:
        """See `Reader.read`."""
        root = epath.Path(self.folder)
        for name in shard:
            source = f"{self.source}/{name}" if self.source else name
            try:
                fields: dict[str, Any] = {"source": source, "licence": self.licence}
                if self.identity_from_folder and "/" in name:
                    fields["identity"] = name.rsplit("/", 1)[0]
                yield candidate_from_fields(name, (root / name).read_bytes(), fields | _sidecars(root / name), (root / name).parent)
            except DataError as error:
                yield Refusal(name, "bad_fields", str(error), source)
            except OSError as error:
                yield Refusal(name, "unreadable", f"{name}: cannot be read ({error})", source)


def _walk(root: epath.Path, below: str) -> Iterator[str]:
    """Files below a folder in sorted order, without hidden ones and without the side files of others."""
    entries = sorted(root.iterdir(), key=lambda path: path.name)
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, f"{below}{path.name}/")
        elif path.suffix.lower() not in _SIDECARS:
            yield below + path.name


def _sidecars(picture: epath.Path) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    text, data = picture.with_suffix(".txt"), picture.with_suffix(".json")
    if text.exists():
        fields["caption"] = _decode_text(text.read_bytes(), text.name)
    if data.exists():
        row = _decode_json(data.read_bytes(), data.name)
        refuse_unknown(data.name, row, near=_TYPO)  # programs that download write other fields of their own
        fields |= row
    return fields


def _decode_text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: is not UTF-8 text ({error})") from error


def _decode_json(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(_decode_text(data, name))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{name}: is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{name}: expected a JSON object, got {type(value).__name__}")
    return value


_ROW = FIELDS | {"image", "key"}


@dataclass(frozen=True)
class ManifestReader:
    """A JSON-lines file with one object a picture: `image` (a path, relative to the file) and fields as `candidate_from_fields` says.

    A record's key is its `key`, or its `image`. The file is read in pieces of 4 MiB and never held as a whole.
    """

    manifest: str
    rename: tuple[tuple[str, str], ...] = ()
    """Fields under other names, as (name in the file, name here)."""
    source: str = ""
    licence: str = ""
    ignore: tuple[str, ...] = ()
    """Names of fields in the file that are passed over."""

    def __post_init__(self) -> None:
        for _, name in self.rename:
            if name not in _ROW:
                raise OptionError(f"--rename to {name!r}: there is no such field{did_you_mean(name, _ROW)}")

    def shards(self, split: str | None = None) -> Iterator[tuple[int, int]]:
        """Byte ranges; a line belongs to the range in which it begins. Raises `DataError` for what is no file."""
        path = epath.Path(self.manifest)
        if not path.exists():
            raise DataError(f"{self.manifest}: there is no such file")
        if path.is_dir():
            raise DataError(f"{self.manifest}: is a folder; name a file of JSON lines")
        self._check_renamed(path)
        length = path.stat().length
        for start in range(0, length, _CHUNK_BYTES):
            yield start, min(start + _CHUNK_BYTES, length)

    def _check_renamed(self, path: epath.Path) -> None:
        """Raises `OptionError` for a name to change that no row at the file's beginning has."""
        missing, seen = {name for name, _ in self.rename}, set()
        with path.open("rb") as file:
            while missing and file.tell() < _CHUNK_BYTES and (line := file.readline()):
                with contextlib.suppress(DataError):  # such a row is refused when its turn comes
                    seen |= _decode_json(line, path.name).keys()
                missing -= seen
        if missing:
            name = sorted(missing)[0]
            raise OptionError(f"--rename from {name!r}: no row at the beginning of {path.name} has this field{did_you_mean(name, seen)}")

    def read(self, shard: tuple[int, int], /) -> Iterator[Entry]:
        """See `Reader.read`."""
        start, stop = shard
        path = epath.Path(self.manifest)
        with path.open("rb") as file:
            if start:
                file.seek(start - 1)
                file.readline()  # the rest of a line that began before
            while (at := file.tell()) < stop and (line := file.readline()):
                if line.strip():
                    yield self._entry(line, f"{path.name}@{at}", path.parent)

    def _entry(self, line: bytes, where: str, folder: epath.Path) -> Entry:
        key = where
        try:
            row = _decode_json(line, where)
            names = dict(self.rename)
            row = {names.get(name, name): value for name, value in row.items() if name not in self.ignore}
            fields = {"source": self.source, "licence": self.licence} | row
            image = fields.get("image")
            if not isinstance(image, str) or not image:
                raise DataError(f"{where}: has no `image`, the path of a picture")
            key = fields.get("key") or image
            if not isinstance(key, str):
                raise DataError(f"{where}: key must be a string, got {key!r}")
            refuse_unknown(key, row, _ROW)
            fields["source"] = fields["source"] or image
            return candidate_from_fields(key, (folder / image).read_bytes(), fields, folder)
        except DataError as error:
            return Refusal(str(key), "bad_fields", str(error), where)
        except OSError as error:
            return Refusal(str(key), "unreadable", f"{key}: cannot be read ({error})", where)


@dataclass(frozen=True)
class WebDatasetReader:
    """Tar shards in which the files of one sample follow each other and share their name up to the first dot, as img2dataset writes them.

    A sample has one picture, an optional ``.txt`` (caption) and an optional ``.json`` (fields; img2dataset's `url` is the source).
    """

    folder: str
    """The folder that holds the shards."""
    pattern: str = "*.tar"
    licence: str = ""

    def shards(self, split: str | None = None) -> Iterator[str]:
        """Names of the tar files, sorted. Raises `DataError` where there is none."""
        found = sorted(path.name for path in epath.Path(self.folder).glob(self.pattern))
        if not found:
            raise DataError(f"{self.folder}: holds no file that matches {self.pattern!r}")
        yield from found

    def read(self, shard: str, /) -> Iterator[Entry]:
        """See `Reader.read`. A shard that breaks off gives the samples before, and a refusal for itself."""
        prefix = shard.removesuffix(".tar")
        current, parts = "", {}
        try:
            with (epath.Path(self.folder) / shard).open("rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    name, _, extension = member.name.rpartition("/")[2].partition(".")
                    key = f"{prefix}/{name}"
                    if key != current and parts:
                        yield self._entry(current, parts)
                        parts = {}
                    current = key
                    content = archive.extractfile(member)
                    parts[extension.lower()] = content.read() if content else b""
        except (tarfile.TarError, OSError, EOFError) as error:
            yield Refusal(prefix, "broken_shard", f"{shard}: the archive breaks off after {current or 'nothing'} ({error})", shard)
            return
        if parts:
            yield self._entry(current, parts)

    def _entry(self, key: str, parts: dict[str, bytes]) -> Entry:
        pictures = [extension for extension in parts if extension in _PICTURES]
        try:
            fields: dict[str, Any] = {"licence": self.licence, "source": key}
            if "txt" in parts:
                fields["caption"] = _decode_text(parts["txt"], f"{key}.txt")
            if "json" in parts:
                row = _decode_json(parts["json"], f"{key}.json")
                row.pop("key", None)
                fields |= {name: value for name, value in row.items() if value is not None and name != "caption"}
                fields["source"] = row.get("url") or row.get("source") or key
                fields.pop("url", None)
                fields.setdefault("caption", row.get("caption") or "")
            if len(pictures) != 1:
                return Refusal(key, "no_picture", f"{key}: has {len(pictures)} pictures among {', '.join(sorted(parts))}, expected one", key)
            return candidate_from_fields(key, parts[pictures[0]], fields)
        except DataError as error:
            return Refusal(key, "bad_fields", str(error), key)
