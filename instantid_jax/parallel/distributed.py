"""Several processes that run the same program: joining, waiting for each other, agreeing, seeing each other's rows.

With one process every function is trivial and costs nothing.
"""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from instantid_jax.options import OptionError
from instantid_jax.parallel.environment import Place, place_of, with_port

__all__ = ["MissingProcess", "agreed", "flag_raised", "is_main", "join", "leave", "put_whole", "raise_flag", "stacked", "synchronize", "to_host"]

START = 300.0
"""Seconds that processes wait for each other at the start."""

BARRIER = 1800.0
"""Seconds that they wait for each other later on, where nothing says otherwise."""

_GRACE = 30.0  # JAX's own time-out kills without a word, so ours comes first.
_LEAVING = 5.0  # seconds that process 0 lets others leave before it
_rounds: collections.Counter[str] = collections.Counter()


class MissingProcess(TimeoutError):
    """A process did not come to where the others wait; the message names it."""


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, timeout: float = START) -> None:
    """Joins the other processes; call it before anything else of JAX.

    Given are the address ("host:port", or a host for port 1234) of process 0, how many processes there are and which one this is,
    or nothing: then the environment says so (`environment`), or JAX finds it on TPU pods, Slurm and Open MPI.

    Raises `OptionError` for a part of these, for what is no address, and where this process is not one of them. Where the others do
    not come within `timeout` seconds the process ends with exit status 1 and one sentence: JAX waits in native code that nothing else can end.
    """
    given = (coordinator, processes, process)
    if None in given and given != (None, None, None):
        raise OptionError("name coordinator, number of processes and this process's number together, or none of them")
    place = place_of(os.environ) if coordinator is None or processes is None or process is None else Place(with_port(coordinator), processes, process)
    if place is not None and not 0 <= place.process < place.processes:
        raise OptionError(f"there is no process {place.process} of {place.processes}; they are counted from 0")
    timer = threading.Timer(timeout, _nobody_came, [place, timeout])
    timer.daemon = True
    timer.start()
    # All are needed to know the place, so with one JAX need not look for another.
    method = None if place is None else "deactivate"
    try:
        jax.distributed.initialize(*(place or given), cluster_detection_method=method, initialization_timeout=int(timeout + _GRACE))
    except (ValueError, RuntimeError) as problem:
        where = "" if place is None else f" at {place.coordinator}"
        hint = "give --coordinator, --processes and --process, or set JAX_COORDINATOR_ADDRESS, JAX_PROCESS_COUNT and JAX_PROCESS_ID"
        raise ValueError(f"the processes could not join{where} ({str(problem).strip().splitlines()[0]}); {hint}") from problem
    finally:
        timer.cancel()


def _nobody_came(place: Place | None, timeout: float) -> None:
    """Says who was waited for in vain, and ends the process."""
    if place is None:
        what = "the other processes did not come"
    elif place.process == 0:
        what = f"of {place.processes} processes not all came to {place.coordinator}"
    elif _answers(place.coordinator):
        what = f"process 0 answers at {place.coordinator}, but not all of {place.processes} processes came"
    else:
        what = f"process 0 is missing: nobody answers at {place.coordinator}"
    print(f"process {place.process if place else '?'}: {what} within {timeout:g} s; look for their first error", file=sys.stderr, flush=True)
    os._exit(1)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return True
    except OSError:
        return False


def leave(status: int) -> int:
    """Ends one of several joined processes with an exit status that is not 0; does nothing for one process alone, or for 0.

    JAX would wait at the exit for processes that may be gone, then abort. Process 0, with which the others lose their
    coordinator, lets those who leave too go first. Whoever stays notices at the next barrier, or as JAX misses the heartbeat.
    """
    if status and jax.distributed.is_initialized():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client, own = _client(), jax.process_index()
            client.key_value_set(f"instantid_jax/left/{own}", str(own), allow_overwrite=True)
            end = time.monotonic() + _LEAVING
            while own == 0 and time.monotonic() < end and len(client.key_value_dir_get("instantid_jax/left")) < jax.process_count():
                time.sleep(0.1)
            if own == 0:
                time.sleep(0.2)  # they have said so just before they end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _client() -> Any:
    """JAX's client of the service through which processes meet."""
    from orbax.checkpoint import multihost  # has the one known way to it

    return multihost.get_jax_distributed_client()


def is_main() -> bool:
    """Whether this is the process that writes logs and files."""
    return jax.process_index() == 0


def synchronize(name: str, timeout: float = BARRIER) -> None:
    """Returns when all processes are here. Raises `MissingProcess` where one is not within `timeout` seconds; the message names it."""
    count = jax.process_count()
    if count == 1:
        return
    client, own = _client(), jax.process_index()
    _rounds[name] += 1
    place = f"instantid_jax/{name}/{_rounds[name]}"
    client.key_value_set(f"{place}/{own}", str(own))
    end = time.monotonic() + timeout
    try:
        while timeout > BARRIER and len(client.key_value_dir_get(place)) < count and time.monotonic() < end:
            time.sleep(1.0)  # JAX waits in native code, which hears no signal: not for days
        client.wait_at_barrier(place, round(max(end - time.monotonic(), 1.0) * 1000))
    except jax.errors.JaxRuntimeError as problem:
        raise MissingProcess(f"barrier {name!r}: {_who(client, place, count, own, timeout)}") from problem
    client.key_value_delete(f"{place}/{own}")


def _who(client: Any, place: str, count: int, own: int, timeout: float) -> str:
    """Who is missing at a barrier that failed."""
    try:
        there = {int(value) for _, value in client.key_value_dir_get(place)}
    except jax.errors.JaxRuntimeError:
        return "process 0 is gone, which keeps the list of those who are there"
    if missing := sorted(set(range(count)) - there):
        these = ", ".join(map(str, missing))
        return f"process{'es' if len(missing) > 1 else ''} {these} of {count} did not come within {timeout:g} s; look for their first error"
    return f"process {own} of {count} came when others had given up after {timeout:g} s, or one of them came in that moment"


def agreed(flag: bool) -> bool:
    """Whether any process says so; all must ask together."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def raise_flag(name: str) -> None:
    """Tells the others something that they see when they look (`flag_raised`); nobody waits for anybody."""
    if jax.process_count() > 1:
        _client().key_value_set(f"instantid_jax/flags/{name}/{jax.process_index()}", "raised", allow_overwrite=True)


def flag_raised(name: str) -> bool:
    """Whether any of several processes has raised this flag."""
    return jax.process_count() > 1 and bool(_client().key_value_dir_get(f"instantid_jax/flags/{name}"))


def stacked(array: np.ndarray) -> np.ndarray:
    """Every process's array, [processes, ...]; all must ask together."""
    return array[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(array)).reshape(-1, *array.shape)


def put_whole(array: Any, place: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has whole, as a global one in this place; unlike `jax.device_put` it compares nothing between processes."""
    if place.is_fully_addressable:
        return jax.device_put(array, place)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, place, lambda part: host[part])


def to_host(tree: Any) -> Any:
    """A tree of global arrays as NumPy arrays, whole in every process; all must ask together."""
    if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
