"""The UNet's cross-attention queries learn too."""

import dataclasses

from instantid_jax.training.config import TrainConfig
from instantid_jax.training.recipes import load_recipe


def config() -> TrainConfig:
    base = load_recipe("configs/instantid.py")
    return dataclasses.replace(
        base, out="runs/ablations/train_queries", stage=dataclasses.replace(base.stage, trainable=(*base.stage.trainable, r"^unet/.*/attn2/to_q/"))
    )
