"""The model that draws where no weights are named: InstantID's real architecture, small, trained on rendered heads and shipped.

`assets/portraits/MODEL_CARD.md` says what it is and is not. `random_pipeline` is the same machinery without anything learned.
"""

from __future__ import annotations

import json
import math
import tempfile
import zlib
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from instantid_jax.config import ComputeConfig, ModelConfig, tiny
from instantid_jax.models import Network, build_networks
from instantid_jax.paths import Tree, map_paths, stacked_layer
from instantid_jax.pipeline import InstantIDPipeline, read_config
from instantid_jax.text import Tokenizer, write_default_tokenizers

__all__ = ["NOTICE", "PROMPTS", "Person", "default_config", "default_pipeline", "framed", "people", "random_pipeline"]

NOTICE = (
    "no --weights given: drawing with the small model that comes along, which was trained on rendered heads and knows nothing else. "
    "For real pictures convert the published weights: python -m convert_weights import --base SDXL --instantid INSTANTID --out weights"
)
PROMPTS = {
    "photo": "photo of a person with short brown hair, smiling, blue background",
    "photo, long red hair": "photo of a person with long red hair, neutral expression, white background",
    "pencil sketch": "pencil sketch of a person with medium black hair, neutral expression",
    "watercolor": "watercolor painting of a person with short gray hair, smiling, green background",
    "film noir": "film noir photo of a person with short black hair, neutral expression",
    "pixel art": "pixel art of a person with long blond hair, smiling, purple background",
}
"""What is drawn of every person, by its label on the sheet. The model knows words of this kind."""

ASSETS = Path(str(resources.files("instantid_jax") / "assets" / "portraits"))
DEFAULT_WEIGHTS = ASSETS / "model"
EYES, EYE_DISTANCE, _EYES_TO_MOUTH = (0.5, 0.5), 0.228, 0.248  # of the rendered heads, in picture sides


class Person(NamedTuple):
    """Somebody rendered whom the model never saw."""

    name: str
    photo: Path
    """128 x 128 pixels."""
    pose: np.ndarray
    """[5, 2] keypoints of another picture of the person, in picture sides."""


def default_config() -> ModelConfig:
    """The configuration of `default_pipeline`'s model."""
    return read_config(DEFAULT_WEIGHTS)


def default_pipeline(dtype: str = "float32", **options: Any) -> InstantIDPipeline:
    """The shipped model; `dtype` is that of weights and arithmetic, `options` are others of `from_pretrained`."""
    return InstantIDPipeline.from_pretrained(DEFAULT_WEIGHTS, dtype=dtype, **options)


def people() -> list[Person]:
    """The rendered people who are shipped as references."""
    folder = ASSETS / "people"
    listed = json.loads((folder / "people.json").read_text(encoding="utf-8"))
    return [Person(name, folder / f"{name}.png", np.asarray(about["pose"], np.float32)) for name, about in listed.items()]


def framed(keypoints: np.ndarray, points: np.ndarray | None = None) -> np.ndarray:
    """Keypoints [5, 2] of any photo moved and scaled to where the small model's heads have theirs: [5, 2] in picture sides.

    The pose of the head is kept. Of a turned head the eyes are closer together and of a nodding one the mouth nearer to them, so
    the larger of the two distances counts. With `points` [n, 2], these are moved as the keypoints would be.
    """
    keypoints = np.asarray(keypoints, np.float32)
    eyes, mouth = keypoints[:2].mean(0), keypoints[3:].mean(0)
    size = max(np.linalg.norm(keypoints[1] - keypoints[0]) / EYE_DISTANCE, np.linalg.norm(mouth - eyes) / _EYES_TO_MOUTH)
    return (np.asarray(keypoints if points is None else points, np.float32) - eyes) / np.float32(size) + np.asarray(EYES, np.float32)


def random_pipeline(seed: int = 0, dtype: str = "float32") -> InstantIDPipeline:
    """A model of the real architecture with random weights: for trying out code, in seconds."""
    config, compute = tiny(), ComputeConfig(dtype=dtype)
    random = {name: _random_parameters(network, seed) for name, network in build_networks(config, compute).items()}
    parameters = jax.tree.map(lambda x: x.astype(dtype), random)
    with tempfile.TemporaryDirectory() as folder:
        write_default_tokenizers(Path(folder))
        tokenizers = Tokenizer.from_directory(Path(folder) / "tokenizer"), Tokenizer.from_directory(Path(folder) / "tokenizer_2")
    return InstantIDPipeline(config, parameters, tokenizers, compute=compute)


def _random_parameters(network: Network, seed: int) -> Tree:
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
