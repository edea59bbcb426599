"""What runs with no weights at hand: the real architecture, small and randomly initialised, and a real photo.

The default model proves that everything works on a machine, from photo to PNG. It has learned nothing.
"""

from __future__ import annotations

import math
import tempfile
import zlib
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from instantid_jax.config import ComputeConfig, ModelConfig, tiny
from instantid_jax.models import Network, build_networks
from instantid_jax.paths import Tree, map_paths, stacked_layer
from instantid_jax.pipeline import InstantIDPipeline
from instantid_jax.text import Tokenizer, write_default_tokenizers

NOTICE = (
    "no --weights given: this is a small model with RANDOM weights, which draws noise; it shows that the installation works. "
    "For real pictures convert the published weights: python -m convert_weights import --base SDXL --instantid INSTANTID --out weights"
)


def random_parameters(network: Network, seed: int) -> Tree:
    """Weights that keep signals at their size: every tensor a function of its path and the seed alone.

    Unlike `Network.init`, which starts a training, it leaves no convolution at zero, so that every part takes part.
    """

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path.rsplit("/", 1)[-1]
        if name in ("scale", "bias"):
            return jnp.full(leaf.shape, 1.0 if name == "scale" else 0.0)
        x = np.random.default_rng([seed, zlib.crc32(path.encode())]).standard_normal(leaf.shape, np.float32)
        layers = 1 if stacked_layer(path) else 0
        fan_in = 1 if name in ("embedding", "latents") else math.prod(leaf.shape[layers:-1])
        return jnp.asarray(x * fan_in**-0.5)

    return map_paths(draw, network.abstract)


def default_config() -> ModelConfig:
    """The configuration of `default_pipeline`'s model."""
    return tiny()


def default_pipeline(seed: int = 0, dtype: str = "float32") -> InstantIDPipeline:
    """The small, randomly initialised model; `dtype` is that of weights and arithmetic."""
    config, compute = default_config(), ComputeConfig(dtype=dtype)
    random = {name: random_parameters(network, seed) for name, network in build_networks(config, compute).items()}
    parameters = jax.tree.map(lambda x: x.astype(dtype), random)
    with tempfile.TemporaryDirectory() as folder:
        write_default_tokenizers(Path(folder))
        tokenizers = Tokenizer.from_directory(Path(folder) / "tokenizer"), Tokenizer.from_directory(Path(folder) / "tokenizer_2")
    return InstantIDPipeline(config, parameters, tokenizers, compute=compute)


def default_photo() -> Path:
    """A public-domain portrait (NASA, Eileen Collins)."""
    return Path(str(resources.files("instantid_jax") / "assets" / "astronaut.jpg"))
