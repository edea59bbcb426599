"""Rendered heads, fourth stage: InstantID itself. IdentityNet, adapter and resampler learn against the frozen base.

References are other pictures of the same person, captions mostly say nothing of the person, and a recogniser's embedding of
the reference says the rest. Three things go beyond the paper, for a small budget: `condition_gain` and the learning-rate factors
make the keypoint branch start; faces count more than backgrounds; and the identity loss reads the predicted face. The paper's own
loss is `configs/ablations/portraits_paper.py`.

Sized for one GPU with `--compute.dtype bfloat16`; two CPU cores make about 20 samples a second (`configs/portraits_quick.py`).
"""

from instantid_jax.data.loader import LoaderConfig
from instantid_jax.training.config import CheckpointConfig, InitConfig, LogConfig, LossConfig, OptimizerConfig, TrainConfig, ValidationConfig
from instantid_jax.training.weights import saved_model

BASE = "runs/portraits_base/weights"


def config(base: str = BASE) -> TrainConfig:
    return TrainConfig(
        model=saved_model(base),
        steps=4100,
        data=("data/portraits_latents",),
        out="runs/portraits",
        loader=LoaderConfig(
            global_batch=256,
            in_memory=True,
            resolution=64,
            cached_latents=True,
            paired_reference=0.85,
            identity_caption=0.15,
            drop_text=0.05,
            drop_identity=0.05,
            drop_both=0.03,
        ),
        init=InitConfig(weights=base, condition_gain=2.5),
        loss=LossConfig(timesteps="stratified", face_weight=1.0, identity_weight=1.0, identity_power=1.0),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            schedule="cosine",
            warmup=100,
            hold=0.3,
            ema=0.998,
            multipliers=((r"^(resampler|identitynet/controlnet_)", 2.0), (r"^identitynet/", 0.7)),
        ),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(every=100),
        validation=ValidationConfig(every=500, samples_every=1000, samples=12),
    )
