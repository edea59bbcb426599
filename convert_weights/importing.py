"""Import: a snapshot's tensors, one at a time from the mapped files into one Orbax checkpoint a network.

A network is gone through twice, once to look at every tensor (hash, impossible values) and once to write it. Nothing
appears under the final name before everything is written.
"""

from __future__ import annotations

import hashlib
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from convert_weights.folders import new_folder
from convert_weights.manifest import Manifest, NetworkRecord, TensorRecord
from convert_weights.readers import TOKENIZERS, Part, Snapshot
from convert_weights.recognise import numbers_wrong
from convert_weights.rules import KEEP, Assignment
from convert_weights.source import FLOATS, ConversionError, MappedFile, SourceError, Tensor
from instantid_jax.checkpoint import save_weights
from instantid_jax.config import ModelConfig, to_json
from instantid_jax.text import write_default_tokenizers

_RELEASE_AFTER = 2**28


def import_snapshot(snapshot: Snapshot, out: Path, dtype: str = "keep", overwrite: bool = False) -> Manifest:
    """Writes a folder of converted weights and returns its manifest.

    `dtype` is "float32" or "bfloat16" for all tensors, or "keep" for the types of the files.
    Raises `ConversionError` for an `out` that must not be written, values that no trained network has, and files that change
    meanwhile.
    """
    with new_folder(out, overwrite, snapshot.sources) as folder, ThreadPoolExecutor(1) as hasher:
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
        names = sorted(kept)
        if isinstance(snapshot.config, ModelConfig) and not snapshot.tokenizers:
            names += _packaged_tokenizers(folder, snapshot.config)
        (folder / "config.json").write_text(to_json(snapshot.config) + "\n", encoding="utf-8")
        files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in [*names, "config.json"]}
        manifest = Manifest("model" if isinstance(snapshot.config, ModelConfig) else "controlnet", networks, files, list(snapshot.notes))
        manifest.write(folder)
        for part in snapshot.parts:
            part.file.check()
    return manifest


def _packaged_tokenizers(folder: Path, config: ModelConfig) -> list[str]:
    """Writes the tokenizers of a snapshot that has none; returns the names of their files."""
    sizes = {config.text_encoder.vocab_size, config.text_encoder_2.vocab_size}
    if len(sizes) != 1:
        found = " and ".join(map(str, sorted(sizes)))
        raise ConversionError(f"the text encoders know {found} tokens; name their tokenizers with --base-fallback DIR")
    try:
        write_default_tokenizers(folder, sizes.pop())
    except ValueError as problem:
        raise ConversionError(f"{problem}; name the model's own tokenizers with --base-fallback DIR") from problem
    return sorted(str(path.relative_to(folder)) for name in TOKENIZERS for path in (folder / name).iterdir())


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
