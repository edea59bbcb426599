"""What every long command shares: how it is told to stop, the exit status it then has, a folder to itself, compiled programs kept."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

__all__ = ["EXIT_INTERRUPTED", "EXIT_PARTLY", "LeaseError", "keep_compiled", "lease", "noted_signals"]

EXIT_PARTLY = 3
"""Exit status of a batch that ended, but in which some could not be made."""

EXIT_INTERRUPTED = 75
"""Exit status after SIGTERM or SIGINT: what was done is saved, the same command goes on (EX_TEMPFAIL of sysexits.h)."""


class LeaseError(ValueError):
    """A folder that another process works in."""


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within it, SIGTERM and SIGINT are noted in the list instead of ending the process; a second SIGINT ends it at once.

    Outside the main thread, where Python knows no signals, nothing is noted.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, _: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT in noted:
            raise KeyboardInterrupt
        noted.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def lease(folder: Path, doing: str = "training") -> Iterator[None]:
    """Within it, no other process that takes a lease works in `folder`. It ends with the process.

    `doing` is what the message says of the other one. Raises `LeaseError` where another one holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise LeaseError(f"another process is {doing} in {folder}; wait for it, or give this run another --out") from problem
        yield


def keep_compiled() -> Path | None:
    """From here on compiled programs are kept on disk, and the next process that needs one reads it; returns where, None for nowhere.

    The folder is `$XDG_CACHE_HOME/instantid_jax` (`~/.cache/instantid_jax`). JAX's own variables count first:
    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps nothing, and
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS leaves out what compiles faster: nothing by default, since a picture has two dozen small programs.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if named := jax.config.values["jax_compilation_cache_dir"]:
        return Path(named)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "instantid_jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        print(f"compiled programs are not kept: {folder}: {problem.strerror}; JAX_COMPILATION_CACHE_DIR names another folder", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
