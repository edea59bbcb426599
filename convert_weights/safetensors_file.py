"""safetensors files: a header that is checked whole before anything is allocated, arrays that are the mapped file.

    8 bytes   n, the header's length, little-endian
    n bytes   JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}
    rest      the tensors' bytes, little-endian and row-major; they must cover the rest without overlaps or holes

Verdicts are those of the reference library (safetensors 0.8), but three: a name that is given twice is refused here
wherever it stands, and so are entries written as lists, and dtypes written as objects, which nobody writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert_weights.source import BFLOAT16, MappedFile, SourceError, Tensor, TensorFile

MAX_HEADER = 100_000_000
_MAX_INTEGER = 2**64 - 1
_MAX_DEPTH = 126

_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"{name}{bits}") for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": BFLOAT16,
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
# Types of less than a byte are valid in the format, but no array of them is made here.
_BITS = {name: 8 * dtype.itemsize for name, dtype in _DTYPES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Refused(Exception):
    """Why a header is refused."""


def open_safetensors(path: Path) -> TensorFile:
    """Maps a file and checks its header. Raises `SourceError` for anything that is not a sound safetensors file."""
    file = MappedFile(path)
    try:
        if file.size < 8:
            raise _Refused(f"the file has {file.size} bytes, fewer than the 8 of a header's length")
        length = int.from_bytes(file.bytes(0, 8), "little")
        if length > MAX_HEADER:
            raise _Refused(f"the header claims {length} bytes, more than the {MAX_HEADER} that are allowed")
        if 8 + length > file.size:
            raise _Refused(f"the header claims {length} bytes, the file has {file.size}")
        entries, metadata = parse_header(file.bytes(8, length), file.size - 8 - length)
        tensors = {name: _tensor(name, *entry, file, 8 + length) for name, entry in entries.items()}
    except _Refused as reason:
        raise SourceError(f"{path}: not a sound safetensors file: {reason}") from None
    return TensorFile((file,), tensors, metadata)


def _tensor(name: str, dtype: str, shape: tuple[int, ...], begin: int, file: MappedFile, start: int) -> Tensor:
    if dtype not in _DTYPES:
        raise _Refused(f"tensor {name!r} has type {dtype}, which is not supported")
    if len(shape) > 32 or any(size >= 2**48 for size in shape):  # an empty tensor may claim this; no array can have it
        raise _Refused(f"tensor {name!r} has the shape {str(shape)[:80]}, which no array can have")
    return Tensor(name, file, _DTYPES[dtype], shape, start + begin)


def parse_header(header: bytes, data_size: int) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], dict[str, str]]:
    """{name: (dtype, shape, first byte)} and the metadata of a header before `data_size` bytes of tensors."""
    try:
        content = json.loads(header.decode(), object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_constant)
    except UnicodeDecodeError:
        raise _Refused("the header is not UTF-8 text") from None
    except RecursionError:
        raise _Refused("the header is nested too deeply") from None
    except ValueError as problem:
        raise _Refused(f"the header is not JSON ({problem})") from None
    if not isinstance(content, dict):
        raise _Refused("the header is not a JSON object")
    _check_text(content)
    metadata = content.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Refused("the metadata is not an object of texts")
    entries = {name: _entry(name, value) for name, value in content.items()}
    _check_cover(entries, data_size)
    return {name: (dtype, shape, begin) for name, (dtype, shape, begin, _) in entries.items()}, metadata


def _entry(name: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _Refused(f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _Refused(f"tensor {name!r} has the unknown type {str(dtype)[:40]!r}")
    if not _sizes(shape):
        raise _Refused(f"tensor {name!r} has the shape {str(shape)[:80]}, which is not a list of sizes")
    if not _sizes(offsets) or len(offsets) != 2:
        raise _Refused(f"tensor {name!r} has data_offsets {str(offsets)[:80]}, which are not two positions in the file")
    bits = 1
    for factor in (*shape, _BITS[dtype]):
        bits *= factor
        if bits > _MAX_INTEGER:
            raise _Refused(f"tensor {name!r} has the shape {str(shape)[:80]}, which is more than fits in any memory")
    if bits % 8:
        raise _Refused(f"tensor {name!r} ends in the middle of a byte")
    if bits // 8 != offsets[1] - offsets[0]:
        raise _Refused(f"tensor {name!r} of shape {shape} and type {dtype} needs {bits // 8} bytes, its data_offsets are {offsets}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_INTEGER for n in value)


def _check_cover(entries: Mapping[str, tuple[str, tuple[int, ...], int, int]], data_size: int) -> None:
    """Tensors must follow one another from the first byte to the last."""
    position = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise _Refused(f"tensor {name!r} begins at byte {begin} where {position} is next: tensors overlap or leave a hole")
        position = end
    if position != data_size:
        raise _Refused(f"the tensors take {position} bytes, the file has {data_size} for them")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Refused(f"{next(n for n in names if names.count(n) > 1)[:80]!r} is given twice")
    return content


def _integer(text: str) -> int | float:
    if text == "-0" or len(text) > 20:
        return _real(text)
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Refused("a number is out of range")
    return value


def _constant(text: str) -> float:
    raise _Refused(f"{text} is not JSON")


def _check_text(content: Any) -> None:
    """Half surrogate pairs and deep nesting, which Python's JSON would let through."""
    pending = [(content, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise _Refused("the header is nested too deeply")
        if isinstance(value, str):
            if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
                raise _Refused("the header is not UTF-8 text")
        elif isinstance(value, dict):
            pending += ((item, depth + 1) for pair in value.items() for item in pair)
        elif isinstance(value, list):
            pending += ((item, depth + 1) for item in value)


def write_safetensors(
    path: Path, entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]], array: Callable[[str], np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors one at a time; ``array(name)`` gives each when its turn comes. Order as in the reference library."""
    order = sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in order:
        dtype, shape = entries[name]
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            x = np.asarray(array(name), order="C")
            if (x.dtype, x.shape) != entries[name]:
                raise ValueError(f"tensor {name!r} is {x.dtype} {x.shape} where {entries[name]} was announced")
            file.write(x.reshape(-1).view(np.uint8).data)
