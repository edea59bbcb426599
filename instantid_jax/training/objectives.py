"""What is minimised: one number a sample, from parameters, a batch and random draws that were made for the whole batch.

Every draw has the batch as its first axis and is made before a batch is split over devices or into accumulated parts, so
that a sample meets the same noise however the work is divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from instantid_jax.config import ModelConfig
from instantid_jax.diffusion import loss as losses
from instantid_jax.diffusion import parameterization
from instantid_jax.diffusion.schedule import alphas_cumprod
from instantid_jax.models import Network
from instantid_jax.models.encoder import AddedConditions, IdentityContext
from instantid_jax.training.config import LossConfig, StageConfig

Batch = Mapping[str, Array]
Parameters = Mapping[str, Any]


class Objective(NamedTuple):
    """Static parts of the loss."""

    networks: Mapping[str, Network]
    model: ModelConfig
    stage: StageConfig
    loss: LossConfig


class PerSample(NamedTuple):
    """The weighted loss, the plain one, and the diffusion time as a fraction (0 where there is none), each [b]."""

    loss: Array
    plain: Array
    time: Array


def per_sample(objective: Objective, parameters: Parameters, batch: Batch, draws: Batch) -> PerSample:
    """Loss of every sample of a batch or of a part of it."""
    function = {"denoise": _denoise, "reconstruct": _reconstruct, "recognize": _recognize}[objective.stage.objective]
    return function(objective, parameters, batch, draws)


def draw(objective: Objective, key: Array, batch: Batch) -> dict[str, Array]:
    """All randomness of one step, [B, ...] for a global batch of B."""
    model, loss = objective.model, objective.loss
    keys = dict(zip(("latent", "noise", "times", "offset", "perturbation", "crop"), jax.random.split(key, 6), strict=True))
    count, shape = _latent_shape(model, batch, loss.crop if objective.stage.objective == "reconstruct" else None)
    out = {"latent": jax.random.normal(keys["latent"], (count, *shape))}
    if objective.stage.objective == "reconstruct":
        return out | {"crop": jax.random.uniform(keys["crop"], (count, 2))}
    out["noise"] = jax.random.normal(keys["noise"], (count, *shape))
    out["times"] = draw_times(loss, keys["times"], count, model.scheduler.num_train_timesteps)
    if objective.stage.objective == "recognize" and loss.shift:
        out["shift"] = jax.random.randint(keys["crop"], (count, 2), -loss.shift, loss.shift + 1)
    if loss.noise_offset:
        out["noise"] += loss.noise_offset * jax.random.normal(keys["offset"], (count, 1, 1, shape[-1]))
    if loss.input_perturbation:
        out["perturbation"] = loss.input_perturbation * jax.random.normal(keys["perturbation"], (count, *shape))
    return out


def _latent_shape(model: ModelConfig, batch: Batch, crop: int | None) -> tuple[int, tuple[int, int, int]]:
    if "latent_mean" in batch:
        count, h, w, _ = batch["latent_mean"].shape
    else:
        count, height, width, _ = batch["image"].shape
        h, w = (side // model.vae.downscale for side in ((crop, crop) if crop else (height, width)))
    return count, (h, w, model.vae.latent_channels)


def draw_times(loss: LossConfig, key: Array, count: int, total: int) -> Array:
    """Training times [count], integers in [0, total), uniform or biased (`LossConfig.timestep_bias`)."""
    where, order = jax.random.split(key)
    u = jax.random.uniform(where, (count,))
    if loss.timesteps == "stratified":
        u = jax.random.permutation(order, (jnp.arange(count) + u) / count)
    if loss.timestep_bias == "none":
        return jnp.minimum((u * total).astype(jnp.int32), total - 1)
    portion = int(loss.timestep_bias_portion * total)
    ranges = {"earlier": (0, portion), "later": (total - portion, total), "range": loss.timestep_bias_range}
    low, high = ranges[loss.timestep_bias]
    density = jnp.ones(total).at[low:high].multiply(loss.timestep_bias_factor)
    edges = jnp.cumsum(density) / jnp.sum(density)
    return jnp.minimum(jnp.searchsorted(edges, u, side="right"), total - 1).astype(jnp.int32)


def clean_latents(objective: Objective, parameters: Parameters, batch: Batch, draws: Batch) -> Array:
    """Scaled latents of a batch, drawn from the autoencoder's distribution; cached moments are used where there are any."""
    vae = objective.networks["vae"].bind(parameters["vae"])
    if "latent_mean" in batch:
        mean, logvar = batch["latent_mean"], batch["latent_logvar"]
    else:
        mean, logvar = vae.encode(to_signed(batch["image"]).astype(objective.networks["vae"].compute.dtype))
    z = mean.astype(jnp.float32) + jnp.exp(0.5 * logvar.astype(jnp.float32)) * draws["latent"]
    return vae.scale(z)


