"""LoRA: low-rank changes of a model's weights, merged at load or kept apart and merged inside the compiled program.

For a kernel W [..., i, o] (of a convolution [h, w, i, o]) with factors down [..., i, r] and up [r, o], at strength w:

    LoRA  (1)  dW = w s down up,   s = alpha / r                                arXiv 2106.09685, section 4.1
    DoRA  (2)  dW = m (W + w s down up) / |W + w s down up| - W                 arXiv 2402.09353, equation 5

where |.| is taken over all axes but the last, and m [o] is the trained length. Several LoRAs add their differences, each
taken from the unchanged W, which is what diffusers computes without fusing; so the order does not matter, and the sum is
made in an order of its own that makes it the same to the last bit.

Factors live under the on-disk paths of the parameters they change (`Lora`), and, kept apart, under the in-memory paths,
where equal layers are stacked (`stack_lora`). Only the UNet and the text towers can be changed: IdentityNet, the resampler
and the image adapter's keys and values are other networks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from instantid_jax.paths import Tree, flatten, stacked_path, unflatten

__all__ = ["LORA_NETWORKS", "Factors", "Lora", "LoraError", "Stacked", "apply_loras", "check_scales", "merge_lora", "stack_lora"]

LORA_NETWORKS = ("unet", "text_encoder", "text_encoder_2")
"""The networks that a LoRA can change."""


class LoraError(ValueError):
    """A LoRA that does not fit, or a strength that is none; the message says which and what is needed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """The change of one kernel, in the kernel's own layout; host arrays of any float type."""

    down: np.ndarray
    """[..., i, r], the leading axes those of the kernel."""
    up: np.ndarray
    """[r, o]."""
    scale: float
    """s of equation (1)."""
    magnitude: np.ndarray | None = None
    """m of equation (2), [o]; None without DoRA."""


@dataclasses.dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA as `convert_weights.lora.read_lora` reads it."""

    name: str
    """What messages call it: its file's name."""
    digest: str
    """SHA-256 of its file."""
    networks: Mapping[str, Mapping[str, Factors]]
    """Of `LORA_NETWORKS`: {network: {on-disk path of a kernel: its change}}."""
    left_out: Sequence[str] = ()
    """Names in the file that were not understood, where leaving them out was allowed."""


class Stacked(NamedTuple):
    """The change of one kernel as it lies in memory; with a leading axis of layers where the kernel has one."""

    down: Any
    """[..., i, r], or [l, i, r]."""
    up: Any
    """[r, o], or [l, r, o]."""
    scale: Any
    """A scalar, or [l, 1, 1]; zero for a layer that is not changed."""
    magnitude: Any = None
    """[o], or [l, 1, o]; None where no layer has DoRA."""
    normed: Any = None
    """Beside `magnitude`: whether equation (2) counts, a scalar or [l, 1, 1]."""


def check_scales(loras: Sequence[Lora], scales: Sequence[float]) -> list[float]:
    """One finite strength for each LoRA; none given is 1 for all. Raises `LoraError`."""
    given = [1.0] * len(loras) if not len(scales) else [float(s) for s in scales]
    if len(given) != len(loras):
        raise LoraError(f"{len(given)} LoRA strengths are given for {len(loras)} LoRAs; give one for each, or none")
    for lora, scale in zip(loras, given, strict=True):
        if not math.isfinite(scale):
            raise LoraError(f"the strength of {lora.name} must be a finite number, not {scale}")
    return given


def in_order(loras: Sequence[Lora], scales: Sequence[float]) -> list[tuple[Lora, float]]:
    """LoRAs with their strengths in the order that they are summed in, whatever order they are given in."""
    return sorted(zip(loras, check_scales(loras, scales), strict=True), key=lambda pair: (pair[0].digest, pair[1]))


def merge_lora(flat: Mapping[str, Any], network: str, loras: Sequence[Lora], scales: Sequence[float] = ()) -> dict[str, Any]:
    """One network's weights with LoRAs added, for good: {on-disk path: array}, on the host.

    The sums are made in float32 and rounded once to the type that the weights have. Nothing takes a LoRA out again but loading
    the weights anew. Merging in turn gives other roundings than merging together, and with DoRA another result.
    Raises `LoraError` for a LoRA that does not fit.
    """
    out = dict(flat)
    pairs = [(lora.networks.get(network, {}), scale, lora.name) for lora, scale in in_order(loras, scales)]
    for path in dict.fromkeys(path for factors, _, _ in pairs for path in factors):
        if path not in flat:
            name = next(name for factors, _, name in pairs if path in factors)
            raise LoraError(f"{name} changes {network}'s {path!r}, which these weights do not have; the LoRA is of another model")
        kernel = np.asarray(flat[path])
        parts = []
        for factors, scale, name in pairs:
            if path in factors:
                _check_shapes(factors[path], kernel.shape, f"{name}: {network}'s {path!r}")
                parts.append((_single(factors[path]), np.float32(scale)))
        out[path] = _changed(np, kernel, parts)
    return out


