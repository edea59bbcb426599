"""Where records come from: a list in memory, or the ArrayRecord files of a TFDS data set, read at random and without TensorFlow.

Beside its records a source has an index: a few numbers a record (`SourceIndex`), from which buckets, groups of photos of one
person and totals follow without reading the records. Of a data set on disk it is kept in ``index/`` as memory-mapped arrays, so
that sixty million rows cost a start no memory and no time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from instantid_jax.data.record import DataError, Record, parse_example, parse_index_fields

__all__ = [
    "DatasetSource",
    "JoinedSource",
    "MemorySource",
    "RecordSource",
    "SameIdentity",
    "SourceIndex",
    "build_index",
    "find_dataset",
    "identity_label",
    "open_source",
    "quiet_tfds",
    "splits_of",
]


@dataclass(frozen=True, eq=False)
class SourceIndex:
    """What a loader must know of every record before it reads any; row i belongs to record i."""

    size: np.ndarray
    """[n, 2] int32: (height, width) of the upright photo."""
    view: np.ndarray
    """[n, 2] int32: (height, width) of the view whose latents are cached; zeros where none are."""
    identity: np.ndarray
    """[n] int64: a hash of the identity label, 0 where it is unknown."""

    def __len__(self) -> int:
        return len(self.size)

    def save(self, folder: Path) -> None:
        """Writes one ``.npy`` file a field; complete files appear at once."""
        folder.mkdir(parents=True, exist_ok=True)
        for f in fields(self):
            temporary = folder / f".{f.name}.{os.getpid()}.npy"
            np.save(temporary, getattr(self, f.name), allow_pickle=False)
            temporary.replace(folder / f"{f.name}.npy")

    @classmethod
    def load(cls, folder: Path) -> SourceIndex | None:
        """The index as memory-mapped arrays, or None where the folder does not hold one."""
        paths = [folder / f"{f.name}.npy" for f in fields(cls)]
        if not all(path.is_file() for path in paths):
            return None
        return cls(*(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths))


@runtime_checkable
class RecordSource(Protocol):
    """Records at random access; reading is safe from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    @property
    def index(self) -> SourceIndex:
        """A few numbers for every record."""
        ...


def identity_label(identity: str) -> int:
    """The label of a person in a `SourceIndex`: 64 bits of the name, 0 for none."""
    if not identity:
        return 0
    data = identity.encode("utf-8")
    return (zlib.crc32(data) | zlib.crc32(data[::-1] + b"\x00") << 32) - (1 << 63) or 1


def index_fields(record: Record) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """(size, size of the cached view or zeros, identity) of a record."""
    view = (0, 0) if record.latents is None else (record.latents.view.h, record.latents.view.w)
    return record.size, view, record.identity


def build_index(rows: Iterable[tuple[tuple[int, ...], tuple[int, ...], str]], count: int) -> SourceIndex:
    """The index of `count` rows as `index_fields` gives them, taken one after the other. Raises `DataError` for another number."""
    index = SourceIndex(np.zeros((count, 2), np.int32), np.zeros((count, 2), np.int32), np.zeros(count, np.int64))
    found = 0
    for found, (size, view, identity) in enumerate(rows, 1):
        if found <= count:
            index.size[found - 1], index.view[found - 1], index.identity[found - 1] = size, view, identity_label(identity)
    if found != count:
        raise DataError(f"the index expects {count} records, but there are {found}")
    return index


