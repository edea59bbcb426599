"""Rendered heads, second stage: a small recogniser that reads the face embedding in latents, for the identity loss.

It learns to say what the face recogniser says of the same picture. How well it does that decides what the identity loss can
teach (docs/evaluation.md). Sized for one GPU with `--compute.dtype bfloat16`; on CPU ask for less: `--steps 2400 --loader.global-batch 32`.
"""

from instantid_jax.data.loader import LoaderConfig
from instantid_jax.training.config import (
    CheckpointConfig,
    InitConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
    ValidationConfig,
)
from instantid_jax.training.weights import saved_model

VAE = "runs/portraits_vae/weights"


def config() -> TrainConfig:
    return TrainConfig(
        model=saved_model(VAE),
        steps=3000,
        data=("data/portraits_latents",),
        prepare=(f"cache --data data/portraits --resolution 64 --weights {VAE} --out data/portraits_latents",),
        out="runs/portraits_recognizer",
        loader=LoaderConfig(global_batch=256, resolution=64, cached_latents=True, keypoint_style="none", in_memory=True),
        stage=StageConfig(objective="recognize", trainable=(r"^recognizer/",)),
        init=InitConfig(weights=VAE, from_base=(), random=("recognizer",)),
        loss=LossConfig(timesteps="stratified", shift=2),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup=100, hold=0.3, weight_decay=0.05, ema=0.998),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(every=100),
        validation=ValidationConfig(every=500),
    )
