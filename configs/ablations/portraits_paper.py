"""Rendered heads with the paper's own loss: plain noise prediction, no weight on the face, no identity loss."""

import dataclasses

from instantid_jax.training.config import LossConfig, TrainConfig
from instantid_jax.training.recipes import load_recipe


def config() -> TrainConfig:
    return dataclasses.replace(load_recipe("configs/portraits.py"), out="runs/ablations/portraits_paper", loss=LossConfig())
