"""One console line and one JSONL record every N steps, from process 0; TensorBoard on request."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
from PIL import Image

__all__ = ["Log"]


class Log:
    """Writes to `folder`/log.jsonl (appending, so a resumed run continues it) and to the console."""

    def __init__(self, folder: Path, *, tensorboard: bool = False, stream: TextIO | None = None):
        self.active = jax.process_index() == 0
        self.folder, self._stream = folder, stream or sys.stdout
        self._file: TextIO | None = None
        self._board: Any = None
        if not self.active:
            return
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as problem:
                raise ValueError("log.tensorboard needs tensorboardX: pip install 'instantid_jax[train]'") from problem
            self._board = SummaryWriter(str(folder / "tensorboard"))
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "log.jsonl").open("a", encoding="utf-8")

    def say(self, text: str) -> None:
        """A line for people."""
        if self.active:
            print(text, file=self._stream, flush=True)

    def record(self, kind: str, step: int, values: dict[str, Any], *, quiet: bool = False) -> None:
        """One event: a JSONL line, numbers to TensorBoard, and (unless `quiet`) a console line of the main ones."""
        if not self.active or not values:
            return
        assert self._file is not None
        clean = {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **clean}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _numbers(clean):
                self._board.add_scalar(f"{kind}/{name}", value, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in clean.items() if isinstance(value, int | float))
        if not quiet:
            self.say(f"{kind} {step}: {shown}")

    def picture(self, step: int, image: Image.Image) -> Path:
        """Saves a grid of samples."""
        path = self.folder / "samples" / f"{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        return path

    def close(self) -> None:
        """Flushes and closes."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number with its name; those of a list as name/0, name/1 and so on."""
    for name, value in values.items():
        parts = {f"{name}/{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
        yield from ((key, item) for key, item in parts.items() if isinstance(item, int | float))


def _finite(value: Any) -> Any:
    """JSON has no infinities."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
