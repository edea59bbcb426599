"""A LoRA from two sets of weights of one model: what distinguishes the second from the first, kernel by kernel.

For published kernels W and W', taken as matrices [o, i h w],

    W' - W = U S V^T,    up = U_r S_r^(1/2),    down = S_r^(1/2) V_r^T

where r keeps the largest singular values: no other factors of that rank come nearer in the squared error (Eckart and Young,
1936). They are written under diffusers' names without an alpha, so at strength 1 the whole product is added.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.linalg import eigh

from convert_weights.lora import Site, sites_of
from convert_weights.report import table
from convert_weights.safetensors_file import write_safetensors
from convert_weights.source import FLOATS, ConversionError
from instantid_jax.checkpoint import load_weights
from instantid_jax.config import ModelConfig, from_json
from instantid_jax.lora import LORA_NETWORKS

__all__ = ["Extracted", "extract_lora", "told"]

_SUFFIX = ".safetensors"
_NOTHING = 1e-6
"""Singular values below this part of the largest are left out."""


@dataclasses.dataclass
class Extracted:
    """What became of one network."""

    network: str
    kernels: int = 0
    """All that a LoRA can change."""
    changed: int = 0
    """Those that differ."""
    rank: int = 0
    """The largest that was written."""
    squared: float = 0.0
    """Sum of the squares of all differences of these kernels, and, next, of what the factors carry."""
    carried: float = 0.0
    others: list[str] = dataclasses.field(default_factory=list)
    """What differs and is no such kernel: biases, norms, embeddings, which no LoRA can carry."""


def extract_lora(
    base: Path, tuned: Path, out: Path, *, rank: int = 8, networks: Sequence[str] = LORA_NETWORKS, dtype: str = "float32", overwrite: bool = False
) -> list[Extracted]:
    """Writes the LoRA that takes the weights of folder `base` nearest to those of `tuned`, and returns what was found in each network.

    `rank` is the largest of a kernel, smaller ones are written where the difference has no more; a rank that no kernel reaches keeps
    all of it. `networks` are some of `LORA_NETWORKS`, `dtype` is that of the factors.
    Raises `ConversionError` for weights of different models, weights that do not differ, or an `out` that is not to be written;
    `checkpoint.WeightsError` for weights that cannot be read.
    """
    if rank < 1:
        raise ConversionError(f"the rank must be at least 1, not {rank}")
    _check_out(out, overwrite)
    config = _read_config(base)
    if _read_config(tuned) != config:
        raise ConversionError(f"{base} and {tuned} are of different models (their config.json differ); a LoRA needs two sets of weights of one")
    sites = {(site.network, site.path): site for site in sites_of(config).values()}
    found, factors = [], dict[str, np.ndarray]()
    for network in networks:
        report = Extracted(network)
        one, other = load_weights(base / network), load_weights(tuned / network)
        _check_alike(base, tuned, network, one, other)
        for path in one:
            site = sites.get((network, path))
            report.kernels += site is not None
            difference = np.asarray(other[path], np.float32) - np.asarray(one[path], np.float32)
            if not difference.any():
                continue
            if site is None:
                report.others.append(path)
                continue
            if not np.isfinite(difference).all():
                raise ConversionError(f"{base} or {tuned}: {network}/{path} has NaN or infinity; these are no trained weights")
            factors |= _factors(difference, site, rank, report)
        found.append(report)
    if not factors:
        others = [f"{report.network}/{path}" for report in found for path in report.others]
        also = f"; what differs ({len(others)}, such as {others[0]}) no LoRA can carry" if others else ""
        raise ConversionError(f"the kernels of {', '.join(networks)} are the same in {base} and {tuned}: there is nothing to write a LoRA of{also}")
    _write(out, {name: x.astype(FLOATS[dtype]) for name, x in factors.items()})
    return found


def told(found: Sequence[Extracted]) -> Iterator[str]:
    """Lines that say what a LoRA holds, and what it leaves out."""
    rows = []
    for one in found:
        share = f"{100 * one.carried / one.squared:.1f} %" if one.squared else ""
        rows.append((one.network, f"{one.changed} of {one.kernels}", str(one.rank or ""), share))
    yield from table(("network", "kernels that differ", "largest rank", "of the squared difference"), rows)
    for one in found:
        if one.others:
            yield f"note: {len(one.others)} weights of {one.network} differ that no LoRA can carry, such as {one.others[0]}"


def _check_out(out: Path, overwrite: bool) -> None:
    """Raises `ConversionError` for a file that is not to be written."""
    if out.suffix != _SUFFIX:
        raise ConversionError(f"--out {out}: a LoRA is written as a safetensors file; name it {out.with_suffix(_SUFFIX).name}")
    if not out.parent.is_dir():
        raise ConversionError(f"--out {out}: there is no folder {out.parent}; make it first")
    if out.is_dir() or (out.exists() and not overwrite):
        raise ConversionError(f"--out {out} {'is a folder; name a file' if out.is_dir() else 'exists; choose another --out, or give --overwrite'}")


def _factors(difference: np.ndarray, site: Site, rank: int, report: Extracted) -> dict[str, np.ndarray]:
    """The difference of one kernel, in our layout, as the file's two arrays; adds it to the report."""
    outputs, inputs, *kernel = site.shape
    matrix = np.ascontiguousarray(site.layout.inverse(difference)).reshape(outputs, -1).astype(np.float64)
    up, down, whole = _nearest(matrix, rank) if outputs <= matrix.shape[1] else _transposed(_nearest(matrix.T, rank))
    own, name = len(down), f"{site.network}.{site.module}"
    report.changed += 1
    report.rank = max(report.rank, own)
    report.squared += whole
    report.carried += float(np.square(up @ down).sum())
    return {
        f"{name}.lora_A.weight": np.ascontiguousarray(down).reshape(own, inputs, *kernel),
        f"{name}.lora_B.weight": np.ascontiguousarray(up).reshape(outputs, own, *(1 for _ in kernel)),
    }


