"""Which axis of which parameter is split over which mesh axis: one ordered table, first match wins.

A rule names an axis of the parameter for the `tensor` mesh axis (Megatron's split: into heads and feed-forward widths on
the way in, over them on the way out). What remains is split over `fsdp` along the largest axis that divides evenly.
Parameters smaller than `SMALL` elements stay whole on every device.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from instantid_jax.paths import first_match

SMALL = 2**16

# Axis of the kernel (counted from the end) that is split over `tensor`.
TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (r"/(to_q|to_k|to_v|to_k_ip|to_v_ip|to_kv)/kernel$", -1),
    (r"/(to_out_0|to_out|out_proj)/kernel$", -2),
    (r"/ff/(net_0/proj|proj_in)/kernel$", -1),
    (r"/ff/(net_2|proj_out)/kernel$", -2),
    (r"/(q_proj|k_proj|v_proj|fc1)/kernel$", -1),
    (r"/fc2/kernel$", -2),
)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How a parameter is split over the mesh's devices; mesh axes of size one are not used."""
    axes: list[str | None] = [None] * len(shape)
    if math.prod(shape) < SMALL:
        return PartitionSpec()
    tensor = first_match(TENSOR_RULES, f"/{path}")
    count = mesh.shape.get("tensor", 1)
    # An optimizer may keep rows and columns of a kernel under the kernel's name: they have fewer axes.
    if tensor is not None and count > 1 and -tensor <= len(shape) and shape[tensor] % count == 0:
        axes[len(shape) + tensor] = "tensor"
    shards = mesh.shape.get("fsdp", 1)
    if shards > 1:
        free = [i for i, n in enumerate(shape) if axes[i] is None and n % shards == 0]
        if free:
            axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A sharding for every array of a tree (arrays or `ShapeDtypeStruct`s); an optimizer's moments lie as their parameters do."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(name, tuple(leaf.shape), mesh))

    return jax.tree_util.tree_map_with_path(one, tree)
