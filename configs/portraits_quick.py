"""Watch identity being learned, within half an hour on two CPU cores.

InstantID's fourth stage (`configs/portraits.py`) from its beginning, against the base that comes along: validation tells every 100
steps by how much the plain loss grows with somebody else's keypoints (wrong_pose_gap) and with somebody else's face (wrong_person_gap).

    python train.py --config configs/portraits_quick.py && python -m instantid_jax.training.curves runs/portraits_quick
"""

import dataclasses

from instantid_jax.training.config import LogConfig, TrainConfig, ValidationConfig
from instantid_jax.training.recipes import load_recipe

BASE = "instantid_jax/assets/portraits/model"


def config() -> TrainConfig:
    full = load_recipe("configs/portraits.py", base=BASE)
    return dataclasses.replace(
        full,
        steps=1000,
        loader=dataclasses.replace(full.loader, global_batch=16),
        loss=dataclasses.replace(full.loss, identity_weight=0.8),
        optimizer=dataclasses.replace(full.optimizer, hold=0.5),
        data=("data/portraits_quick_latents",),
        prepare=(
            "portraits --out data/portraits_quick --train 800 --validation 64 --test 0",
            f"cache --data data/portraits_quick --resolution 64 --weights {BASE} --out data/portraits_quick_latents",
        ),
        out="runs/portraits_quick",
        log=LogConfig(every=50),
        validation=ValidationConfig(every=100, samples_every=500, samples=8),
    )