def _nearest(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """up, down and the sum of squares of D [m, n], m <= n, float64.

    U_r are the largest eigenvectors of D D^T, and U_r U_r^T D the nearest of rank r. Of kernels of SDXL's size that is many times as fast as
    D's own singular value decomposition; that small singular values come out with 1e-8 of the largest does no harm, as only U_r is used.
    """
    size = len(matrix)
    squares, u = eigh(matrix @ matrix.T, subset_by_index=[max(0, size - rank), size - 1])
    squares, u = squares[::-1], u[:, ::-1]
    u = u[:, squares > _NOTHING**2 * squares[0]]
    root = np.sqrt(np.sqrt(squares[: u.shape[1]]))
    return u * root, (u.T @ matrix) / root[:, None], float(np.square(matrix).sum())


def _transposed(factors: tuple[np.ndarray, np.ndarray, float]) -> tuple[np.ndarray, np.ndarray, float]:
    up, down, whole = factors
    return down.T, up.T, whole


def _check_alike(base: Path, tuned: Path, network: str, one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    odd = sorted(one.keys() ^ other.keys())
    if odd:
        raise ConversionError(f"{base} and {tuned} are of different models: only one of them has {network}/{odd[0]}")
    for path, x in one.items():
        if x.shape != other[path].shape:
            shapes = f"{list(x.shape)} and {list(other[path].shape)}"
            raise ConversionError(f"{base} and {tuned} are of different models: {network}/{path} is {shapes}")


def _read_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"{folder} is not a folder of converted weights (no config.json); make one with: python -m convert_weights import")
    try:
        return from_json(ModelConfig, path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ConversionError(f"{path} is not that of a model, or is damaged ({problem}); convert or copy the weights again") from problem


def _write(out: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """The file appears whole or not at all."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        write_safetensors(partial, {name: (x.dtype, x.shape) for name, x in arrays.items()}, arrays.__getitem__, {"format": "pt"})
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
