"""IdentityNet sees the record's dense landmarks beside the five points."""

import dataclasses

from instantid_jax.training.config import TrainConfig
from instantid_jax.training.recipes import load_recipe


def config() -> TrainConfig:
    base = load_recipe("configs/instantid.py")
    return dataclasses.replace(base, out="runs/ablations/keypoints_dense", loader=dataclasses.replace(base.loader, keypoint_style="dense"))
