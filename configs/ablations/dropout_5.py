"""IP-Adapter's dropout: 5 % each of text, identity and both. The paper drops nothing."""

import dataclasses

from instantid_jax.training.config import TrainConfig
from instantid_jax.training.recipes import load_recipe


def config() -> TrainConfig:
    base = load_recipe("configs/instantid.py")
    return dataclasses.replace(
        base, out="runs/ablations/dropout_5", loader=dataclasses.replace(base.loader, drop_text=0.05, drop_identity=0.05, drop_both=0.05)
    )