def stack_lora(factors: Mapping[str, Factors], abstract: Tree) -> dict[str, Stacked]:
    """One network's factors for `apply_loras`: {in-memory path: change}, host arrays.

    `abstract` is the network's tree of shapes. Layers of a stack that the LoRA leaves alone get zeros, and smaller ranks are
    filled up with zeros. Raises `LoraError` for a path or shape that the network does not have.
    """
    shapes = {path: leaf.shape for path, leaf in flatten(abstract).items()}
    groups: dict[str, dict[int | None, Factors]] = {}
    for path, one in factors.items():
        target, index = stacked_path(path)
        shape = shapes.get(target, ())
        if not shape or (index is not None and index >= shape[0]):
            raise LoraError(f"{path!r} is no weight of this network; the LoRA is of another model")
        _check_shapes(one, shape if index is None else shape[1:], repr(path))
        groups.setdefault(target, {})[index] = one
    return {target: _single(layers[None]) if None in layers else _stack(layers, shapes[target][0]) for target, layers in groups.items()}


def apply_loras(tree: Tree, loras: Sequence[tuple[Mapping[str, Stacked], Any]]) -> Tree:
    """A network's parameters with LoRAs added, inside a traced function: the strengths may be traced, and another compiles nothing.

    `loras` are (what `stack_lora` gave, strength) pairs, in the order of `in_order`. Costs, each time the program runs, the
    products of the factors (2 r for every number of a kernel) and memory for a second copy of the kernels that change.
    """
    return with_kernels(tree, changed_kernels(tree, loras))


def changed_kernels(tree: Tree, loras: Sequence[tuple[Mapping[str, Stacked], Any]]) -> dict[str, Any]:
    """The kernels that LoRAs change, by path, with them added."""
    flat = flatten(tree) if loras else {}
    paths = dict.fromkeys(path for stack, _ in loras for path in stack)
    return {path: _changed(jnp, flat[path], [(stack[path], scale) for stack, scale in loras if path in stack]) for path in paths}


def with_kernels(tree: Tree, kernels: Mapping[str, Any]) -> Tree:
    """The parameters with `kernels` in the place of those of their paths."""
    return unflatten({**flatten(tree), **kernels}) if kernels else tree


def _changed(xp: Any, kernel: Any, parts: Sequence[tuple[Stacked, Any]]) -> Any:
    """The kernel with the differences of all parts, computed in float32 (`xp` is numpy or jax.numpy)."""
    base = kernel.astype(np.float32)
    total: Any = None
    for part, scale in parts:
        product = _product(xp, part.down.astype(np.float32), part.up.astype(np.float32))
        difference = (scale * part.scale) * product
        if part.magnitude is not None:
            moved = base + difference
            axes = tuple(range(1 if part.up.ndim == 3 else 0, kernel.ndim - 1))
            length = xp.sqrt(xp.sum(xp.square(moved), axis=axes, keepdims=True))
            difference = xp.where(part.normed, part.magnitude / length * moved - base, difference)
        total = difference if total is None else total + difference
    return (base + total).astype(kernel.dtype)


def _product(xp: Any, down: Any, up: Any) -> Any:
    return np.matmul(down, up) if xp is np else jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)


def _single(one: Factors) -> Stacked:
    """A kernel that stands alone."""
    scale = np.float32(one.scale)
    if one.magnitude is None:
        return Stacked(one.down, one.up, scale)
    return Stacked(one.down, one.up, scale, one.magnitude.astype(np.float32), np.bool_(True))


def _stack(layers: Mapping[Any, Factors], depth: int) -> Stacked:
    """The kernels of equal layers; `layers` holds those that change."""
    some = next(iter(layers.values()))
    rank = max(one.up.shape[0] for one in layers.values())
    types = {x.dtype for one in layers.values() for x in (one.down, one.up)}
    dtype = types.pop() if len(types) == 1 else np.dtype(np.float32)
    down = np.zeros((depth, *some.down.shape[:-1], rank), dtype)
    up = np.zeros((depth, rank, some.up.shape[1]), dtype)
    scale = np.zeros((depth, 1, 1), np.float32)
    magnitude, normed = np.ones((depth, 1, some.up.shape[1]), np.float32), np.zeros((depth, 1, 1), bool)
    for index, one in layers.items():
        own = one.up.shape[0]
        down[index, ..., :own], up[index, :own], scale[index] = one.down, one.up, one.scale
        if one.magnitude is not None:
            magnitude[index, 0], normed[index] = one.magnitude, True
    return Stacked(down, up, scale, magnitude, normed) if normed.any() else Stacked(down, up, scale)


def _check_shapes(one: Factors, shape: tuple[int, ...], where: str) -> None:
    """Raises `LoraError` where factors do not make a kernel of `shape`."""
    rank = one.up.shape[0] if one.up.ndim else 0
    if one.down.shape != (*shape[:-1], rank) or one.up.shape != (rank, shape[-1]):
        raise LoraError(f"{where} has the shape {list(shape)}, its LoRA is for {[*one.down.shape[:-1], *one.up.shape[1:]]}")
    if one.magnitude is not None and one.magnitude.shape != (shape[-1],):
        raise LoraError(f"{where} has {shape[-1]} outputs, its DoRA lengths are {list(one.magnitude.shape)}")
