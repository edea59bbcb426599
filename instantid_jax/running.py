"""What every long command shares: how it is told to stop, the exit status it then has, and a folder to itself."""

from __future__ import annotations

import contextlib
import fcntl
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["EXIT_INTERRUPTED", "EXIT_PARTLY", "LeaseError", "lease", "noted_signals"]

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
