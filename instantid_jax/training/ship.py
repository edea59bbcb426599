"""Makes trained weights of rendered heads the model that comes along: one file in half precision, and people to draw.

    python -m instantid_jax.training.ship --weights runs/portraits/weights --out instantid_jax/assets/portraits

writes OUT/model/ (config.json, tokenizers, weights.safetensors) and OUT/people/ (test people, whom no training has seen).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from safetensors.numpy import save_file

from instantid_jax.checkpoint import has_weights, load_weights
from instantid_jax.config import to_json
from instantid_jax.models import build_networks
from instantid_jax.training.weights import saved_model

__all__ = ["ship_people", "ship_weights"]

PEOPLE = (17, 18, 1, 15)
"""Seeds, among the test people, of those who come along."""


@dataclass(frozen=True)
class Settings:
    """Makes trained weights the model that comes along."""

    weights: Path
    """Folder of weights that train.py wrote."""
    out: Path
    """Folder whose model/ and people/ are replaced."""


def ship_weights(weights: Path, folder: Path) -> int:
    """Writes the model of `weights` into `folder`, float16; returns the bytes of the file. Raises ValueError for what is no model."""
    config, flat = saved_model(weights), {}
    for name in (*build_networks(config), "recognizer"):
        if name == "recognizer" and not has_weights(weights / name):
            continue  # only what trained with the identity loss has one
        flat |= {f"{name}/{path}": np.ascontiguousarray(array, np.float16) for path, array in load_weights(weights / name).items()}
    broken = [path for path, array in flat.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"{weights}: {broken[0]} and {len(broken) - 1} others are not finite in half precision")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(flat, part / "weights.safetensors")
    (part / "weights.safetensors").chmod(0o644)  # it is made for its owner alone
    (part / "config.json").write_text(to_json(config) + "\n", encoding="utf-8")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(weights / name, part / name)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return (folder / "weights.safetensors").stat().st_size


def ship_people(folder: Path) -> None:
    """Renders a reference photo (view 0, plain) and a pose (view 1) of everybody in `PEOPLE`."""
    import dataclasses

    from instantid_jax.data.portraits import PortraitWorld

    world, about = PortraitWorld(image_size=128), {}
    folder.mkdir(parents=True, exist_ok=True)
    for seed in PEOPLE:
        person = world.identity(seed)
        photo = world.render(person, dataclasses.replace(world.view(person, 0), style="photo"))
        pose = world.render(person, world.view(person, 1), 16).keypoints / 16
        name = f"person_{seed}"
        Image.fromarray(photo.image).save(folder / f"{name}.png")
        about[name] = {"seed": seed, "pose": np.round(pose.astype(float), 4).tolist()}
    (folder / "people.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    settings = tyro.cli(Settings, args=arguments, description=__doc__)
    try:
        size = ship_weights(settings.weights, settings.out / "model")
        ship_people(settings.out / "people")
    except (ValueError, OSError) as error:
        print(f"ship: {error}", file=sys.stderr)
        return 1
    print(f"{settings.out / 'model'}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
