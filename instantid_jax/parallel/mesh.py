"""The device mesh: axes `data` (batch), `fsdp` (batch and weights) and `tensor` (widths).

Several slices, joined by a slower network (DCN) than the devices of each (ICI), lie along `data`, outermost: only the sum of the
gradients crosses between them.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, *, dcn_data: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of (dcn_data x data) x fsdp x tensor devices; all there are, or these.

    `dcn_data` is the number of slices, each of data x fsdp x tensor devices; where the devices know no slices, of processes.
    Raises ValueError where the product is not the number of devices, or `dcn_data` not that of slices or processes.
    """
    given = list(jax.devices() if devices is None else devices)
    if min(data, fsdp, tensor, dcn_data) < 1:
        raise ValueError(f"a mesh has at least one device along each axis, not {dcn_data} x {data} x {fsdp} x {tensor}")
    shape, wanted = (data, fsdp, tensor), dcn_data * data * fsdp * tensor
    if wanted != len(given):
        told = f"{dcn_data} slices of {data} x {fsdp} x {tensor}" if dcn_data > 1 else f"{data} x {fsdp} x {tensor}"
        raise ValueError(f"a mesh of {told} needs {wanted} devices; there are {len(given)}")
    types = (AxisType.Auto,) * len(AXES)
    if dcn_data == 1:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=given)
    granule = _granule(given, dcn_data)
    arranged = mesh_utils.create_hybrid_device_mesh(shape, (dcn_data, 1, 1), given, process_is_granule=granule == "process_index")
    return Mesh(np.asarray(arranged), AXES, axis_types=types)


def _granule(devices: Sequence[Any], dcn_data: int) -> str:
    """What the slower network lies between, slices or processes, by the device's attribute."""
    told = []
    for attribute, what in (("slice_index", "slices"), ("process_index", "processes")):
        counts = collections.Counter(getattr(device, attribute, 0) for device in devices)
        if len(counts) == dcn_data and len(set(counts.values())) == 1:
            return attribute
        told.append(f"{len(counts)} {what} of {', '.join(map(str, sorted(set(counts.values()))))} devices")
    raise ValueError(f"mesh.dcn_data is {dcn_data}, but there are {' and '.join(told)}; it must be the number of one of them, all equally large")


def abstract_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, *, dcn_data: int = 1) -> AbstractMesh:
    """The shape of such a mesh without devices, to plan for machines that are not at hand."""
    return AbstractMesh((dcn_data * data, fsdp, tensor), AXES)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A batch is split along its first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of the `rows` rows of a batch this process feeds, [n] in rising order: those of its devices.

    They need not lie side by side: where a mesh follows the wires of a torus, the devices of one host lie apart along an axis.
    Processes that differ only along `tensor` feed the same rows.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    spans = sorted({place[0].indices(rows)[:2] for place in places if place is not None})
    return np.concatenate([np.arange(*span) for span in spans])
