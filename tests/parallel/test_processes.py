"""Which process feeds what, and how they find each other."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from instantid_jax.parallel import mesh as module
from instantid_jax.parallel.distributed import agreed, join, stacked, synchronize, to_host
from instantid_jax.parallel.mesh import abstract_mesh, batch_share, make_mesh


def test_alone_everything_is_trivial():
    synchronize("x")
    assert agreed(True) and not agreed(False)
    assert np.array_equal(stacked(np.arange(3)), [[0, 1, 2]])
    assert np.array_equal(to_host({"x": jax.numpy.ones(2)})["x"], [1, 1])
    assert batch_share(make_mesh(1, 1, jax.device_count()), 8) == (0, 1)


@pytest.mark.parametrize("given", [{"processes": 2}, {"process": 0}, {"processes": 2, "process": 0}])
def test_addresses_are_given_together_or_not_at_all(given):
    with pytest.raises(ValueError, match="together, or none of them"):
        join(**given)


def spans(monkeypatch, *rows):
    """As if this process's devices held these rows."""
    places = {i: (slice(*span),) for i, span in enumerate(rows)}
    monkeypatch.setattr(module, "batch_sharding", lambda mesh: types.SimpleNamespace(addressable_devices_indices_map=lambda shape: places))


@pytest.mark.parametrize(
    ("rows", "share"),
    [([(0, 2), (2, 4)], (0, 2)), ([(4, 6), (6, 8)], (1, 2)), ([(2, 4), (2, 4)], (1, 4)), ([(None, None)], (0, 1))],
)
def test_a_process_feeds_one_part(monkeypatch, rows, share):
    spans(monkeypatch, *rows)
    assert batch_share(make_mesh(1, 1, jax.device_count()), 8) == share


@pytest.mark.parametrize("rows", [[(0, 2), (4, 6)], [(1, 3)], [(0, 3)]])
def test_rows_that_are_no_part_are_refused(monkeypatch, rows):
    spans(monkeypatch, *rows)
    with pytest.raises(ValueError, match="which are not one part of it"):
        batch_share(make_mesh(1, 1, jax.device_count()), 8)


def test_a_mesh_may_be_planned_without_devices():
    assert isinstance(abstract_mesh(3, 16, 2), AbstractMesh) and dict(abstract_mesh(3, 16, 2).shape) == {"data": 3, "fsdp": 16, "tensor": 2}
