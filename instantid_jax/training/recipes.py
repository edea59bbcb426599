"""Recipes: Python files with one function `config() -> TrainConfig`."""

from __future__ import annotations

import dataclasses
import re
import runpy
from pathlib import Path
from typing import Any

from instantid_jax import config as model_settings
from instantid_jax.config import ConfigError
from instantid_jax.published import did_you_mean
from instantid_jax.training import config as settings
from instantid_jax.training.config import TrainConfig

__all__ = ["load_recipe"]


def load_recipe(path: str | None, **arguments: Any) -> TrainConfig:
    """Runs the file and returns what its `config(**arguments)` gives. Raises `ConfigError` that names the recipes there are."""
    if path is None:
        raise ConfigError(f"name a recipe: --config FILE; there are {_known()}")
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"there is no recipe {path}{did_you_mean(path, _recipes())}; there are {_known()}")
    config = runpy.run_path(str(file)).get("config")
    if not callable(config):
        raise ConfigError(f"{path} is no recipe: it defines no function config()")
    try:
        made = config(**arguments)
    except TypeError as problem:
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(problem))
        if unknown is None:
            raise
        owner, field = unknown.groups()
        raise ConfigError(f"{path}: {owner} has no field {field!r}{did_you_mean(field, _fields(owner))}") from problem
    if not isinstance(made, TrainConfig):
        raise ConfigError(f"{path}: config() gives {type(made).__name__}, not TrainConfig")
    return made


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
