"""IdentityNet attends to the text, as a plain ControlNet does, instead of the identity tokens."""

import dataclasses

from instantid_jax.training.config import TrainConfig
from instantid_jax.training.recipes import load_recipe


def config() -> TrainConfig:
    base = load_recipe("configs/instantid.py")
    return dataclasses.replace(base, out="runs/ablations/text_in_identitynet", stage=dataclasses.replace(base.stage, identitynet_context="text"))
