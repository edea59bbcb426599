"""Arrays in mapped files are copied as they are, wherever they lie."""

from pathlib import Path

import numpy as np
import pytest

from instantid_jax.checkpoint import load_weights, save_weights
from instantid_jax.mapped import copy_into, read_ahead
from instantid_jax.models.network import _stack

RNG = np.random.default_rng(0)
FLAT = {
    "kernel": RNG.standard_normal((3, 40, 50), np.float32),
    "turned": RNG.standard_normal((6, 4), np.float32).T,
    "scalar": np.ones((), np.float32),
}


@pytest.fixture
def mapped(tmp_path: Path) -> dict[str, np.ndarray]:
    save_weights(tmp_path / "w", FLAT)
    return load_weights(tmp_path / "w", later=True)


def test_arrays_are_read_to_where_they_are_wanted(mapped: dict[str, np.ndarray]) -> None:
    read_ahead([*mapped.values(), np.ones(3)])  # what is in no file is no matter
    for path, x in mapped.items():
        room = np.full((2, *x.shape), np.nan, x.dtype)
        copy_into(room[1, ...], x)
        assert np.array_equal(room[1], FLAT[path]) and np.isnan(room[0]).all()


@pytest.mark.parametrize("part", [lambda x: x[1], lambda x: x[:, ::2], lambda x: x.transpose(2, 0, 1), lambda x: x.astype(np.float16), np.array])
def test_parts_and_copies_of_a_mapped_array_are_not_taken_for_its_file(part, mapped: dict[str, np.ndarray]) -> None:  # type: ignore[no-untyped-def]
    x = part(mapped["kernel"])
    room = np.empty(x.shape, np.float32)
    copy_into(room, x)
    assert np.array_equal(room, part(FLAT["kernel"]))


def test_stacks_are_equal_to_numpy_s_and_aligned(mapped: dict[str, np.ndarray]) -> None:
    for layers in ([mapped["kernel"]] * 3, [mapped["kernel"], FLAT["kernel"]], [mapped["scalar"]] * 2):
        stacked = _stack(layers)
        assert np.array_equal(stacked, np.stack(layers)) and stacked.ctypes.data % 64 == 0


def test_a_file_that_became_shorter_is_told(mapped: dict[str, np.ndarray]) -> None:
    file = Path(str(mapped["kernel"].base.filename))  # type: ignore[union-attr]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match="ends too early"):
        copy_into(np.empty((3, 40, 50), np.float32), mapped["kernel"])
