"""Where this process stands among several, by the environment that starts it.

JAX itself knows TPU pods, Slurm, Open MPI and, with its `k8s` extra, Kubernetes' indexed jobs. Read here is what is plainly
said, and what a JobSet of several jobs says (the names are those that xpk's workloads have):

    JAX_COORDINATOR_ADDRESS   host of process 0, with or without a port
    JAX_COORDINATOR_PORT      its port, where the address has none; 1234 by default
    JAX_PROCESS_COUNT         how many processes there are
    JAX_PROCESS_ID            which one this is; else NODE_RANK; else JOB_INDEX x PROCESSES_IN_JOB + JOB_COMPLETION_INDEX
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from instantid_jax.options import OptionError

__all__ = ["PORT", "Place", "place_of"]

PORT = 1234
"""Port of process 0 where nothing says another."""


class Place(NamedTuple):
    """One process among several."""

    coordinator: str
    """ "host:port" of process 0."""
    processes: int
    process: int


def place_of(environment: Mapping[str, str]) -> Place | None:
    """The place that these variables tell; None where they tell none, which leaves it to JAX to find one.

    Raises OptionError for variables that are there in part, or are no numbers in range.
    """
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if not address or "JAX_PROCESS_COUNT" not in environment:
        return None
    processes = _number(environment, "JAX_PROCESS_COUNT", 1)
    process = _process(environment)
    if process >= processes:
        raise OptionError(f"the environment makes this process {process}, but JAX_PROCESS_COUNT is {processes}; processes are counted from 0")
    bare = address.count(":") != 1 and not address.rpartition("]")[2].startswith(":")
    port = _number(environment, "JAX_COORDINATOR_PORT", 1) if "JAX_COORDINATOR_PORT" in environment else PORT
    return Place(f"{address}:{port}" if bare else address, processes, process)


def _process(environment: Mapping[str, str]) -> int:
    for name in ("JAX_PROCESS_ID", "NODE_RANK"):
        if name in environment:
            return _number(environment, name)
    if "JOB_COMPLETION_INDEX" not in environment:
        raise OptionError("JAX_PROCESS_COUNT is set, but nothing says which process this is: set JAX_PROCESS_ID, from 0")
    index = _number(environment, "JOB_COMPLETION_INDEX")
    if "JOB_INDEX" not in environment:
        return index
    if "PROCESSES_IN_JOB" not in environment:
        raise OptionError("JOB_INDEX is set, but not PROCESSES_IN_JOB: how many processes each job of the JobSet has")
    return _number(environment, "JOB_INDEX") * _number(environment, "PROCESSES_IN_JOB", 1) + index


def _number(environment: Mapping[str, str], name: str, low: int = 0) -> int:
    text = environment[name]
    if not text.strip().isdecimal() or int(text) < low:
        raise OptionError(f"the environment variable {name} must be a whole number from {low}, not {text!r}")
    return int(text)
