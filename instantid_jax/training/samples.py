"""Grids of pictures of fixed validation people, made with the real pipeline while training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np
from PIL import Image

from instantid_jax.models import build_networks
from instantid_jax.pipeline import NETWORKS, InstantIDPipeline
from instantid_jax.training.objectives import to_signed

if TYPE_CHECKING:
    from instantid_jax.training.run import Run

__all__ = ["sample_grid"]


def sample_grid(run: Run) -> Image.Image:
    """Rows: the people as they are, the keypoints, the pictures. For the autoencoder: pictures and their reconstructions."""
    count = min(run.config.validation.samples, len(run.validation[0]["sizes"]))
    batch = {name: np.asarray(jax.device_get(array[:count])) for name, array in run.validation[0].items()}
    weights = jax.tree.map(np.asarray, jax.device_get(run.weights()))
    truth = _pictures(run, weights, batch)
    if run.config.stage.objective == "reconstruct":
        network = run.networks["vae"]

        def rebuild(vae: dict, image: jax.Array) -> jax.Array:
            bound = network.bind(vae)
            return bound.decode(bound.encode(to_signed(image)).mean)

        rows = [batch["image"], _uint8(np.asarray(jax.jit(rebuild)(weights["vae"], batch["image"])) / 2 + 0.5)]
    else:
        rows = [truth, *([batch["keypoint_image"]] if "keypoint_image" in batch else []), _generate(run, weights, batch)]
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0))


def _uint8(image: np.ndarray) -> np.ndarray:
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _pictures(run: Run, weights: dict, batch: dict[str, np.ndarray]) -> np.ndarray:
    """The photos, decoded from cached latents where there are no others."""
    if "image" in batch:
        return batch["image"]
    network = run.networks["vae"]
    return _uint8(np.asarray(jax.jit(lambda vae, mean: network.bind(vae).decode(mean))(weights["vae"], batch["latent_mean"])) / 2 + 0.5)


def _generate(run: Run, weights: dict, batch: dict[str, np.ndarray]) -> np.ndarray:
    config, stage = run.config, run.config.stage
    networks = build_networks(config.model)
    blank = {name: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), networks[name].abstract) for name in NETWORKS if name not in weights}
    pipe = InstantIDPipeline(config.model, weights | blank, run.tokenizers, compute=config.compute)
    factor = config.model.vae.downscale
    height, width = batch["image"].shape[1:3] if "image" in batch else (side * factor for side in batch["latent_mean"].shape[1:3])
    prompts = run.tokenizers[0].decode(batch["input_ids"])
    out = []
    for row, prompt in enumerate(prompts):
        picture = batch["keypoint_image"][row] if "keypoint_image" in batch else np.zeros((height, width, 3), np.uint8)
        out.append(
            pipe(
                prompt,
                picture,
                batch["embedding"][row],
                num_inference_steps=config.validation.sample_steps,
                guidance_scale=config.validation.guidance_scale,
                controlnet_conditioning_scale=float(stage.identitynet),
                ip_adapter_scale=float(stage.adapter),
                seed=row,
                output_type="np",
            ).images[0]
        )
    return _uint8(np.stack(out))
