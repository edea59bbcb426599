"""Where this process stands among several, by the environment that starts it.

JAX itself knows TPU pods, Slurm, Open MPI and, with its `k8s` extra, Kubernetes' indexed jobs. Read here is what is plainly
said, and what a JobSet of several jobs says (the names are those that xpk's workloads have):

    JAX_COORDINATOR_ADDRESS   host of process 0, with or without a port
    JAX_COORDINATOR_PORT      its port, where the address has none; 1234 by default
    JAX_PROCESS_COUNT         how many processes there are
    JAX_PROCESS_ID            which one this is; else NODE_RANK; else JOB_INDEX x PROCESSES_IN_JOB + JOB_COMPLETION_INDEX
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from instantid_jax.options import OptionError

__all__ = ["PORT", "Place", "check_joining", "place_of", "with_port"]

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
    if "JAX_PROCESS_COUNT" not in environment:
        return None
    if not address:
        raise OptionError("JAX_PROCESS_COUNT is set, but not JAX_COORDINATOR_ADDRESS: the host of process 0, for each of them")
    processes = _number(environment, "JAX_PROCESS_COUNT", 1)
    process = _process(environment)
    if process >= processes:
        raise OptionError(f"the environment makes this process {process}, but JAX_PROCESS_COUNT is {processes}; processes are counted from 0")
    port = _number(environment, "JAX_COORDINATOR_PORT", 1) if "JAX_COORDINATOR_PORT" in environment else PORT
    return Place(with_port(address, port), processes, process)


def with_port(address: str, port: int = PORT) -> str:
    """ "host:port" of a host's name or number, with a port of its own or this one; a number of IPv6 comes in brackets. Raises OptionError."""
    if address.count(":") > 1 and "[" not in address:
        address = f"[{address}]"
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:\[\]]+)(?::(\d+))?", address)
    if found is None or not 0 < int(found[2] or port) < 2**16:
        raise OptionError(f"{address!r} is no address of process 0; write its host and, after a colon, a port from 1 to 65535, as host0:{PORT}")
    return f"{found[1]}:{found[2] or port}"


def check_joining(distributed: bool, *place: str | int | None) -> None:
    """Raises OptionError for --coordinator, --processes or --process where the processes are not asked to join."""
    if not distributed and place != (None,) * len(place):
        raise OptionError("--coordinator, --processes and --process go with --distributed")


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
