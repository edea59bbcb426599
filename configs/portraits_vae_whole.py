"""Rendered heads, first stage, second part: the autoencoder goes on with whole pictures, whose norm statistics differ from crops'."""

import dataclasses

from instantid_jax.training.config import InitConfig, TrainConfig
from instantid_jax.training.recipes import load_recipe
from instantid_jax.training.weights import saved_model

START = "runs/portraits_vae/weights"


def config() -> TrainConfig:
    first = load_recipe("configs/portraits_vae.py")
    return dataclasses.replace(
        first,
        model=saved_model(START),
        steps=1000,
        out="runs/portraits_vae_whole",
        loader=dataclasses.replace(first.loader, global_batch=16),
        init=InitConfig(weights=START, from_base=()),
        loss=dataclasses.replace(first.loss, crop=None),
        optimizer=dataclasses.replace(first.optimizer, learning_rate=1e-3, warmup=20, hold=0.3),
    )
