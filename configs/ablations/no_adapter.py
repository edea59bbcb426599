"""Without the image adapter: IdentityNet alone."""

import dataclasses

from instantid_jax.training.config import TrainConfig
from instantid_jax.training.recipes import load_recipe


def config() -> TrainConfig:
    base = load_recipe("configs/instantid.py")
    return dataclasses.replace(
        base,
        out="runs/ablations/no_adapter",
        stage=dataclasses.replace(base.stage, adapter=False, trainable=(r"^identitynet/", r"^resampler/")),
        init=dataclasses.replace(base.init, from_base=("identitynet",)),
    )
