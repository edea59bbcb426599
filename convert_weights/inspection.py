"""Looks at weights without changing them: `inspect` lists, `diff` compares, `verify` holds a folder against its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from convert_weights.exporting import published_tensors
from convert_weights.manifest import NAME, Manifest, read_config, read_manifest
from convert_weights.readers import open_tensors, require_there
from convert_weights.report import table
from convert_weights.source import ConversionError
from instantid_jax.checkpoint import load_weights

Arrays = dict[str, Callable[[], np.ndarray]]
_CHUNK = 2**22


def inspect_path(path: Path) -> Iterator[str]:
    """Lines that list every tensor of a weights folder or a tensor file, with totals."""
    if path.is_dir():
        manifest = read_manifest(path)
        rows = [(f"{n}/{p}", t.dtype, _shape(t.shape), t.source) for n, record in manifest.networks.items() for p, t in record.tensors.items()]
        yield from table(("parameter", "type", "published shape", "from"), rows)
        yield ""
        yield from summary(manifest)
        return
    file = open_tensors(path)
    yield from table(("tensor", "type", "shape"), [(name, t.dtype.name, _shape(t.shape)) for name, t in file.tensors.items()])
    yield ""
    values, size = (
        (sum(n) for n in zip(*((t.count, t.count * t.dtype.itemsize) for t in file.tensors.values()), strict=True)) if file.tensors else (0, 0)
    )
    yield f"{len(file.tensors)} tensors, {values:,} values, {size / 1e6:,.1f} MB"
    for key, value in file.metadata.items():
        yield f"metadata {key}: {value}"


def summary(manifest: Manifest) -> Iterator[str]:
    """The table at the end of an import: what each network has become."""
    rows = []
    for name, record in manifest.networks.items():
        tensors = len(record.tensors)
        used = len({t.source for t in record.tensors.values()})
        share = f"{used} of {record.source_tensors - len(record.ignored)} used" + (f", {len(record.ignored)} left out" if record.ignored else "")
        rows.append((name, str(tensors), f"{record.parameters:,}", record.dtypes, f"{record.bytes / 1e6:,.1f}", share))
    tensors, parameters, size = (sum(n) for n in zip(*((len(n.tensors), n.parameters, n.bytes) for n in manifest.networks.values()), strict=True))
    rows.append(("total", str(tensors), f"{parameters:,}", "", f"{size / 1e6:,.1f}", ""))
    yield from table(("network", "tensors", "parameters", "type", "MB", "source tensors"), rows)
    yield from (f"note: {note}" for note in manifest.notes)


def diff_paths(a: Path, b: Path) -> tuple[bool, list[str]]:
    """Whether two weights folders, or two tensor files, are equal, and lines that say where they are not."""
    for path in (a, b):
        require_there(path)
    if a.is_dir() != b.is_dir():
        raise ConversionError(f"{a} and {b} cannot be compared: one is a folder of converted weights, the other a file")
    lines, compared = [], 0
    parts = [name for path in (a, b) if path.is_dir() for name in read_manifest(path).networks] or [""]
    for part in dict.fromkeys(parts):
        one, two = _arrays(a, part), _arrays(b, part)
        lines += [f"only in {a}: {name}" for name in one if name not in two]
        lines += [f"only in {b}: {name}" for name in two if name not in one]
        for name in one.keys() & two.keys():
            compared += 1
            lines += [f"{name}: {change}" for change in _difference(one[name](), two[name]())]
    return not lines, [*sorted(lines), f"{compared} tensors compared, " + (f"{len(lines)} differences" if lines else "all equal")]


def _arrays(path: Path, network: str) -> Arrays:
    if not path.is_dir():
        return {name: tensor.array for name, tensor in open_tensors(path).tensors.items()}
    if network not in read_manifest(path).networks:
        return {}
    return {f"{network}/{name}": (lambda x=x: x) for name, x in load_weights(path / network).items()}


def _difference(x: np.ndarray, y: np.ndarray) -> Iterator[str]:
    if x.shape != y.shape:
        yield f"shape {_shape(x.shape)} and {_shape(y.shape)}"
        return
    if x.dtype != y.dtype:
        yield f"type {x.dtype.name} and {y.dtype.name}"
    x, y = x.reshape(-1), y.reshape(-1)
    if x.dtype == y.dtype and np.array_equal(x.view(np.uint8), y.view(np.uint8)):
        return
    worst = float(np.max([_largest(x[i : i + _CHUNK], y[i : i + _CHUNK]) for i in range(0, x.size, _CHUNK)], initial=0.0))
    if worst or x.dtype == y.dtype:
        yield f"max abs difference {worst:.6g}"


def _largest(x: np.ndarray, y: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max())


def verify_folder(folder: Path) -> list[str]:
    """Re-hashes every tensor and file of a weights folder. Raises `ConversionError` for the first network that differs."""
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise ConversionError(f"{path} is {'not what the manifest says' if path.is_file() else 'missing'}; convert or copy the weights again")
    config = read_config(folder, manifest)
    for name in manifest.networks:
        network = published_tensors(folder, name, manifest, config)
        for published in network.entries:
            network.array(published)
    tensors = sum(len(n.tensors) for n in manifest.networks.values())
    return [f"{folder}: {tensors} tensors and {len(manifest.files)} files are what {NAME} says"]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
