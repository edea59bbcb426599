"""A progress bar for denoising, on a terminal only, and the seconds that were spent compiling."""

from __future__ import annotations

import sys
from types import TracebackType

import jax
from tqdm import tqdm

_COMPILING = "/jax/core/compile/"


class StepBar:
    """Context manager with an `on_step` for the pipeline: steps done, time left. Silent where stderr is no terminal."""

    def __init__(self, steps: int):
        self._bar = tqdm(total=steps, unit="step", desc="denoising", disable=not sys.stderr.isatty())

    def on_step(self, index: int) -> None:
        """Called with the number of each finished model call."""
        if index == 0:
            self._bar.reset()  # the seconds before the first step were compiling
        self._bar.update()

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
