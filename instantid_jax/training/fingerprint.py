"""A number for the exact bits of every array of a tree, computed where the arrays lie.

For an array with bits b_i (as 32-bit words) at places i in row-major order:

    (1)  fingerprint = sum_i mix(b_i xor mix(i + 1))  mod 2^32

`mix` is a one-to-one map of 32-bit words that stirs all bits (the finaliser of MurmurHash3), so one changed word always
changes the sum. Sums of integers do not depend on their order: the number is the same on any mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["fingerprints"]


def _mix(x: Any) -> Any:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(x: jax.Array) -> jax.Array:
    """The bits of every element as a 32-bit word."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = x.dtype.itemsize
    if width not in (1, 2, 4):
        raise ValueError(f"fingerprints are of 8-, 16- and 32-bit arrays, not of {x.dtype}")
    return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]).astype(jnp.uint32)


@jax.jit
def _one(x: jax.Array) -> jax.Array:
    place, stride = jnp.uint32(1), 1
    for axis in reversed(range(x.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(_mix(_words(x) ^ _mix(place)), dtype=jnp.uint32)


@jax.jit
def _all(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_one(x) for x in arrays]


def _here(x: np.ndarray) -> int:
    """(1) in NumPy, which needs no compiling."""
    flat = np.ascontiguousarray(x).reshape(-1)
    width = flat.dtype.itemsize
    words = flat.astype(np.uint32) if flat.dtype == np.bool_ else flat.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[width]).astype(np.uint32)
    total = 0
    for start in range(0, len(words), 1 << 20):  # pieces that stay in the cache
        part = words[start : start + (1 << 20)]
        place = np.arange(start + 1, start + 1 + len(part), dtype=np.uint64).astype(np.uint32)
        total += int(_mix(part ^ _mix(place)).sum(dtype=np.uint64))
    return total % 2**32


def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Fingerprint of every array, the same in all processes; waits for the arrays."""
    if all(x.is_fully_addressable and next(iter(x.devices())).platform == "cpu" for x in arrays.values()):
        return {name: _here(np.asarray(x)) for name, x in arrays.items()}
    numbers = jax.device_get(_all(list(arrays.values())))
    return {name: int(np.asarray(number)) for name, number in zip(arrays, numbers, strict=True)}
