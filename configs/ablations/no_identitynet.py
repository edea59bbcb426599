"""Without IdentityNet: the image adapter alone."""

import dataclasses

from instantid_jax.training.config import TrainConfig
from instantid_jax.training.recipes import load_recipe


def config() -> TrainConfig:
    base = load_recipe("configs/instantid.py")
    return dataclasses.replace(
        base,
        out="runs/ablations/no_identitynet",
        stage=dataclasses.replace(base.stage, identitynet=False, trainable=(r"^adapter/", r"^resampler/")),
        init=dataclasses.replace(base.init, from_base=("adapter",)),
    )
