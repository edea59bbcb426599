"""Rendered heads, first stage: the autoencoder, 64 pixels to latents of 16 x 16 x 8."""

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


def config() -> TrainConfig:
    return TrainConfig(
        model=portraits(),
        steps=2800,
        data=("data/portraits",),
        prepare=("portraits --out data/portraits --train 6000 --validation 64 --test 16",),
        out="runs/portraits_vae",
        loader=LoaderConfig(global_batch=8, resolution=64, random_crop=False, keypoint_style="none", num_threads=1),
        stage=StageConfig(objective="reconstruct", trainable=(r"^vae/",)),
        init=InitConfig(from_base=(), random=("vae",), latent_logvar=-8.0),
        loss=LossConfig(kl_weight=1e-9),
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup=100, ema=0.998),
        checkpoint=CheckpointConfig(every=250),
        log=LogConfig(every=50),
        validation=ValidationConfig(every=500, samples_every=500),
    )
