"""Writes what ``torch.load(weights_only=True)`` reads, without torch: a zip of storages and a protocol 2 pickle."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from convert_weights.source import BFLOAT16

_STORAGES = {
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    BFLOAT16: "BFloat16Storage",
}
_ALIGNMENT = 64

Entries = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


def write_torch(path: Path, groups: Mapping[str, Entries], array: Callable[[str, str], np.ndarray]) -> None:
    """Writes ``{group: {name: tensor}}``; ``array(group, name)`` gives each tensor when its turn comes."""
    folder = path.stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _write(archive, f"{folder}/data.pkl", _pickle(groups))
        _write(archive, f"{folder}/byteorder", b"little")
        key = 0
        for group, entries in groups.items():
            for name, (dtype, shape) in entries.items():
                x = np.asarray(array(group, name), order="C")
                if (x.dtype, x.shape) != (dtype, shape):
                    raise ValueError(f"tensor {name!r} is {x.dtype} {x.shape} where {dtype} {shape} was announced")
                _write(archive, f"{folder}/data/{key}", x.reshape(-1).view(np.uint8).data)
                key += 1
        _write(archive, f"{folder}/version", b"3\n")


def _write(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """One entry, its data at a multiple of 64 bytes; the same date for all, so that equal tensors give equal files."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    start = archive.fp.tell() + 30 + len(name.encode()) + 4  # type: ignore[union-attr]
    padding = -start % _ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(entry, data)


def _pickle(groups: Mapping[str, Entries]) -> bytes:
    """The program that rebuilds the nested dict."""
    out = [b"\x80\x02", b"}", b"("]
    key = 0
    for group, entries in groups.items():
        out += [_text(group), b"}", b"("]
        for name, (dtype, shape) in entries.items():
            count = math.prod(shape)
            strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
            storage = [b"(", _text("storage"), _name("torch", _STORAGES[dtype]), _text(str(key)), _text("cpu"), _integer(count), b"t", b"Q"]
            sizes = [b"(", *map(_integer, shape), b"t", b"(", *map(_integer, strides), b"t"]
            hooks = [b"\x89", _name("collections", "OrderedDict"), b")", b"R"]
            out += [_text(name), _name("torch._utils", "_rebuild_tensor_v2"), b"(", *storage, _integer(0), *sizes, *hooks, b"t", b"R"]
            key += 1
        out.append(b"u")
    return b"".join([*out, b"u", b"."])


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(data)) + data
