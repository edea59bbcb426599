"""Files mapped into memory, and the tensors in them.

A mapping shows the file as it is now: were the file to change while it is read, a tensor would be part old, part new.
`MappedFile.check` therefore compares size, time and inode with those at opening.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

__all__ = ["FLOATS", "ConversionError", "MappedFile", "SourceError", "Tensor", "TensorFile"]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {name: np.dtype(name) for name in ("float16", "float32", "float64")} | {"bfloat16": BFLOAT16}


class ConversionError(ValueError):
    """A conversion that cannot be done; the message says what is wrong, where, and what to do."""


class SourceError(ConversionError):
    """A file that is damaged, hostile, or not what it should be."""


class MappedFile:
    """A whole file as read-only memory. Nothing of it is loaded until it is looked at."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            self._signature = self._stat(os.fstat(file.fileno()))
            self.size = self._signature[0]
            if self.size == 0:
                raise SourceError(f"{path}: the file is empty")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @staticmethod
    def _stat(stat: os.stat_result) -> tuple[int, int, int]:
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def check(self) -> None:
        """Raises `SourceError` where the file is no longer the one that was opened."""
        if not self.path.exists() or self._stat(self.path.stat()) != self._signature:
            raise SourceError(f"{self.path}: the file changed while it was read; run the conversion again")

    def bytes(self, start: int, length: int) -> bytes:
        """A copy of a few bytes. Raises `SourceError` where they lie outside the file."""
        if start < 0 or length < 0 or start + length > self.size:
            raise SourceError(f"{self.path}: bytes {start} to {start + length} lie outside the file of {self.size} bytes")
        self.check()
        return self._map[start : start + length]

    def array(self, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        """A flat array that is the mapped memory itself."""
        self.check()
        return np.frombuffer(self._map, dtype=dtype, count=count, offset=start) if count else np.empty(0, dtype)

    def release(self) -> None:
        """Gives the pages that were looked at back to the system; they are read again where needed."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def sha256(self) -> str:
        """Hash of the whole file."""
        self.check()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in a file; checked to lie inside before this is made."""

    name: str
    file: MappedFile
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """First byte."""
    strides: tuple[int, ...] | None = None
    """In elements; None for a contiguous tensor."""

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def array(self) -> np.ndarray:
        """A read-only view of the mapped file."""
        if self.strides is None or self.count == 0:
            return self.file.array(self.dtype, self.start, self.count).reshape(self.shape)
        extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        flat = self.file.array(self.dtype, self.start, extent)
        step = self.dtype.itemsize
        return np.lib.stride_tricks.as_strided(flat, self.shape, [s * step for s in self.strides], writeable=False)


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """The tensors of one or more files, by name."""

    files: tuple[MappedFile, ...]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def where(self) -> str:
        """The path for messages: of the file, or of the first of several."""
        return str(self.files[0].path) + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")

    def under(self, prefix: str, strip: bool = True) -> TensorFile:
        """The tensors whose names start with `prefix`, which `strip` removes."""
        cut = len(prefix) if strip else 0
        return dataclasses.replace(self, tensors={name[cut:]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)})

    def check(self) -> None:
        """Raises `SourceError` where a file changed since it was opened."""
        for file in self.files:
            file.check()
