"""Recipes: Python files with one function `config() -> TrainConfig`."""

from __future__ import annotations

import runpy
from pathlib import Path

from instantid_jax.config import ConfigError
from instantid_jax.training.config import TrainConfig

__all__ = ["load_recipe"]


def load_recipe(path: str | None) -> TrainConfig:
    """Runs the file and returns what its `config()` gives. Raises `ConfigError` that names the recipes there are."""
    if path is None:
        raise ConfigError(f"name a recipe: --config FILE; there are {_known()}")
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"there is no recipe {path}; there are {_known()}")
    config = runpy.run_path(str(file)).get("config")
    if not callable(config):
        raise ConfigError(f"{path} is no recipe: it defines no function config()")
    made = config()
    if not isinstance(made, TrainConfig):
        raise ConfigError(f"{path}: config() gives {type(made).__name__}, not TrainConfig")
    return made


def _known() -> str:
    found = sorted(str(file) for file in Path("configs").rglob("*.py") if file.name != "__init__.py")
    return ", ".join(found) or "none below configs/"
