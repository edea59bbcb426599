"""Which process feeds what, and how they find each other."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from instantid_jax.parallel import mesh as module
from instantid_jax.parallel.distributed import agreed, join, leave, put_whole, stacked, synchronize, to_host
from instantid_jax.parallel.environment import place_of, with_port
from instantid_jax.parallel.mesh import abstract_mesh, batch_rows, make_mesh


def test_alone_everything_is_trivial():
    synchronize("x")
    assert agreed(True) and not agreed(False)
    assert np.array_equal(stacked(np.arange(3)), [[0, 1, 2]])
    assert np.array_equal(to_host({"x": jax.numpy.ones(2)})["x"], [1, 1])
    assert batch_rows(make_mesh(1, 1, jax.device_count()), 8).tolist() == list(range(8))
    assert leave(3) == 3  # and is still here
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert np.array_equal(put_whole(np.arange(3), place), [0, 1, 2])


@pytest.mark.parametrize("given", [{"processes": 2}, {"process": 0}, {"processes": 2, "process": 0}, {"coordinator": "x:1"}])
def test_addresses_are_given_together_or_not_at_all(given):
    with pytest.raises(ValueError, match="together, or none of them"):
        join(**given)


def spans(monkeypatch, *rows):
    """As if this process's devices held these rows."""
    places = {i: (slice(*span),) for i, span in enumerate(rows)}
    monkeypatch.setattr(module, "batch_sharding", lambda mesh: types.SimpleNamespace(addressable_devices_indices_map=lambda shape: places))


@pytest.mark.parametrize(
    ("spanned", "fed"),
    [
        ([(0, 2), (2, 4)], [0, 1, 2, 3]),
        ([(4, 6), (6, 8)], [4, 5, 6, 7]),
        ([(2, 4), (2, 4)], [2, 3]),
        ([(4, 6), (0, 2)], [0, 1, 4, 5]),
        ([(None, None)], list(range(8))),
    ],
)
def test_a_process_feeds_the_rows_of_its_devices(monkeypatch, spanned, fed):
    spans(monkeypatch, *spanned)
    assert batch_rows(make_mesh(1, 1, jax.device_count()), 8).tolist() == fed


