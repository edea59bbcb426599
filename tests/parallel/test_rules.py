"""Sharding rules on SDXL's real shapes, without any weights."""

import math

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from instantid_jax.config import sdxl
from instantid_jax.models import build_networks
from instantid_jax.nn.placement import SMALL
from instantid_jax.parallel.mesh import make_mesh
from instantid_jax.parallel.rules import partition_spec
from instantid_jax.paths import flatten

MESH = AbstractMesh((1, 8, 2), ("data", "fsdp", "tensor"))


def test_feed_forward_is_split_by_width_over_tensor() -> None:
    assert partition_spec("x/ff/net_0/proj/kernel", (10, 1280, 10240), MESH) == PartitionSpec(None, "fsdp", "tensor")
    assert partition_spec("x/ff/net_2/kernel", (10, 5120, 1280), MESH) == PartitionSpec(None, "tensor", "fsdp")


def test_small_parameters_stay_whole() -> None:
    assert partition_spec("x/norm1/scale", (1280,), MESH) == PartitionSpec()


@pytest.mark.parametrize("name", ["unet", "identitynet", "adapter", "resampler"])
def test_nothing_large_is_replicated_under_fsdp(name: str) -> None:
    for path, leaf in flatten(build_networks(sdxl())[name].abstract).items():
        if math.prod(leaf.shape) >= SMALL:
            assert "fsdp" in partition_spec(path, leaf.shape, MESH), path


def test_mesh_of_the_wrong_size_is_refused() -> None:
    wanted = jax.device_count() + 1
    with pytest.raises(ValueError, match=f"needs {wanted} devices; there are {jax.device_count()}"):
        make_mesh(data=wanted)
