"""Two linear layers instead of the Perceiver resampler."""

import dataclasses

from instantid_jax.training.config import TrainConfig
from instantid_jax.training.recipes import load_recipe


def config() -> TrainConfig:
    base = load_recipe("configs/instantid.py")
    resampler = dataclasses.replace(base.model.resampler, kind="mlp")
    return dataclasses.replace(base, out="runs/ablations/mlp", model=dataclasses.replace(base.model, resampler=resampler))
