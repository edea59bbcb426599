"""What all command lines here share: how a wrong option is told, and the exit status of it."""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from instantid_jax.published import nearest

__all__ = ["OptionError", "Range", "check_command", "check_folder", "check_options", "status_of", "while_read", "wrong_options"]


class OptionError(ValueError):
    """An option that is missing, has a value that it cannot have, or does not go with another one."""


def status_of(error: BaseException) -> int:
    """The exit status: 2 for a wrong option, as the parser gives, 1 for everything else that fails."""
    return 2 if isinstance(error, OptionError) else 1


def while_read(main: Callable[..., int]) -> Callable[..., int]:
    """A command line whose output somebody may stop reading, as `head` does: it then ends with status 1 and without a word."""

    @functools.wraps(main)
    def guarded(*arguments: Any) -> int:
        try:
            status = main(*arguments)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1

    return guarded


@contextlib.contextmanager
def wrong_options() -> Iterator[None]:
    """Within it, where nothing but options is looked at, a ValueError is an `OptionError`."""
    try:
        yield
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(str(error)) from error


class Range(NamedTuple):
    """Numbers that a value may have; `above` and `below` leave out the end itself."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def problem(self, value: float) -> str | None:
        """None for a value inside, else "must be at least 1, got 0". NaN is never inside."""
        if not isinstance(value, numbers.Real):
            return f"must be a number, got {value!r}"
        if (self.low < value if self.above else self.low <= value) and (value < self.high if self.below else value <= self.high):
            return None
        if not self.above and not self.below and math.isfinite(self.low) and math.isfinite(self.high):
            return f"must be between {self.low:g} and {self.high:g}, got {value}"
        ends = [f"{'above' if self.above else 'at least'} {self.low:g}"] if self.low > -math.inf else []
        if self.high < math.inf:
            ends.append(f"{'below' if self.below else 'at most'} {self.high:g}")
        elif self.below:
            ends.append("finite")
        return f"must be {' and '.join(ends)}, got {value}"


def check_options(options: Any, ranges: Mapping[str, Range]) -> None:
    """Raises `OptionError` for the first field of `options` that is given and out of its range, by its name as an option."""
    for name, allowed in ranges.items():
        value = getattr(options, name)
        if value is not None and (problem := allowed.problem(value)):
            raise OptionError(f"--{name.replace('_', '-')} {problem}")


def check_folder(out: Path) -> None:
    """Raises ValueError where no folder `out` can be made or written to; leaves nothing behind."""
    place = out.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"--out {out}: {'it' if place == out.absolute() else place} is a file; name a folder")
    try:
        with tempfile.TemporaryDirectory(dir=place):
            pass
    except OSError as problem:
        raise ValueError(f"--out {out}: {place} cannot be written to ({problem.strerror}); name another folder") from problem


def check_command(program: str, arguments: Iterable[str] | None, known: Iterable[str]) -> None:
    """Ends the program with status 2 where the first argument is nearly one of the commands, naming that one."""
    first = next(iter(sys.argv[1:] if arguments is None else arguments), "")
    known = list(known)
    if first not in known and not first.startswith("-") and (meant := nearest(first, known)):
        print(f"{program}: there is no command {first!r}; did you mean {meant!r}?", file=sys.stderr)
        raise SystemExit(2)
