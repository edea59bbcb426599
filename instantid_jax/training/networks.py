"""The networks that a run needs, with its arithmetic."""

from __future__ import annotations

import dataclasses

from instantid_jax.config import ComputeConfig
from instantid_jax.models import Network, build_networks
from instantid_jax.models.recognizer import Recognizer
from instantid_jax.training.config import TrainConfig

__all__ = ["training_networks"]


def training_networks(config: TrainConfig) -> dict[str, Network]:
    """Networks by name. SDXL's autoencoder overflows in float16 and loses detail in bfloat16: it stays in float32."""
    compute, model = config.compute, config.model
    networks = build_networks(model, compute, ComputeConfig(dtype="float32", attention=compute.attention))
    shape = dataclasses.replace(
        config.recognizer,
        latent_channels=config.recognizer.latent_channels or model.vae.latent_channels,
        embedding_dim=config.recognizer.embedding_dim or model.resampler.embedding_dim,
    )
    networks["recognizer"] = Network(Recognizer, shape, compute)
    return {name: networks[name] for name in config.networks}
