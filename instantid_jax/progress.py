"""A progress bar for a run, on a terminal only, and the seconds that were spent compiling."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

import jax
from tqdm import tqdm

__all__ = ["CompileSeconds", "StepBar"]

_COMPILING = "/jax/core/compile/"
_WIDEST = 100
_ROWS = 24  # of a terminal that does not tell; the bar takes one


class StepBar:
    """Context manager with an `on_step` for the pipeline: what is being done, steps done, time left.

    It says "compiling" before the first step and "decoding" after the last. Silent where `file` (stderr) is no terminal; a
    terminal that does not tell its width counts as 80 columns wide.
    """

    def __init__(self, steps: int, file: TextIO | None = None):
        stream: TextIO = sys.stderr if file is None else file
        width = min(shutil.get_terminal_size().columns, _WIDEST)
        self._bar = tqdm(
            total=steps, unit="step", desc="compiling", ncols=width, nrows=_ROWS, mininterval=0, file=stream, disable=not stream.isatty()
        )

    @property
    def listener(self) -> Callable[[int], None] | None:
        """`on_step`, or None where nothing is drawn: the pipeline then runs all steps as one program."""
        return None if self._bar.disable else self.on_step

    def on_step(self, index: int) -> None:
        """Called with the number of each finished model call."""
        if self._bar.n == 0:
            self._bar.reset()  # the seconds before the first step were compiling
            self._bar.set_description("denoising", refresh=False)
        self._bar.update()
        if self._bar.n == self._bar.total:
            self._bar.set_description("decoding")

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._bar.set_description("done", refresh=False)
        self._bar.close()


class CompileSeconds:
    """Context manager that adds up, in `total`, what JAX reports of tracing, lowering and compiling."""

    def __init__(self) -> None:
        self.total = 0.0

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith(_COMPILING):
            self.total += duration_secs

    def __enter__(self) -> CompileSeconds:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
