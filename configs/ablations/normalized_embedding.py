"""The embedding's length carries nothing: it is normalised before the resampler."""

import dataclasses

from instantid_jax.training.config import TrainConfig
from instantid_jax.training.recipes import load_recipe


def config() -> TrainConfig:
    base = load_recipe("configs/instantid.py")
    resampler = dataclasses.replace(base.model.resampler, normalize=True)
    return dataclasses.replace(base, out="runs/ablations/normalized_embedding", model=dataclasses.replace(base.model, resampler=resampler))
