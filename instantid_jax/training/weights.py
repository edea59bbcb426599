"""A run's weights as a folder that the pipeline, the converter and the next stage read."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instantid_jax.checkpoint import load_weights, save_weights, stored_networks
from instantid_jax.config import ModelConfig, from_json, to_json
from instantid_jax.models import Network
from instantid_jax.parallel.distributed import is_main, synchronize
from instantid_jax.text import Tokenizer, write_default_tokenizers
from instantid_jax.training.config import InitConfig
from instantid_jax.training.state import InitError

__all__ = ["export_weights", "saved_model", "tokenizers_for"]


def tokenizers_for(model: ModelConfig, init: InitConfig, folder: Path) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizers of the starting weights; where there are none, CLIP's, cut to the model's vocabulary. Kept under `folder`."""
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name).is_dir():
            continue
        if init.weights is not None and (Path(init.weights) / name).is_dir():
            shutil.copytree(Path(init.weights) / name, folder / name)
    if not (folder / "tokenizer").is_dir():
        write_default_tokenizers(folder, model.text_encoder.vocab_size)
    return Tokenizer.from_directory(folder / "tokenizer"), Tokenizer.from_directory(folder / "tokenizer_2")


def saved_model(weights: str | Path) -> ModelConfig:
    """The model configuration in a weights folder. Raises `InitError` where there is none."""
    path = Path(weights) / "config.json"
    if not path.is_file():
        raise InitError(f"{weights} holds no weights (no config.json): run the recipe that makes them first")
    return from_json(ModelConfig, path.read_text(encoding="utf-8"))


def export_weights(
    folder: Path, model: ModelConfig, networks: Mapping[str, Network], parameters: Mapping[str, Any], init: InitConfig, tokenizers: Path
) -> None:
    """Writes config, tokenizers and the given networks (host arrays) into `folder`, replacing what was there only when all is written.

    Whatever else the run started from is copied. All processes call it together; one of them moves files.
    """
    part = folder.with_name(f".{folder.name}.part")
    if is_main():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / "config.json").write_text(to_json(model) + "\n", encoding="utf-8")
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(tokenizers / name, part / name)
    synchronize("export begins")
    for name, tree in parameters.items():
        save_weights(part / name, networks[name].to_disk(tree))
    if is_main():
        _finish(folder, part, init)
    synchronize("export ends")


def _finish(folder: Path, part: Path, init: InitConfig) -> None:
    """Copies what is missing in `part` and gives it its name."""
    base = None if init.weights is None else Path(init.weights)
    for found in sorted(base.iterdir()) if base is not None and base.is_dir() else ():
        if found.is_dir() and not (part / found.name).exists() and not found.name.startswith("."):
            shutil.copytree(found, part / found.name)
    missing = [] if base is None else [base / name for name in stored_networks(base) if not (part / name).exists()]
    for network in missing:  # those of a single file have no folder to copy
        save_weights(part / network.name, load_weights(network))
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def with_latent_statistics(model: ModelConfig, mean: Any, std: Any) -> ModelConfig:
    """The model with its latents normalised channel by channel, which a diffusion model on a small autoencoder needs."""
    values = {"latents_mean": tuple(map(float, mean)), "latents_std": tuple(map(float, std)), "scaling_factor": 1.0}
    return dataclasses.replace(model, vae=dataclasses.replace(model.vae, **values))
