"""Weights on disk: one Orbax checkpoint a network, a flat dict of arrays under their own names.

Arrays are written uncompressed, each in a file of its own (Zarr 3): weights hardly compress, and neither writing nor
reading then holds a network twice. A small model may instead be one file, ``weights.safetensors``, whose names begin with
the network's: what is read as FOLDER/NETWORK is then FOLDER/weights.safetensors at "NETWORK/...".
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from safetensors import SafetensorError, safe_open

from instantid_jax.mapped import THREADS, read_ahead

__all__ = ["WeightsError", "has_weights", "load_weights", "quiet_orbax", "save_weights", "stored_networks"]

SINGLE_FILE = "weights.safetensors"
_METADATA = "_CHECKPOINT_METADATA"


class WeightsError(ValueError):
    """Weights that cannot be written or read; the message names the directory."""


class _Borrowed(np.ndarray):
    """A view that Orbax does not copy before it writes: nobody changes it meanwhile, and a network fits once in memory."""

    def __deepcopy__(self, memo: dict[int, Any] | None) -> _Borrowed:
        return self


def save_weights(directory: str | Path, flat: Mapping[str, Any], dtype: str | None = None) -> None:
    """Writes ``{path: array}`` into a new directory; it appears whole or not at all.

    Host arrays may be views of any layout, such as mapped files: they are read where they lie. `dtype` casts every array
    while it is written. Raises `WeightsError` where the directory exists, or for an empty dict.
    """
    directory = Path(directory).absolute()
    if directory.exists():
        raise WeightsError(f"{directory} exists already; weights are never written over others")
    if not flat:
        raise WeightsError(f"{directory}: there are no weights to write")
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False
    if dtype is not None:
        context.array.saving.storage_options.dtype = np.dtype(dtype)
    state = {path: x if isinstance(x, jax.Array) else np.asarray(x).view(_Borrowed) for path, x in flat.items()}
    with context, quiet_orbax():
        ocp.save(str(directory), state)


def load_weights(
    directory: str | Path, dtype: str | None = None, shardings: Mapping[str, jax.sharding.Sharding] | None = None, *, later: bool = False
) -> dict[str, Any]:
    """Reads what `save_weights` wrote: ``{path: array}``.

    Floating-point arrays are cast to `dtype` as they are read. With `shardings`, one for every path, each process reads its own parts
    straight onto its devices; otherwise the arrays are NumPy's, and those that need no cast lie in the mapped files: they are read-only, and
    already in the system's page cache, or with `later` on the disk until they are used (`mapped`). Files that `save_weights`
    did not write whole (by several processes) go through Orbax.
    Raises `WeightsError` for a directory that is absent, damaged or incomplete.
    """
    directory = Path(directory).absolute()
    if not directory.exists() and (directory.parent / SINGLE_FILE).is_file():
        return _load_single(directory.parent / SINGLE_FILE, directory.name, dtype, shardings)
    if not (directory / _METADATA).is_file():
        raise WeightsError(f"{directory} holds no weights, or their writing was interrupted (no {_METADATA})")
    _check_files(directory)
    try:
        with quiet_orbax():
            described = ocp.metadata(str(directory)).metadata
            homeless = sorted(set(described) - set(shardings)) if shardings is not None else []
            if homeless:
                raise WeightsError(f"{directory}: no sharding is given for {homeless[0]!r} and {len(homeless) - 1} others")
            wanted = {path: _abstract(leaf, dtype, None if shardings is None else shardings[path]) for path, leaf in described.items()}
            maps = _mapped(directory, described)
            if maps is None:
                arrays = ocp.load(str(directory), wanted)
            else:
                if all(place.is_fully_addressable for place in (shardings or {}).values()):
                    read_ahead([x for path, x in maps.items() if not later or x.dtype != wanted[path].dtype])
                with ThreadPoolExecutor(THREADS) as pool:
                    arrays = dict(zip(wanted, pool.map(_as_wanted, (maps[path] for path in wanted), wanted.values()), strict=True))
    except WeightsError:
        raise
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError) as problem:
        first = str(problem).strip().splitlines() or [type(problem).__name__]
        raise WeightsError(f"{directory}: the weights are damaged or incomplete ({first[0][:300]}); convert or copy them again") from problem
    return dict(arrays)


def _mapped(directory: Path, paths: Iterable[str]) -> dict[str, np.memmap] | None:
    """Every array where it lies in its file; None where one is not a single uncompressed block."""
    maps = {}
    for path in paths:
        folder = directory / "state" / path
        content = json.loads((folder / "zarr.json").read_bytes())
        shape, codecs, start = content["shape"], content["codecs"], 0
        file = folder.joinpath("c", *["0"] * len(shape))
        if content["chunk_grid"]["configuration"]["chunk_shape"] != shape or not file.is_file():
            return None
        if codecs[0]["name"] == "sharding_indexed":  # a file of one block, with its place in the last 20 bytes
            inner = codecs[0]["configuration"]
            if inner["chunk_shape"] != shape or inner.get("index_location", "end") != "end":
                return None
            codecs = inner["codecs"]
            with file.open("rb") as handle:
                handle.seek(-20, os.SEEK_END)
                start, _ = struct.unpack("<QQ", handle.read(16))
        if [(codec["name"], codec.get("configuration", {}).get("endian", "little")) for codec in codecs] != [("bytes", "little")]:
            return None
        maps[path] = np.memmap(file, np.dtype(content["data_type"]), "r", start, tuple(shape))
    return maps


def _as_wanted(array: np.ndarray, like: Any) -> Any:
    """A mapped array in the type and place of `like`."""
    if isinstance(like, jax.ShapeDtypeStruct):
        return jax.make_array_from_callback(like.shape, like.sharding, lambda part: np.asarray(array[part]).astype(like.dtype, copy=False))
    return array.astype(like.dtype) if array.dtype != like.dtype else array.view(np.ndarray)


def has_weights(directory: str | Path) -> bool:
    """Whether there is something for `load_weights` to read; it may still be damaged."""
    directory = Path(directory)
    if directory.is_dir():
        return True
    file = directory.parent / SINGLE_FILE
    if not file.is_file():
        return False
    with _opened(file) as names:
        return any(name.startswith(f"{directory.name}/") for name in names.keys())  # noqa: SIM118 (no mapping)


def stored_networks(folder: str | Path) -> list[str]:
    """Names of the networks whose weights are in a folder, sorted: those of its single file, or its checkpoints."""
    folder = Path(folder)
    if (folder / SINGLE_FILE).is_file():
        with _opened(folder / SINGLE_FILE) as names:
            return sorted({name.split("/")[0] for name in names.keys()})  # noqa: SIM118 (no mapping)
    return sorted(found.parent.name for found in folder.glob(f"*/{_METADATA}"))


def _load_single(file: Path, network: str, dtype: str | None, shardings: Mapping[str, jax.sharding.Sharding] | None) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    with _opened(file) as content:
        for name in content.keys():  # noqa: SIM118 (no mapping)
            if name.startswith(f"{network}/"):
                path, array = name.removeprefix(f"{network}/"), content.get_tensor(name)
                array = array.astype(dtype) if dtype and jax.numpy.issubdtype(array.dtype, np.floating) else array
                arrays[path] = array if shardings is None else jax.device_put(array, shardings[path])
    if not arrays:
        raise WeightsError(f"{file} holds no weights of {network}")
    return arrays


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as content:
            yield content
    except SafetensorError as problem:
        raise WeightsError(f"{file} is damaged ({problem}); copy it again") from problem


def _abstract(leaf: Any, dtype: str | None, sharding: jax.sharding.Sharding | None) -> Any:
    """What Orbax is asked for: shape, type and place (devices or host) of one array."""
    wanted = np.dtype(dtype) if dtype and jax.numpy.issubdtype(leaf.dtype, np.floating) else leaf.dtype
    if sharding is not None:
        return jax.ShapeDtypeStruct(leaf.shape, wanted, sharding=sharding)
    return np.broadcast_to(np.zeros((), wanted), leaf.shape)  # only its shape, type and class count


def _check_files(directory: Path) -> None:
    """Finds what is missing or cut off before Orbax, in a moment and with a name. (Zarr 3: zarr.json beside the chunks.)"""
    for chunks in directory.glob("state/**/c"):
        described = chunks.parent / "zarr.json"
        if not described.is_file():
            raise WeightsError(f"{described} is missing; convert or copy the weights again")
    for described in directory.glob("state/**/zarr.json"):
        try:
            content = json.loads(described.read_bytes())
            needed = math.prod(content["shape"]) * np.dtype(content["data_type"]).itemsize
            indexed = content["codecs"][0]["name"] == "sharding_indexed"
        except (ValueError, LookupError, TypeError) as problem:
            raise WeightsError(f"{described} is damaged; convert or copy the weights again") from problem
        chunks = described.parent / "c"
        files = [chunks] if chunks.is_file() else [f for f in chunks.rglob("*") if f.is_file()]
        needed += 20 * len(files) * indexed  # position, length and checksum of the chunk, at the end of every file
        found = sum(f.stat().st_size for f in files)
        if found < needed:
            raise WeightsError(f"{described.parent} holds {found} of {needed} bytes; convert or copy the weights again")


class _Quiet(logging.Filter):
    """Orbax's advice: it suspects damage wherever its other file format is absent. What fails is raised anyway."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.ERROR


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps Orbax's advice out of the log; errors pass."""
    loggers, quiet = (logging.getLogger("absl"), logging.getLogger()), _Quiet()
    for logger in loggers:
        logger.addFilter(quiet)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(quiet)
