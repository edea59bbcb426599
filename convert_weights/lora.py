"""Reads LoRA files of the community into `instantid_jax.lora.Lora`; see `tables.lora` for the ways they are written in.

The file is mapped and its header checked as any other's, so nothing in it is trusted; a LoRA in a torch file is read, never run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.readers import open_tensors, table_of
from convert_weights.recognise import numbers_wrong
from convert_weights.rules import Layout, Shape
from convert_weights.source import FLOATS, SourceError, Tensor, TensorFile
from convert_weights.tables import lora as names
from convert_weights.tables import single_file
from instantid_jax.config import ModelConfig
from instantid_jax.lora import LORA_NETWORKS, Factors, Lora
from instantid_jax.models import build_networks
from instantid_jax.published import nearest

__all__ = ["Site", "read_lora", "read_loras", "sites_of"]

_METADATA = "lora_adapter_metadata"
_LISTED = 20


@dataclasses.dataclass(frozen=True)
class Site:
    """A kernel that a LoRA may change."""

    network: str
    path: str
    module: str
    """Its name in diffusers or transformers, without ".weight"."""
    shape: Shape
    """[o, i] or [o, i, h, w], as published."""
    layout: Layout


@functools.lru_cache(maxsize=8)
def sites_of(config: ModelConfig) -> dict[str, Site]:
    """Every spelling of every kernel of the UNet and the text towers."""
    networks, spellings = build_networks(config), dict[str, Site]()
    originals = single_file.unet(config.unet)
    for network in LORA_NETWORKS:
        table = table_of(network, config)
        for path, shape in networks[network].disk_shapes().items():
            found = table.to_source(path, len(shape)) if path.endswith("/kernel") else None
            if found is None:
                continue
            module = found[0].removesuffix(".weight")
            site = Site(network, path, module, found[1].source_shapes(shape)[0], found[1])
            if network == "unet":
                renamed = originals.to_source(found[0], len(shape))
                original = module if renamed is None else renamed[0].removeprefix(single_file.UNET).removesuffix(".weight")
                spellings |= dict.fromkeys(names.unet_spellings(module, original), site)
            else:
                spellings |= dict.fromkeys(names.text_spellings(network, module), site)
    return spellings


def read_loras(files: Sequence[Path], config: ModelConfig, allow_unknown: bool = False) -> list[Lora]:
    """Several files as `read_lora` reads them."""
    return [read_lora(file, config, allow_unknown) for file in files]


def read_lora(file: str | Path, config: ModelConfig, allow_unknown: bool = False) -> Lora:
    """A LoRA for a model of this configuration: plain, with convolutions (LoCon), or with lengths (DoRA).

    With `allow_unknown`, names that are not understood are left out with a warning that lists them.
    Raises `SourceError` for a damaged file, names that are not understood, parts that are missing or of the wrong shape, and
    values that no trained LoRA has.
    """
    path = Path(file)
    if path.is_dir():
        raise SourceError(f"{path} is a folder; name the LoRA's file in it")
    whole = open_tensors(path)
    sites = sites_of(config)
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    where: dict[tuple[str, str], Site] = {}
    unknown: list[str] = []
    for name, tensor in whole.tensors.items():
        stem, part = names.split(name) or (name, "")
        site = sites.get(stem) if part else None
        if site is None:
            unknown.append(name)
            continue
        key = (site.network, site.path)
        where[key] = site
        if part in found.setdefault(key, {}):
            raise SourceError(f"{path}: {name} and {found[key][part].name} are the same weight")
        found[key][part] = tensor
    _refuse_foreign(path, found, where, unknown)
    if unknown:
        _unknown(path, unknown, list(sites), allow_unknown)
    digest = whole.files[0].sha256()
    alphas = _Alphas(whole)
    networks: dict[str, dict[str, Factors]] = {}
    for key, parts in found.items():
        networks.setdefault(key[0], {})[key[1]] = _factors(path, where[key], parts, alphas)
    whole.check()
    return Lora(path.name, digest, networks, tuple(unknown))


def _refuse_foreign(path: Path, found: Mapping[tuple[str, str], Mapping[str, Tensor]], where: Mapping[Any, Site], unknown: Sequence[str]) -> None:
    """Raises `SourceError` where the file is no LoRA, or one for another model, as its contexts or its names show."""
    if not any("down" in parts for parts in found.values()):
        kinds = sorted({what.strip(" ()") for name in unknown if (what := names.reason(name))})
        is_model = any(name.startswith(("model.diffusion_model.", "down_blocks.")) for name in unknown)
        what = f"; it holds {', '.join(kinds)}" if kinds else "; it holds a whole UNet" if is_model else ""
        first = f", such as {min(unknown)!r}" if unknown else ""
        raise SourceError(f"{path}: this is no LoRA for SDXL: not one of its {len(unknown)} names{first} is a LoRA's{what}")
    for key, parts in found.items():
        site = where[key]
        down = parts.get("down")
        if down is not None and site.module.endswith("attn2.to_k") and len(down.shape) >= 2 and down.shape[1] != site.shape[1]:
            models = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "the SDXL refiner"}
            if down.shape[1] in models:
                raise SourceError(
                    f"{path}: this is a LoRA for {models[down.shape[1]]}, whose contexts are {down.shape[1]} wide; this model's are {site.shape[1]}"
                )


def _unknown(path: Path, unknown: Sequence[str], known: Sequence[str], allowed: bool) -> None:
    """Raises `SourceError`, or warns, with a list of the names that are not understood."""
    listed = [name + (names.reason(name) or ("" if allowed else _hint(name, known))) for name in sorted(unknown)[:_LISTED]]
    more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
    text = f"names that are not understood ({len(unknown)}): {'; '.join(listed)}{more}"
    if not allowed:
        raise SourceError(f"{path}: {text}. Leave them out with --allow-unknown-lora-keys (allow_unknown=True)")
    warnings.warn(f"{path.name}: {text}; they are left out", stacklevel=3)


def _hint(name: str, known: Sequence[str]) -> str:
    """The module that was probably meant, of those with as long a name."""
    stem = (names.split(name) or (name, ""))[0]
    close = nearest(stem, [spelling for spelling in known if abs(len(spelling) - len(stem)) < 2][:200], cutoff=0.9)
    return f" (nearest: {close})" if close else ""


def _factors(path: Path, site: Site, parts: Mapping[str, Tensor], alphas: _Alphas) -> Factors:
    """One kernel's change in our layout, held against the kernel's shape."""
    tensors = {part: _array(path, tensor) for part, tensor in parts.items()}
    for part, other in (("down", "up"), ("up", "down")):
        if part not in tensors:
            name = next(iter(parts.values())).name
            have = f"{parts[other].name} has no {part} beside it" if other in parts else f"{name} has neither up nor down beside it"
            raise SourceError(f"{path}: {have}; the file is incomplete")
    up, down = tensors["up"], tensors["down"]
    outputs, inputs, *kernel = site.shape
    rank = up.shape[1] if up.ndim > 1 else 0
    _fit(path, parts["up"], up, [(outputs, rank), (outputs, rank, 1, 1)], site)
    up = up.reshape(outputs, rank)
    if "mid" in tensors:
        mid = tensors["mid"]
        inner = mid.shape[1] if mid.ndim > 1 else 0
        _fit(path, parts["mid"], mid, [(rank, inner, *kernel)] if kernel else [], site)
        _fit(path, parts["down"], down, [(inner, inputs), (inner, inputs, 1, 1)], site)
        down = np.einsum("abhw,bi->aihw", mid.astype(np.float32), down.reshape(inner, inputs).astype(np.float32))
    pointwise = [(rank, inputs), (rank, inputs, 1, 1)]
    _fit(path, parts["down"], down, [(rank, inputs, *kernel)] if kernel and kernel != [1, 1] else pointwise, site)
    down = down.reshape(rank, inputs, *kernel)
    magnitude = tensors.get("magnitude")
    if magnitude is not None:
        _fit(path, parts["magnitude"], magnitude, [(outputs, *(1,) * k) for k in range(4)] + [(1, outputs, 1, 1)], site)
        magnitude = magnitude.reshape(outputs)
    alpha = tensors.get("alpha")
    if alpha is not None:
        _fit(path, parts["alpha"], alpha, [(), (1,)], site)
    scale = alphas.scale(site, rank) if alpha is None else float(alpha.reshape(())) / rank
    return Factors(np.ascontiguousarray(site.layout.forward(down)), np.ascontiguousarray(up.T), scale, magnitude)


def _array(path: Path, tensor: Tensor) -> np.ndarray:
    """A copy of a tensor. Raises `SourceError` for types and values that a LoRA does not have."""
    if tensor.dtype.name not in FLOATS and not (tensor.name.endswith(".alpha") and tensor.dtype.kind in "iu"):
        raise SourceError(f"{path}: {tensor.name} has type {tensor.dtype.name}; only {', '.join(FLOATS)} are read")
    x = np.array(tensor.array(), order="C")
    wrong = numbers_wrong(x) if tensor.dtype.name in FLOATS else None
    if wrong:
        raise SourceError(f"{path}: {tensor.name} has {wrong}; this is no trained LoRA")
    return x


def _fit(path: Path, tensor: Tensor, x: np.ndarray, shapes: Sequence[Shape], site: Site) -> None:
    if x.shape not in shapes or 0 in x.shape:
        wanted = f"{list(shapes[0])} is needed" if shapes and 0 not in shapes[0] else "none is possible"
        raise SourceError(f"{path}: {tensor.name} is {list(tensor.shape)} where {wanted}: {site.module} is {list(site.shape)}")


class _Alphas:
    """alpha of files that say it in their metadata, as diffusers writes them; where nothing is said it is the rank."""

    def __init__(self, file: TensorFile) -> None:
        self._where, self._said = file.where, dict[str, Any]()
        if _METADATA in file.metadata:
            try:
                said = json.loads(file.metadata[_METADATA])
            except (ValueError, RecursionError) as problem:
                raise SourceError(f"{file.where}: its metadata {_METADATA} is damaged ({problem})") from problem
            if not isinstance(said, dict):
                raise SourceError(f"{file.where}: its metadata {_METADATA} is no JSON object")
            self._said = said

    def scale(self, site: Site, rank: int) -> float:
        """s of a kernel without an alpha tensor."""
        prefix = f"{site.network}."
        bare = "lora_alpha" in self._said and site.network == "unet"
        own = {key.removeprefix("" if bare else prefix): v for key, v in self._said.items() if bare or key.startswith(prefix)}
        alpha = own.get("lora_alpha", rank)
        patterns = own.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise SourceError(f"{self._where}: alpha_pattern in its metadata is no JSON object")
        for pattern, value in patterns.items():
            name = pattern.removeprefix("^")
            if not name.replace("_", "").replace(".", "").isalnum():
                raise SourceError(f"{self._where}: alpha_pattern {pattern[:80]!r} in its metadata is not a module's name")
            if site.module == name or (site.module.endswith(f".{name}") and name == pattern):
                alpha = value
                break
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise SourceError(f"{self._where}: lora_alpha {str(alpha)[:40]!r} in its metadata is no number")
        return alpha / (math.sqrt(rank) if own.get("use_rslora") is True else rank)
