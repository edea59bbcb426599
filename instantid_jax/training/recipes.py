"""Recipes: Python files with one function `config() -> TrainConfig`."""

from __future__ import annotations

import dataclasses
import re
import runpy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instantid_jax import config as model_settings
from instantid_jax.config import ConfigError
from instantid_jax.data.record import DataError
from instantid_jax.options import OptionError
from instantid_jax.published import did_you_mean
from instantid_jax.training import config as settings
from instantid_jax.training.config import TrainConfig
from instantid_jax.training.state import InitError

__all__ = ["load_recipe"]


def load_recipe(path: str | None, **arguments: Any) -> TrainConfig:
    """Runs the file and returns what its `config(**arguments)` gives.

    Raises `OptionError` for no file; `ConfigError` that names the recipes there are, or the file, the line and what went wrong there.
    """
    if path is None:
        raise OptionError(f"name a recipe: --config FILE; there are {_known()}")
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"there is no recipe {path}{did_you_mean(path, _recipes())}; there are {_known()}")
    if file.suffix != ".py":
        raise ConfigError(f"{path} is no recipe, which is a Python file; there are {_known()}")
    config = _run(file, lambda: runpy.run_path(str(file))).get("config")
    if not callable(config):
        raise ConfigError(f"{path} is no recipe: it defines no function config()")
    made = _run(file, lambda: config(**arguments))
    if not isinstance(made, TrainConfig):
        raise ConfigError(f"{path}: config() gives {type(made).__name__}, not TrainConfig")
    return made


def _run(file: Path, action: Callable[[], Any]) -> Any:
    """What `action`, which runs code of the recipe, gives. Raises `ConfigError` that names the recipe's line for whatever it raises."""
    try:
        return action()
    except (ConfigError, DataError, InitError):  # sentences already
        raise
    except SyntaxError as problem:  # of the recipe, or of what it imports
        raise ConfigError(f"{problem.filename}, line {problem.lineno}: {problem.msg}") from problem
    except Exception as problem:  # a recipe is a program: anything may go wrong in it
        lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == str(file)]
        where = f"{file}, line {lines[-1]}" if lines else f"{file}"
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(problem))
        if isinstance(problem, TypeError) and unknown is not None:
            owner, field = unknown.groups()
            raise ConfigError(f"{where}: {owner} has no field {field!r}{did_you_mean(field, _fields(owner))}") from problem
        raise ConfigError(f"{where}: {type(problem).__name__}: {problem}") from problem


def _fields(owner: str) -> list[str]:
    """Field names of the settings class of this name, or of all of them."""
    classes = {
        c.__name__: c for module in (settings, model_settings) for c in vars(module).values() if dataclasses.is_dataclass(c) and isinstance(c, type)
    }
    chosen = [classes[owner]] if owner in classes else classes.values()
    return [field.name for c in chosen for field in dataclasses.fields(c)]


def _recipes() -> list[str]:
    return sorted(str(file) for file in Path("configs").rglob("*.py") if file.name != "__init__.py")


def _known() -> str:
    return ", ".join(_recipes()) or "none below configs/"
