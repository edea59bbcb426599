"""The device mesh: axes `data` (batch), `fsdp` (batch and weights) and `tensor` (widths)."""

from __future__ import annotations

import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of data x fsdp x tensor devices. Raises ValueError where that is not the number of devices."""
    shape, devices = (data, fsdp, tensor), jax.device_count()
    if math.prod(shape) != devices:
        raise ValueError(f"a mesh of {data} x {fsdp} x {tensor} needs {math.prod(shape)} devices; there are {devices}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """The shape of such a mesh without devices, to plan for machines that are not at hand."""
    return AbstractMesh((data, fsdp, tensor), AXES)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A batch is split along its first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_share(mesh: Mesh, rows: int) -> tuple[int, int]:
    """(index, count): this process feeds part `index` of `count` equal parts of a batch of `rows`.

    Processes that differ only along `tensor` feed the same part. Raises ValueError where a process would need rows that
    are not one part, because the mesh mixes the processes' devices.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    spans = sorted({place[0].indices(rows)[:2] for place in places if place is not None})
    first, last = spans[0][0], spans[-1][1]
    size = sum(end - start for start, end in spans)
    if size != last - first or rows % size or first % size:
        raise ValueError(f"the mesh gives process {jax.process_index()} the rows {spans} of a batch of {rows}, which are not one part of it")
    return first // size, rows // size
