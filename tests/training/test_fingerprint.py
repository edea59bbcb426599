"""Fingerprints see every bit, and are the same wherever an array lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.training.fingerprint import _all, fingerprints

RNG = np.random.default_rng(0)
ARRAYS = {
    "float32": RNG.normal(size=(5, 3, 2)).astype(np.float32),
    "bfloat16": RNG.normal(size=(7,)).astype(jnp.bfloat16),
    "int32": np.arange(-3, 9, dtype=np.int32).reshape(3, 4),
    "int8": np.arange(5, dtype=np.int8),
    "bool": np.array([True, False, True]),
    "scalar": np.float32(2.5),
    "odd": np.array([np.nan, -0.0, 0.0, np.inf], np.float32),
}


def of(array):
    return fingerprints({"x": jnp.asarray(array)})["x"]


@pytest.mark.parametrize("name", ARRAYS)
def test_the_two_ways_to_compute_it_agree(name):
    array = jnp.asarray(ARRAYS[name])
    assert of(array) == int(_all([array])[0])


@pytest.mark.parametrize("name", ["float32", "bfloat16", "odd"])
def test_one_flipped_bit_changes_it(name):
    array, seen = ARRAYS[name], {of(ARRAYS[name])}
    for i in range(array.nbytes):
        for bit in range(8):
            content = bytearray(array.tobytes())
            content[i] ^= 1 << bit
            seen.add(of(np.frombuffer(bytes(content), array.dtype).reshape(array.shape)))
    assert len(seen) == 1 + 8 * array.nbytes


def test_places_count():
    array = ARRAYS["float32"]
    assert len({of(array), of(array[::-1].copy()), of(array.swapaxes(0, 1).copy())}) == 3
    assert of(np.zeros(3, np.float32)) != of(np.zeros(4, np.float32)) != of(np.array([0, 0, -0.0, 0], np.float32))


def test_large_arrays_are_summed_in_pieces():
    array = RNG.integers(0, 2**32, 3 * 2**20 + 7, dtype=np.uint32)
    assert of(array) == int(_all([jnp.asarray(array)])[0])


def test_other_widths_are_refused():
    with jax.enable_x64(True), pytest.raises(ValueError, match="not of float64"):
        _all([jnp.zeros(3, jnp.float64)])