def test_a_mesh_may_be_planned_without_devices():
    assert isinstance(abstract_mesh(3, 16, 2), AbstractMesh) and dict(abstract_mesh(3, 16, 2).shape) == {"data": 3, "fsdp": 16, "tensor": 2}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"JAX_COORDINATOR_ADDRESS": "a:9"}, None),
        ({"JAX_COORDINATOR_ADDRESS": "a:9", "JAX_PROCESS_COUNT": "2", "JAX_PROCESS_ID": "1"}, ("a:9", 2, 1)),
        ({"JAX_COORDINATOR_ADDRESS": "a", "JAX_PROCESS_COUNT": "2", "NODE_RANK": "0"}, ("a:1234", 2, 0)),
        ({"JAX_COORDINATOR_ADDRESS": "a", "JAX_COORDINATOR_PORT": "77", "JAX_PROCESS_COUNT": "2", "NODE_RANK": "0"}, ("a:77", 2, 0)),
        ({"JAX_COORDINATOR_ADDRESS": "[::1]:5", "JAX_PROCESS_COUNT": "2", "JAX_PROCESS_ID": "1"}, ("[::1]:5", 2, 1)),
        ({"JAX_COORDINATOR_ADDRESS": "[::1]", "JAX_PROCESS_COUNT": "2", "JAX_PROCESS_ID": "1"}, ("[::1]:1234", 2, 1)),
        ({"JAX_COORDINATOR_ADDRESS": "fe80::1", "JAX_PROCESS_COUNT": "2", "JAX_PROCESS_ID": "1"}, ("[fe80::1]:1234", 2, 1)),
        ({"JAX_COORDINATOR_ADDRESS": "a", "JAX_PROCESS_COUNT": "3", "JOB_COMPLETION_INDEX": "2"}, ("a:1234", 3, 2)),
        (
            {"JAX_COORDINATOR_ADDRESS": "a", "JAX_PROCESS_COUNT": "8", "JOB_COMPLETION_INDEX": "3", "JOB_INDEX": "1", "PROCESSES_IN_JOB": "4"},
            ("a:1234", 8, 7),
        ),
    ],
)
def test_the_environment_says_where(environment, place):
    assert place_of(environment) == place


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_PROCESS_COUNT": "two", "JAX_PROCESS_ID": "0"}, "JAX_PROCESS_COUNT must be a whole number from 1, not 'two'"),
        ({"JAX_PROCESS_COUNT": "0", "JAX_PROCESS_ID": "0"}, "from 1, not '0'"),
        ({"JAX_PROCESS_COUNT": "2", "JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID must be a whole number from 0, not '-1'"),
        ({"JAX_PROCESS_COUNT": "2", "JAX_PROCESS_ID": "2"}, "makes this process 2, but JAX_PROCESS_COUNT is 2"),
        ({"JAX_PROCESS_COUNT": "2"}, "nothing says which process this is: set JAX_PROCESS_ID"),
        ({"JAX_PROCESS_COUNT": "2", "JOB_INDEX": "0", "JOB_COMPLETION_INDEX": "0"}, "not PROCESSES_IN_JOB"),
        ({"JAX_PROCESS_COUNT": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": ""}, "not JAX_COORDINATOR_ADDRESS"),
        ({"JAX_PROCESS_COUNT": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "a:b"}, "'a:b' is no address of process 0"),
    ],
)
def test_half_an_environment_is_refused(variables, message):
    with pytest.raises(ValueError, match=message):
        place_of({"JAX_COORDINATOR_ADDRESS": "a"} | variables)


@pytest.mark.parametrize("address", ["host:", "host:0", "host:70000", ":5", "a b", "[::1", "http://a:1"])
def test_what_is_no_address_is_refused_before_anybody_waits(address):
    with pytest.raises(ValueError, match=r"is no address of process 0; write its host and, after a colon, a port"):
        join(address, 2, 1)


def test_a_host_alone_has_the_usual_port():
    assert (with_port("host"), with_port("host:5"), with_port("::1", 7)) == ("host:1234", "host:5", "[::1]:7")


def test_a_place_beyond_the_last_is_refused():
    with pytest.raises(ValueError, match="there is no process 2 of 2"):
        join("a:1", 2, 2)


@pytest.mark.parametrize(
    ("shape", "message"), [({"fsdp": 0}, "at least one device along each axis"), ({"dcn_data": 3}, "3 slices of 1 x 1 x 1 needs 3")]
)
def test_meshes_that_are_none_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**shape)


def devices(slices, processes):
    """As if there were these devices: their slice and process, by number."""
    kinds = zip(slices, processes, strict=True)
    return [
        types.SimpleNamespace(id=i, slice_index=s, process_index=p, platform="cpu", device_kind="cpu", client=None) for i, (s, p) in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("slices", "processes", "granule"),
    [([0, 0, 1, 1], [0, 1, 2, 3], "slice_index"), ([0, 0, 0, 0], [0, 0, 1, 1], "process_index")],
)
def test_slices_lie_along_data_and_processes_where_there_are_none(slices, processes, granule, monkeypatch):
    made = []
    monkeypatch.setattr(module, "Mesh", lambda arranged, axes, axis_types: made.append(arranged) or "mesh")
    given = devices(slices, processes)
    assert make_mesh(fsdp=2, dcn_data=2, devices=given) == "mesh"
    assert made[0].shape == (2, 2, 1)
    for i in range(2):
        assert {getattr(device, granule) for device in made[0][i].flat} == {i}
    with pytest.raises(ValueError, match=r"mesh\.dcn_data is 4, but there are [12] slices"):
        make_mesh(dcn_data=4, devices=devices([0, 0, 0, 0], [0, 0, 0, 0]))


def test_a_mesh_of_slices_may_be_planned_too():
    assert dict(abstract_mesh(3, 4, dcn_data=2).shape) == {"data": 6, "fsdp": 4, "tensor": 1}
