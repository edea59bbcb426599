"""Several processes that run the same program: joining, waiting for each other, agreeing, seeing each other's rows.

With one process every function is trivial and costs nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from instantid_jax.options import OptionError

__all__ = ["agreed", "is_main", "join", "stacked", "synchronize", "to_host"]


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes. On TPU pods, Slurm and Open MPI nothing need be given; elsewhere the address ("host:port") of
    process 0, how many processes there are, and which one this is. Call it before anything else of JAX.
    Raises `OptionError` for a part of these, ValueError where nobody is found.
    """
    if (processes is None) != (process is None) or (processes is not None and coordinator is None):
        raise OptionError("name coordinator, number of processes and this process's number together, or none of them")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as problem:
        if processes is None:
            raise ValueError("no TPU pod or cluster was found around this process; name coordinator, processes and process") from problem
        raise ValueError(f"process {process} of {processes} could not join those at {coordinator} ({problem})") from problem


def is_main() -> bool:
    """Whether this is the process that writes logs and files."""
    return jax.process_index() == 0


def synchronize(name: str) -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(flag: bool) -> bool:
    """Whether any process says so; all must ask together."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def stacked(array: np.ndarray) -> np.ndarray:
    """Every process's array, [processes, ...]; all must ask together."""
    return array[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(array)).reshape(-1, *array.shape)


def to_host(tree: Any) -> Any:
    """A tree of global arrays as NumPy arrays, whole in every process; all must ask together."""
    if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
