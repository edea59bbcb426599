"""Import: a snapshot's tensors, one at a time from the mapped files into one Orbax checkpoint a network.

A network is gone through twice, once to look at every tensor (hash, impossible values) and once to write it. Nothing
appears under the final name before everything is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from convert_weights.manifest import Manifest, NetworkRecord, TensorRecord
from convert_weights.readers import Part, Snapshot
from convert_weights.recognise import numbers_wrong
from convert_weights.rules import KEEP, Assignment
from convert_weights.source import FLOATS, ConversionError, MappedFile, SourceError, Tensor
from instantid_jax.checkpoint import save_weights
from instantid_jax.config import ModelConfig, to_json

_RELEASE_AFTER = 2**28


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, or vanishes where anything goes wrong.

    Raises `ConversionError` where `out` is there, not empty, and not to be overwritten.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and (overwrite or not any(out.iterdir()))):
        raise ConversionError(f"{out} exists and is not empty; choose another --out" + (", or give --overwrite" if out.is_dir() else ""))
    out.parent.mkdir(parents=True, exist_ok=True)
    staging, old = (out.with_name(f".{out.name}.{what}-{os.getpid()}") for what in ("partial", "old"))
    staging.mkdir()
    try:
        yield staging
        if out.exists():
            out.rename(old)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def import_snapshot(snapshot: Snapshot, out: Path, dtype: str = "keep", overwrite: bool = False) -> Manifest:
    """Writes a folder of converted weights and returns its manifest.

    `dtype` is "float32" or "bfloat16" for all tensors, or "keep" for the types of the files.
    Raises `ConversionError` for values that no trained network has, and for files that change meanwhile.
    """
    model = isinstance(snapshot.config, ModelConfig)
    with new_folder(out, overwrite) as folder, ThreadPoolExecutor(1) as hasher:
        hashes: dict[Path, Future[str]] = {}
        for part in snapshot.parts:
            for file in part.file.files:
                if file.path not in hashes:
                    hashes[file.path] = hasher.submit(file.sha256)
        networks = {part.name: _convert(part, folder / part.name, None if dtype == "keep" else dtype, hashes) for part in snapshot.parts}
        kept = dict(snapshot.tokenizers) | {f"published/{name}": path for name, path in snapshot.published.items()}
        for name, path in kept.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        (folder / "config.json").write_text(to_json(snapshot.config) + "\n", encoding="utf-8")
        files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in [*sorted(kept), "config.json"]}
        manifest = Manifest("model" if model else "controlnet", networks, files, list(snapshot.notes))
        manifest.write(folder)
        for part in snapshot.parts:
            part.file.check()
    return manifest


def _convert(part: Part, directory: Path, dtype: str | None, hashes: dict[Path, Future[str]]) -> NetworkRecord:
    """One network: look at every tensor in the file's order, then write all."""
    pairs = [(a, part.file.tensors[part.account.names[a.source]]) for a in part.assignments]
    records: dict[str, TensorRecord] = {}
    problems: list[str] = []
    seen = 0
    for a, tensor in sorted(pairs, key=lambda pair: (str(pair[1].file.path), pair[1].start)):
        records[a.target] = _look(a, tensor, dtype, problems)
        seen += tensor.array().nbytes
        if seen > _RELEASE_AFTER:
            tensor.file.release()
            seen = 0
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise SourceError(f"{part.name} ({part.file.where}): {'; '.join(problems[:10])}{more}; these are not the weights of a trained network")
    arrays = {a.target: a.forward(tensor.array()) for a, tensor in pairs}
    cast = dtype if any(not record.exact for record in records.values()) else None
    save_weights(directory, arrays, cast)
    _release(part.file.files)
    part.file.check()
    return NetworkRecord(
        files={f"{file.path.parent.name}/{file.path.name}": hashes[file.path].result() for file in part.file.files},
        source_tensors=len(part.file.tensors),
        ignored=dict(part.account.ignored),
        parameters=sum(x.size for x in arrays.values()),
        bytes=sum(x.size * FLOATS[records[path].dtype].itemsize for path, x in arrays.items()),
        tensors={path: records[path] for path in sorted(records)},
    )


def _look(a: Assignment, tensor: Tensor, dtype: str | None, problems: list[str]) -> TensorRecord:
    """Hashes one tensor as it will be stored, and notes in `problems` what cannot be right about it."""
    name = tensor.dtype.name
    if name not in FLOATS:
        raise SourceError(f"{tensor.file.path}: {tensor.name} has type {name}; only {', '.join(FLOATS)} are converted")
    whole = tensor.array()
    published = np.asarray(a.rename.forward(whole), order="C")
    stored = published
    if dtype is not None and dtype != name:
        with np.errstate(over="ignore", invalid="ignore"):
            stored = published.astype(FLOATS[dtype])
    wrong = numbers_wrong(published)
    if wrong is None and stored is not published and numbers_wrong(stored) is not None:
        wrong = f"values too large for {dtype}"
    if wrong:
        problems.append(f"{tensor.name} has {wrong}")
    elif a.target.endswith(("to_k_ip/kernel", "to_v_ip/kernel")) and not published.any():
        problems.append(f"{tensor.name} is all zeros (an adapter that was never trained)")
    digest = _sha256(stored)
    same = stored is published and a.rename == KEEP
    source_digest = digest if same else _sha256(np.asarray(whole, order="C"))
    return TensorRecord(a.published, published.shape, stored.dtype.name, digest, tensor.name, name, source_digest)


def _sha256(x: np.ndarray) -> str:
    return hashlib.sha256(x.reshape(-1).view(np.uint8).data).hexdigest()


def _release(files: tuple[MappedFile, ...]) -> None:
    for file in files:
        file.release()
