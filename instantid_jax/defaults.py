"""What runs with no weights at hand: the real architecture, small and randomly initialised, and a real photo.

The default model proves that everything works on a machine, from photo to PNG. It has learned nothing.
"""

from __future__ import annotations

import tempfile
from importlib import resources
from pathlib import Path

import jax

from instantid_jax.config import tiny
from instantid_jax.models import build_networks
from instantid_jax.pipeline import InstantIDPipeline
from instantid_jax.text import Tokenizer, write_default_tokenizers

NOTICE = (
    "no --weights given: this is a small model with RANDOM weights, which draws noise; it shows that the installation works. "
    "For real pictures convert the published weights: python -m convert_weights import --base SDXL --instantid INSTANTID --out weights"
)


def default_pipeline(seed: int = 0) -> InstantIDPipeline:
    """The small, randomly initialised model."""
    config = tiny()
    keys = jax.random.split(jax.random.key(seed), 7)
    parameters = {name: network.init(key) for key, (name, network) in zip(keys, build_networks(config).items(), strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        write_default_tokenizers(Path(folder))
        tokenizers = Tokenizer.from_directory(Path(folder) / "tokenizer"), Tokenizer.from_directory(Path(folder) / "tokenizer_2")
    return InstantIDPipeline(config, parameters, tokenizers)


def default_photo() -> Path:
    """A public-domain portrait (NASA, Eileen Collins)."""
    return Path(str(resources.files("instantid_jax") / "assets" / "astronaut.jpg"))