def to_signed(image: Array) -> Array:
    """uint8 pixels to [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def encode_text(objective: Objective, parameters: Parameters, batch: Batch) -> tuple[Array, Array]:
    """SDXL's text states [b, n, c] and pooled state [b, p]; cached ones where the batch has them."""
    if "text_states" in batch:
        return batch["text_states"], batch["text_pooled"]
    first = objective.networks["text_encoder"].bind(parameters["text_encoder"])(batch["input_ids"])
    second = objective.networks["text_encoder_2"].bind(parameters["text_encoder_2"])(batch["input_ids_2"])
    return jnp.concatenate([first.hidden[-2], second.hidden[-2]], axis=-1), second.pooled


def _denoise(objective: Objective, parameters: Parameters, batch: Batch, draws: Batch) -> PerSample:
    """The diffusion loss of equation 4 of the paper, with the options of `LossConfig`."""
    model, stage, config = objective.model, objective.stage, objective.loss
    nets = {name: objective.networks[name].bind(parameters[name]) for name in stage.networks if name != "vae"}
    clean = jax.lax.stop_gradient(clean_latents(objective, parameters, batch, draws))
    table = jnp.asarray(alphas_cumprod(model.scheduler))
    alpha, sigma = parameterization.coefficients(table, draws["times"], 4)
    noise = draws["noise"]
    noisy = parameterization.add_noise(clean, noise + draws.get("perturbation", 0.0), alpha, sigma)
    states, pooled = encode_text(objective, parameters, batch)
    added, time = AddedConditions(pooled, batch["sizes"]), draws["times"].astype(jnp.float32)
    unet = nets["unet"]
    tokens = nets["resampler"](batch["embedding"]) if "resampler" in nets else None
    residuals = identity = None
    if "identitynet" in nets:
        net = nets["identitynet"]
        context = net.project_context(states if stage.identitynet_context == "text" else tokens)
        picture = _keypoint_picture(batch, clean.shape, model.vae.downscale)
        residuals = net(noisy, time, context, added, net.embed_condition(picture))
    if "adapter" in nets:
        identity = IdentityContext(nets["adapter"](tokens), jnp.float32(1.0))
    output = unet(noisy, time, unet.project_context(states), added, identity=identity, residuals=residuals).astype(jnp.float32)

    kind = model.scheduler.prediction_type
    mask = face_weights(batch["face_box"], clean.shape, model.vae.downscale, config.face_weight) if config.face_weight else None
    plain = losses.squared_error(output, parameterization.target(kind, clean, noise, alpha, sigma), mask)
    weighted = plain * _time_weight(config, kind, table[draws["times"]])
    if config.identity_weight:
        predicted = parameterization.x0(kind, noisy, output, alpha, sigma)
        read = objective.networks["recognizer"].bind(parameters["recognizer"])(predicted)
        seen = alpha[:, 0, 0, 0] ** config.identity_power
        weighted += config.identity_weight * seen * (1 - cosine(read, batch["embedding"]))
    return PerSample(weighted, plain, time / model.scheduler.num_train_timesteps)


def _keypoint_picture(batch: Batch, latents: tuple[int, ...], downscale: int) -> Array:
    """The control picture in [0, 1]; black where the recipe draws none."""
    if "keypoint_image" in batch:
        return batch["keypoint_image"].astype(jnp.float32) / 255
    b, h, w, _ = latents
    return jnp.zeros((b, h * downscale, w * downscale, 3))


