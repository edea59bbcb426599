"""IdentityNet sees a black picture instead of keypoints: no say in the pose."""

import dataclasses

from instantid_jax.training.config import TrainConfig
from instantid_jax.training.recipes import load_recipe


def config() -> TrainConfig:
    base = load_recipe("configs/instantid.py")
    return dataclasses.replace(base, out="runs/ablations/keypoints_none", loader=dataclasses.replace(base.loader, keypoint_style="none"))
