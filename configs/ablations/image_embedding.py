"""A CLIP-style picture embedding (768 numbers) instead of a face recogniser's; the data set must be prepared with it."""

import dataclasses

from instantid_jax.training.config import TrainConfig
from instantid_jax.training.recipes import load_recipe


def config() -> TrainConfig:
    base = load_recipe("configs/instantid.py")
    resampler = dataclasses.replace(base.model.resampler, embedding_dim=768)
    return dataclasses.replace(
        base, out="runs/ablations/image_embedding", model=dataclasses.replace(base.model, resampler=resampler, face_analyzer="image_encoder")
    )
