"""Export: a folder of converted weights back to the files that PyTorch programs read. The same tables, backwards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert_weights.folders import new_folder, write_marker
from convert_weights.manifest import Manifest, read_config, read_manifest
from convert_weights.readers import BASE, RESAMPLER_KEY, TOKENIZERS, table_of
from convert_weights.rules import Assignment, plan
from convert_weights.safetensors_file import write_safetensors
from convert_weights.source import FLOATS, ConversionError
from convert_weights.torch_writer import write_torch
from instantid_jax.checkpoint import load_weights
from instantid_jax.config import IdentityNetConfig, ModelConfig

Entries = dict[str, tuple[np.dtype, tuple[int, ...]]]
_FORMAT = {"format": "pt"}


@dataclasses.dataclass(frozen=True)
class Published:
    """A stored network under its published names: types and shapes at once, arrays one by one."""

    entries: Entries
    array: Callable[[str], np.ndarray]


def export_weights(weights: Path, out: Path, base: bool = False, dtype: str | None = None, overwrite: bool = False) -> list[str]:
    """Writes the published files and returns lines that say what was written.

    With `base` the SDXL folder too. Raises `ConversionError` where tensors were cast at import and no `dtype` says that
    a cast file is wanted, or where what is stored is not what the manifest says.
    """
    manifest = read_manifest(weights)
    config = read_config(weights, manifest)
    names = [name for name in manifest.networks if base or name not in BASE]
    cast = sorted(name for name in names if not all(t.exact for t in manifest.networks[name].tensors.values()))
    if cast and dtype is None:
        types = ", ".join(sorted({t.dtype for name in cast for t in manifest.networks[name].tensors.values()}))
        raise ConversionError(
            f"the type of {', '.join(cast)} was changed at import, the original tensors are gone; give --dtype {types} to export what is stored"
        )
    lines = []

    def load(name: str) -> Published:
        return published_tensors(weights, name, manifest, config, dtype)

    with new_folder(out, overwrite, [weights]) as folder:
        if isinstance(config, ModelConfig):
            lines += _export_instantid(load, weights, folder, config)
            lines += _export_base(load, weights, folder / "base") if base else []
        else:
            lines += _export_component(load, weights, "controlnet", folder, "config.json")
        write_marker(folder)
    changed = bool(cast) or dtype is not None
    lines.append("some tensors differ from the originals: their type was changed" if changed else "every tensor has the original's bytes")
    return lines


def published_tensors(weights: Path, name: str, manifest: Manifest, config: ModelConfig | IdentityNetConfig, dtype: str | None = None) -> Published:
    """Loads one network; every array is held against the manifest's hash when its turn comes."""
    records = manifest.networks[name].tensors
    stored = load_weights(weights / name)
    if stored.keys() != records.keys():
        odd = sorted(stored.keys() ^ records.keys())
        raise ConversionError(f"{weights / name}: {odd[0]!r} and {len(odd) - 1} others are not both in the manifest and in the weights")
    assignments: dict[str, Assignment] = {a.published: a for a in plan(table_of(name, config), {path: x.shape for path, x in stored.items()})}

    def array(published: str) -> np.ndarray:
        a = assignments[published]
        record = records[a.target]
        x = np.asarray(a.layout.inverse(stored[a.target]), order="C")
        found = x.dtype.name, x.shape, hashlib.sha256(x.reshape(-1).view(np.uint8).data).hexdigest()
        if found != (record.dtype, record.shape, record.sha256):
            raise ConversionError(f"{weights / name}: {a.target!r} is not what the manifest says; convert or copy the weights again")
        return x if dtype is None or x.dtype.name == dtype else x.astype(FLOATS[dtype])

    entries = {published: (FLOATS[dtype or records[a.target].dtype], records[a.target].shape) for published, a in assignments.items()}
    return Published(entries, array)


def _export_component(load: Callable[[str], Published], weights: Path, name: str, folder: Path, published: str, stem: str = "") -> list[str]:
    """One diffusers folder: its config.json as it was published, and its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    _keep(weights, published, folder / "config.json")
    network = load(name)
    path = folder / f"{stem or 'diffusion_pytorch_model'}.safetensors"
    write_safetensors(path, network.entries, network.array, _FORMAT)
    return [_line(path, network.entries)]


def _export_instantid(load: Callable[[str], Published], weights: Path, folder: Path, config: ModelConfig) -> list[str]:
    lines = _export_component(load, weights, "identitynet", folder / "ControlNetModel", "ControlNetModel/config.json")
    halves = {"image_proj": load("resampler"), "ip_adapter": load("adapter")}
    flat: Entries = {f"{half}.{name}": entry for half, part in halves.items() for name, entry in part.entries.items()}

    def array(name: str) -> np.ndarray:
        half, _, rest = name.partition(".")
        return halves[half].array(rest)

    heads = {} if config.resampler.dim_head == 64 else {RESAMPLER_KEY: json.dumps(dataclasses.asdict(config.resampler))}
    write_safetensors(folder / "ip-adapter.safetensors", flat, array, _FORMAT | heads)
    ordered = {half: {name: part.entries[name] for name in sorted(part.entries, key=_natural)} for half, part in halves.items()}
    write_torch(folder / "ip-adapter.bin", ordered, lambda half, name: halves[half].array(name))
    return [*lines, *(_line(folder / f"ip-adapter.{suffix}", flat) for suffix in ("safetensors", "bin"))]


def _export_base(load: Callable[[str], Published], weights: Path, folder: Path) -> list[str]:
    lines = []
    for name in BASE:
        stem = "model" if name.startswith("text") else ""
        lines += _export_component(load, weights, name, folder / name, f"base/{name}/config.json", stem)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        _keep(weights, f"base/{name}", folder / name)
    for name in TOKENIZERS:
        shutil.copytree(weights / name, folder / name)
    return lines


def _keep(weights: Path, name: str, target: Path) -> None:
    source = weights / "published" / name
    if not source.is_file():
        raise ConversionError(f"{weights} does not hold the published {name}, without which the exported folder could not be loaded")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers by their value, so that 3 comes before 11."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _line(path: Path, entries: Entries) -> str:
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in entries.values())
    name = f"{path.parent.name}/{path.name}" if path.parent.name[:1] != "." else path.name
    return f"{name}: {len(entries)} tensors, {size / 1e6:,.1f} MB, {', '.join(sorted({d.name for d, _ in entries.values()}))}"