def _time_weight(config: LossConfig, kind: str, alpha_bar: Array) -> Array:
    if config.weighting == "min_snr":
        return losses.min_snr_weight(kind, alpha_bar, config.min_snr_gamma)
    if config.weighting == "clipped_v":  # of networks that predict noise: `TrainConfig` has looked
        return losses.clipped_v_weight(alpha_bar, config.clipped_v_limit)
    return jnp.ones_like(alpha_bar)


def face_weights(box: Array, shape: tuple[int, ...], downscale: int, extra: float) -> Array:
    """1 outside the face and 1 + `extra` inside, [b, h, w, 1]; a latent pixel that the box covers in part counts in part."""
    _, h, w, _ = shape

    def cover(low: Array, high: Array, count: int) -> Array:
        edges = jnp.arange(count) * float(downscale)
        inside = jnp.minimum(high[:, None], edges + downscale) - jnp.maximum(low[:, None], edges)
        return jnp.clip(inside / downscale, 0.0, 1.0)

    columns, rows = cover(box[:, 0], box[:, 2], w), cover(box[:, 1], box[:, 3], h)
    return 1 + extra * rows[:, :, None, None] * columns[:, None, :, None]


def cosine(a: Array, b: Array) -> Array:
    """Cosine similarity of rows [b, d]; 0 where a row is zero."""
    return jnp.sum(a * b, -1) * jax.lax.rsqrt(jnp.sum(a * a, -1) * jnp.sum(b * b, -1) + 1e-12)


def _reconstruct(objective: Objective, parameters: Parameters, batch: Batch, draws: Batch) -> PerSample:
    """Autoencoder: L1, a third of the squared error, L1 of the differences, and the KL divergence to a unit normal."""
    config, vae = objective.loss, objective.networks["vae"].bind(parameters["vae"])
    image = to_signed(batch["image"])
    if config.crop:
        image = _crop(image, draws["crop"], config.crop, objective.model.vae.downscale)
    mean, logvar = vae.encode(image)
    rebuilt = vae.decode(mean + jnp.exp(0.5 * logvar) * draws["latent"]).astype(jnp.float32)
    error = rebuilt - image
    axes = (1, 2, 3)
    plain = jnp.mean(jnp.abs(error), axes)
    total = plain + 0.3 * jnp.mean(jnp.square(error), axes)
    if config.gradient_weight:
        slopes = jnp.mean(jnp.abs(jnp.diff(error, axis=1)), axes) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)), axes)
        total += config.gradient_weight * slopes
    divergence = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar, axes)
    return PerSample(total + config.kl_weight * divergence, jnp.mean(jnp.square(error), axes), jnp.zeros_like(plain))


def _crop(image: Array, where: Array, size: int, grid: int) -> Array:
    """Random squares of a batch, aligned to the latent grid; `where` [b, 2] in [0, 1)."""
    steps = jnp.asarray([(side - size) // grid + 1 for side in image.shape[1:3]])
    corner = (where * steps).astype(jnp.int32) * grid

    def one(picture: Array, at: Array) -> Array:
        return jax.lax.dynamic_slice(picture, (at[0], at[1], 0), (size, size, picture.shape[-1]))

    return jax.vmap(one)(image, corner)


def _recognize(objective: Objective, parameters: Parameters, batch: Batch, draws: Batch) -> PerSample:
    """Recogniser of latents: 1 - cos to the embedding of the same picture, under the noise that early predictions have."""
    clean = jax.lax.stop_gradient(clean_latents(objective, parameters, batch, draws))
    if "shift" in draws:  # what leaves on one side comes in on the other
        clean = jax.vmap(lambda picture, by: jnp.roll(picture, by, axis=(0, 1)))(clean, draws["shift"])
    strength = draws["times"][:, None, None, None] / objective.model.scheduler.num_train_timesteps
    read = objective.networks["recognizer"].bind(parameters["recognizer"])(clean + 0.5 * strength * draws["noise"])
    distance = 1 - cosine(read, batch["embedding"])
    return PerSample(distance, distance, draws["times"] / objective.model.scheduler.num_train_timesteps)
