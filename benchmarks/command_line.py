"""What the command lines of the benchmarks share: numbers that can be, files that can be written, packages that are there."""

import argparse
import importlib.util
import json
import math
from pathlib import Path
from typing import Any


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text!r}")
    return int(text)


def amount(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return number


def new_file(text: str) -> Path:
    """A file that can be written: what goes into it takes long to make."""
    file = Path(text)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot be written: {text!r} is a folder, or lies in none")
    return file


def needs(parser: argparse.ArgumentParser, *packages: str) -> None:
    """Ends with one sentence where a package is missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        parser.error(f'{", ".join(missing)} is not installed; this benchmark needs: pip install -e ".[dev]"')


def read(parser: argparse.ArgumentParser, file: Path | None) -> dict[str, Any]:
    """The figures that a file holds, none where there is no file; ends with one sentence where it holds something else."""
    if file is None or not file.is_file():
        return {}
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        figures = None
    if not isinstance(figures, dict):
        parser.error(f"{file} holds no figures; name another file")
    return figures


def put(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    from instantid_jax.ledger import replace_text  # here, as benchmarks name the project's folder after their imports

    replace_text(file, text)
