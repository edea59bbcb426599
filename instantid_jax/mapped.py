"""Arrays that lie in mapped files (`numpy.memmap`), and reading them as fast as the disk gives them."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

__all__ = ["THREADS", "copy_into", "read_ahead"]

THREADS = 8
"""How many arrays are read at a time: more than processors, since a disk serves several requests at once."""
_BLOCK = 8 << 20


def read_ahead(arrays: Iterable[np.ndarray]) -> None:
    """Brings the files of mapped arrays into the page cache, several at a time and in large blocks: touching mapped pages one after the
    other takes several times as long. Other arrays are left as they are."""

    def read(file: Path) -> None:
        with file.open("rb", buffering=0) as handle:
            buffer = bytearray(min(_BLOCK, file.stat().st_size))
            while handle.readinto(buffer):
                pass

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(read, [Path(str(found.filename)) for found in map(_mapping, arrays) if found is not None]):
            pass


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """Fills `target` (one block of memory, of the source's shape and type); what is still on the disk is read to where it is wanted."""
    mapping = _mapping(source)
    if mapping is None or source.dtype != target.dtype:
        np.copyto(target, source)
        return
    room = target.reshape(-1).view(np.uint8).data
    with Path(str(mapping.filename)).open("rb", buffering=0) as handle:
        handle.seek(mapping.offset)
        while room:
            count = handle.readinto(room[:_BLOCK])
            if not count:
                raise OSError(f"{mapping.filename} ends too early")
            room = room[count:]


def _mapping(array: np.ndarray) -> np.memmap | None:
    """The mapped file of an array that `load_weights` gave as a whole; None of any other."""
    mapping = array if isinstance(array, np.memmap) else array.base
    if not isinstance(mapping, np.memmap) or not isinstance(mapping.base, mmap.mmap):
        return None
    same = array.ctypes.data == mapping.ctypes.data and array.nbytes == mapping.nbytes and array.dtype == mapping.dtype
    return mapping if same and array.flags.c_contiguous else None
