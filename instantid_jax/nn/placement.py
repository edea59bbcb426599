"""Which axis of which parameter is split over which mesh axis (one ordered table, first match wins), and how layers keep to it.

A rule names an axis of the parameter for the `tensor` mesh axis (Megatron's split: into heads and feed-forward widths on
the way in, over them on the way out). What remains is split over `fsdp` along the largest axis that divides evenly.
Parameters smaller than `SMALL` elements stay whole on every device.

The mesh is that of `jax.set_mesh`, or `jax.sharding.use_abstract_mesh` while tracing.
Under FSDP every device keeps a part of a kernel. A layer gathers it in the type of its arithmetic, uses it and forgets it; the
backward pass gathers it again, and cuts its gradient into parts as it is summed. Activations never move: they are split by
rows of the batch throughout. A partitioner left to itself finds neither, and moves several times the bytes. Without a mesh, or
with one of a single device along `fsdp`, all of this is nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from instantid_jax.paths import first_match

__all__ = ["SMALL", "by_rows", "gathered", "gathers", "keep_all_but_gathered", "kernel_spec", "map_rows", "on_each_device", "tensor_axis"]

SMALL = 2**18
"""Elements below which a parameter stays whole on every device: a megabyte in float32."""


# Axis of the kernel (counted from the end) that is split over `tensor`.
TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (r"/(to_q|to_k|to_v|to_k_ip|to_v_ip|to_kv)/kernel$", -1),
    (r"/(to_out_0|to_out|out_proj)/kernel$", -2),
    (r"/ff/(net_0/proj|proj_in)/kernel$", -1),
    (r"/ff/(net_2|proj_out)/kernel$", -2),
    (r"/(q_proj|k_proj|v_proj|fc1)/kernel$", -1),
    (r"/fc2/kernel$", -2),
)


def tensor_axis(path: str) -> int | None:
    """The axis of a parameter, counted from the end, that is split over `tensor`; None for none."""
    return first_match(TENSOR_RULES, f"/{path}")


def kernel_spec(shape: tuple[int, ...], tensor_axis: int | None, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How a parameter is split: `tensor_axis`, counted from the end, over `tensor`; of what remains the largest axis that divides evenly
    over `fsdp`. Mesh axes of size one are not used, and small parameters are not split."""
    axes: list[str | None] = [None] * len(shape)
    if math.prod(shape) < SMALL:
        return PartitionSpec()
    count, shards = mesh.shape.get("tensor", 1), mesh.shape.get("fsdp", 1)
    # An optimizer may keep rows and columns of a kernel under the kernel's name: they have fewer axes.
    if tensor_axis is not None and count > 1 and -tensor_axis <= len(shape) and shape[tensor_axis] % count == 0:
        axes[len(shape) + tensor_axis] = "tensor"
    if shards > 1:
        free = [i for i, n in enumerate(shape) if axes[i] is None and n % shards == 0]
        if free:
            axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


def gathers() -> bool:
    """Whether weights are split over `fsdp` where this is traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape.get("fsdp", 1) > 1 and not mesh.are_all_axes_manual


def gathered(kernel: Array, dtype: Any, tensor_axis: int | None = None) -> Array:
    """A kernel as a layer uses it: cast, gathered over `fsdp`, still split over `tensor`. One of 8-bit integers moves as it is."""
    rounded = jnp.issubdtype(kernel.dtype, jnp.integer)
    kernel = kernel if rounded else kernel.astype(dtype)
    if gathers():
        split = kernel_spec(kernel.shape, tensor_axis, jax.sharding.get_abstract_mesh())
        kernel = _gather(kernel, split) if "fsdp" in split else kernel
    return kernel.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(kernel: Array, split: PartitionSpec) -> Array:
    kernel = jax.lax.with_sharding_constraint(kernel, split)  # cast before it moves
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(*(axis if axis == "tensor" else None for axis in split)))


def _gather_forward(kernel: Array, split: PartitionSpec) -> tuple[Array, None]:
    return _gather(kernel, split), None


def _gather_backward(split: PartitionSpec, _: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gather.defvjp(_gather_forward, _gather_backward)


def by_rows(x: Array) -> Array:
    """`x` [b, ...], and its gradient, split over `data` and `fsdp` along the first axis where that divides evenly."""
    if not _shared(x):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(("data", "fsdp")))


def _shared(x: Array) -> bool:
    """Whether several devices share the rows of `x` [b, ...]: their number divides evenly, and nobody has cut it already."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
    return shards > 1 and x.shape[0] % shards == 0 and not mesh.are_all_axes_manual


def on_each_device(attention: Callable[[Array, Array, Array], Array], q: Array, k: Array, v: Array) -> Array:
    """`attention` of q, k and v, all [b, n, heads, d], by every device of the mesh on its own rows (`data`, `fsdp`) and heads (`tensor`).

    For what a partitioner cannot split, a kernel, or splits badly, a loop over rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1 or mesh.are_all_axes_manual:
        return attention(q, k, v)
    batch, rest = [], q.shape[0]
    for axis in ("data", "fsdp"):
        count = mesh.shape.get(axis, 1)
        if count > 1 and rest % count == 0:
            batch.append(axis)
            rest //= count
    heads = "tensor" if "tensor" in mesh.shape and q.shape[2] % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(tuple(batch), None, heads, None)
    return jax.shard_map(attention, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def map_rows(function: Callable[[Array], Array], x: Array) -> Array:
    """``function(row)`` of every row of `x` [b, ...], stacked: one after the other, by every device of the mesh on its own rows.

    A loop over rows that lie on several devices would have each device go through all of them. Weights that are split are gathered
    before the loop, all at once: for networks that are small beside what they compute.
    """

    def in_turn(rows: Array) -> Array:
        return jax.lax.map(function, rows)

    if not _shared(x):
        return in_turn(x)
    spec = PartitionSpec(("data", "fsdp"))
    return jax.shard_map(in_turn, in_specs=spec, out_specs=spec, check_vma=False)(x)


def keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy of `jax.checkpoint`: the backward pass gathers weights again and computes nothing else again."""
    # A gather is still a call where nobody asks for the kernel's gradient, and two constraints where somebody does.
    return primitive.name not in ("sharding_constraint", "custom_vjp_call")
