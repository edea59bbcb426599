"""Places of whole trees on a mesh, by the table in `nn.placement`: what every parameter of a path and a shape is split over."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from instantid_jax.nn.placement import kernel_spec, tensor_axis


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How a parameter is split over the mesh's devices; mesh axes of size one are not used."""
    return kernel_spec(shape, tensor_axis(path), mesh)


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A sharding for every array of a tree (arrays or `ShapeDtypeStruct`s); an optimizer's moments lie as their parameters do."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(name, tuple(leaf.shape), mesh))

    return jax.tree_util.tree_map_with_path(one, tree)
