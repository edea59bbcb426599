"""Grids of pictures of fixed validation people, made with the real pipeline while training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from instantid_jax.models import build_networks
from instantid_jax.pipeline import NETWORKS, InstantIDPipeline
from instantid_jax.training.objectives import clean_latents, to_signed

if TYPE_CHECKING:
    from instantid_jax.training.loop import Run

__all__ = ["sample_grid"]


def sample_grid(run: Run) -> Image.Image:
    """Rows: the people as they are, the keypoints, the pictures. For the autoencoder: pictures and their reconstructions."""
    count = min(run.config.validation.samples, len(run.validation[0]["sizes"]))
    batch = {name: np.asarray(jax.device_get(array[:count])) for name, array in run.validation[0].items()}
    weights = jax.tree.map(np.asarray, jax.device_get(run.weights()))
    truth = _pictures(run, weights, batch)
    if run.config.stage.objective == "reconstruct":
        image = jnp.asarray(to_signed(jnp.asarray(batch["image"])))
        vae = run.networks["vae"].bind(weights["vae"])
        rows = [batch["image"], _uint8(np.asarray(vae.decode(vae.encode(image).mean)) / 2 + 0.5)]
    else:
        rows = [truth, *([batch["keypoint_image"]] if "keypoint_image" in batch else []), _generate(run, weights, batch)]
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0))


def _uint8(image: np.ndarray) -> np.ndarray:
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _pictures(run: Run, weights: dict, batch: dict[str, np.ndarray]) -> np.ndarray:
    """The photos, decoded from cached latents where there are no others."""
    if "image" in batch:
        return batch["image"]
    vae = run.networks["vae"].bind(weights["vae"])
    arrays = {name: jnp.asarray(batch[name]) for name in ("latent_mean", "latent_logvar")}
    latents = clean_latents(run.objective, weights, arrays, {"latent": jnp.zeros_like(arrays["latent_mean"])})
    return _uint8(np.asarray(vae.decode(vae.unscale(latents))) / 2 + 0.5)


def _generate(run: Run, weights: dict, batch: dict[str, np.ndarray]) -> np.ndarray:
    config, stage = run.config, run.config.stage
    networks = build_networks(config.model)
    blank = {name: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), networks[name].abstract) for name in NETWORKS if name not in weights}
    pipe = InstantIDPipeline(config.model, weights | blank, run.tokenizers, compute=config.compute)
    height, width = (side * config.model.vae.downscale for side in batch["latent_mean"].shape[1:3]) if "latent_mean" in batch else batch["image"].shape[1:3]
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