class MemorySource:
    """Records out of a list."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = list(records)
        self._index: SourceIndex | None = None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Record:
        return self._records[index]

    @property
    def index(self) -> SourceIndex:
        """See `RecordSource.index`."""
        if self._index is None:
            self._index = build_index(map(index_fields, self._records), len(self._records))
        return self._index


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Keeps back that TFDS calls what protobuf 6 deprecates; with protobuf 7 it calls the new name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"label\(\) is deprecated", category=DeprecationWarning)
        yield


class DatasetSource:
    """One split of a TFDS data set in ArrayRecord form.

    `directory` is the folder that holds ``dataset_info.json``. Raises `DataError` where it does not, or has no such split.
    """

    def __init__(self, directory: str | os.PathLike[str], split: str = "train") -> None:
        self.directory, self.split = Path(directory), split
        if not (self.directory / "dataset_info.json").is_file():
            raise DataError(f"{self.directory}: holds no dataset_info.json; name the folder that `instantid_jax.data.prepare` wrote")
        import tensorflow_datasets as tfds

        with quiet_tfds():
            builder: Any = tfds.builder_from_directory(self.directory)
        if split not in builder.info.splits:
            raise DataError(f"{self.directory}: has no split {split!r}, only {', '.join(sorted(builder.info.splits)) or 'none'}")
        # Examples stay bytes here: parsing only what a record needs is five times as fast as decoding every feature.
        self._index: SourceIndex | None = None
        with quiet_tfds():
            self._rows = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Record:
        return parse_example(self._rows[index], f"{self.directory} {self.split}[{index}]")

    def read_index(self, rows: range) -> SourceIndex:
        """The index of some rows, by reading them."""
        where = f"{self.directory} {self.split}"
        return build_index((parse_index_fields(self._rows[i], f"{where}[{i}]") for i in rows), len(rows))

    def build_index(self, workers: int) -> SourceIndex:
        """The index, where it is not there yet, built by so many processes, each of which reads a part of the rows."""
        if workers > 1 and SourceIndex.load(self.index_folder) is None:
            count = len(self)
            parts = [range(count * i // workers, count * (i + 1) // workers) for i in range(workers)]
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                found = list(pool.map(_read_part, [self.directory] * workers, [self.split] * workers, parts))
            _join_indexes(found).save(self.index_folder)
        return self.index

    @property
    def index_folder(self) -> Path:
        """Where the index of this split is kept."""
        return self.directory / "index" / self.split

    @property
    def index(self) -> SourceIndex:
        """See `RecordSource.index`. Built by reading all records once, and kept beside the files, where it is not there yet."""
        if self._index is not None:
            return self._index
        index = SourceIndex.load(self.index_folder)
        if index is None:
            index = self.read_index(range(len(self)))
            index.save(self.index_folder)
        if len(index) != len(self):
            raise DataError(f"{self.index_folder}: the index has {len(index)} rows for {len(self)} records; delete the folder, it is built again")
        self._index = index
        return index


def _read_part(directory: Path, split: str, rows: range) -> SourceIndex:
    return DatasetSource(directory, split).read_index(rows)


def _join_indexes(parts: Sequence[SourceIndex]) -> SourceIndex:
    return SourceIndex(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(SourceIndex)))


class JoinedSource:
    """Several sources one after the other, such as the parts of a data set that were prepared on different machines."""

    def __init__(self, sources: Sequence[RecordSource]) -> None:
        self._sources = list(sources)
        self._ends = np.cumsum([len(source) for source in self._sources])
        self._index: SourceIndex | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int, /) -> Record:
        number = int(np.searchsorted(self._ends, index, "right"))
        if index < 0 or number == len(self._sources):
            raise IndexError(f"row {index} is not among {len(self)}")
        return self._sources[number][index - (int(self._ends[number - 1]) if number else 0)]

    @property
    def index(self) -> SourceIndex:
        """See `RecordSource.index`."""
        if self._index is None:
            self._index = _join_indexes([source.index for source in self._sources])
        return self._index


def open_source(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], split: str = "train") -> RecordSource:
    """The data set in a folder, or in the only data set's folder below it; several folders are joined in the order given.

    Of several, those that have the split are taken: a part may hold training rows alone. Raises `DataError`.
    """
    folders = [find_dataset(one) for one in ([path] if isinstance(path, (str, os.PathLike)) else path)]
    if not folders:
        raise DataError("no data set is named")
    if len(folders) == 1:
        return DatasetSource(folders[0], split)
    having = [folder for folder in folders if split in _split_names(folder)]
    if not having:
        raise DataError(f"no data set among {', '.join(map(str, folders))} has a split {split!r}")
    return JoinedSource([DatasetSource(folder, split) for folder in having])


def _split_names(folder: Path) -> list[str]:
    import tensorflow_datasets as tfds

    with quiet_tfds():
        return sorted(tfds.builder_from_directory(folder).info.splits)


def find_dataset(path: str | os.PathLike[str]) -> Path:
    """The folder with a data set's ``dataset_info.json``, at `path` or as the only one below it. Raises `DataError`."""
    folder = Path(path)
    if (folder / "dataset_info.json").is_file():
        return folder
    below = sorted(file.parent for file in folder.glob("**/dataset_info.json"))
    if len(below) != 1:
        found = f"{len(below)} data sets ({', '.join(map(str, below[:4]))})" if below else "no dataset_info.json"
        raise DataError(f"{folder}: holds {found}; name the folder of one data set that `instantid_jax.data.prepare` wrote")
    return below[0]


def splits_of(path: str | os.PathLike[str]) -> dict[str, DatasetSource]:
    """Every split of a data set by name, sorted."""
    folder = find_dataset(path)
    return {name: DatasetSource(folder, name) for name in _split_names(folder)}


class SameIdentity:
    """Finds other records of the same person by their labels; 8 to 16 bytes a record."""

    def __init__(self, identity: np.ndarray) -> None:
        self._order = np.argsort(identity, kind="stable")
        self._labels = np.asarray(identity)[self._order]
        self._identity = identity

    def others(self, index: Any) -> np.ndarray:
        """How many other records show the person of record `index` (one or an array of them); 0 where the label is unknown."""
        label = self._identity[index]
        count = np.searchsorted(self._labels, label, "right") - np.searchsorted(self._labels, label, "left") - 1
        return np.where(label == 0, 0, count)

    def other(self, index: Any, rank: Any) -> np.ndarray:
        """Index of number `rank` of these others, by rising index; one of each or arrays."""
        place = np.searchsorted(self._labels, self._identity[index], "left") + rank
        candidate = self._order[place]
        return np.where(candidate < index, candidate, self._order[np.minimum(place + 1, len(self._order) - 1)])
