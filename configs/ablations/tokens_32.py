"""Thirty-two identity tokens instead of sixteen."""

import dataclasses

from instantid_jax.training.config import TrainConfig
from instantid_jax.training.recipes import load_recipe


def config() -> TrainConfig:
    base = load_recipe("configs/instantid.py")
    resampler = dataclasses.replace(base.model.resampler, num_queries=32)
    return dataclasses.replace(base, out="runs/ablations/tokens_32", model=dataclasses.replace(base.model, resampler=resampler))
