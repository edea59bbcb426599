"""The networks that a stage runs, with the arithmetic of the run."""

from __future__ import annotations

from instantid_jax.config import ComputeConfig
from instantid_jax.models import Network, build_networks
from instantid_jax.training.config import TrainConfig

__all__ = ["training_networks"]


def training_networks(config: TrainConfig) -> dict[str, Network]:
    """Networks by name. SDXL's autoencoder overflows in float16 and loses detail in bfloat16: it stays in float32."""
    compute = config.compute
    networks = build_networks(config.model, compute, ComputeConfig(dtype="float32", attention=compute.attention))
    return {name: networks[name] for name in config.stage.networks}
