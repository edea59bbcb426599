"""The device mesh: axes `data` (batch), `fsdp` (batch and weights) and `tensor` (widths)."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of data x fsdp x tensor devices. Raises ValueError where that is not the number of devices."""
    shape, devices = (data, fsdp, tensor), jax.device_count()
    if math.prod(shape) != devices:
        raise ValueError(f"a mesh of {data} x {fsdp} x {tensor} needs {math.prod(shape)} devices; there are {devices}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
