"""Rendered heads, third stage: the text-to-image base and its two text towers, on the first stage's latents.

Sized for one GPU with `--compute.dtype bfloat16`; on CPU ask for less: `--steps 4200 --loader.global-batch 32`.
"""

import dataclasses

from instantid_jax.config import portraits
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

START = "runs/portraits_recognizer/weights"


def config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(portraits(), vae=saved_model(START).vae),
        steps=1700,
        data=("data/portraits_latents",),
        out="runs/portraits_base",
        loader=LoaderConfig(
            global_batch=256, resolution=64, cached_latents=True, in_memory=True, keypoint_style="none", identity_caption=0.75, drop_text=0.1
        ),
        stage=StageConfig(identitynet=False, adapter=False, trainable=(r"^unet/", r"^text_encoder/", r"^text_encoder_2/")),
        init=InitConfig(weights=START, from_base=(), random=("unet", "text_encoder", "text_encoder_2")),
        loss=LossConfig(timesteps="stratified"),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup=100, hold=0.5, ema=0.998),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(every=100),
        validation=ValidationConfig(every=500, samples_every=1000),
    )
