"""Training losses as pure functions of arrays, in float32.

With rho_t = abar_t / (1 - abar_t), the signal-to-noise ratio:

    (1)  L = mean_b w_b mean_hwc m (output - target)^2 / mean_hwc m
    (2)  w = min(rho, gamma) / rho            min-SNR for a network that predicts noise (arXiv 2303.09556)
    (3)  w = min(rho, gamma) / (rho + 1)      min-SNR for a network that predicts v
    (4)  w = min(1 / abar, limit)             noise prediction judged as v would be, clipped

(4) follows from v - v' = (e - e') / alpha: plain noise loss gives almost no weight to the high noise levels, where colour
and layout are decided. `parameterization.target` gives the target.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = ["clipped_v_weight", "min_snr_weight", "squared_error", "weighted_mean"]


def squared_error(output: jax.Array, target: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The inner mean of (1): one number a sample, [b].

    Args:
        output: the network's prediction, [b, ...], any float dtype.
        target: what it should have been, same shape.
        mask: m >= 0, broadcastable to `output` (for instance [b, h, w, 1]); it weights places, and its scale does not matter.
            It must not be zero everywhere in a sample.
    """
    error = jnp.square(output.astype(jnp.float32) - target.astype(jnp.float32))
    axes = tuple(range(1, error.ndim))
    if mask is None:
        return jnp.mean(error, axis=axes)
    weight = jnp.broadcast_to(mask.astype(jnp.float32), error.shape)
    return jnp.sum(error * weight, axis=axes) / jnp.sum(weight, axis=axes)


def weighted_mean(per_sample: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """The outer mean of (1). The weights are not normalised: they are the loss's own scale."""
    return jnp.mean(per_sample if weight is None else weight * per_sample)


def min_snr_weight(prediction_type: str, alpha_bar: ArrayLike, gamma: ArrayLike = 5.0) -> jax.Array:
    """(2) or (3) at `alpha_bar` [b], in 0..1. Finite at pure noise, where (2) tends to 1.

    Raises:
        ValueError: `prediction_type` is neither "epsilon" nor "v_prediction".
    """
    bar = jnp.asarray(alpha_bar, jnp.float32)
    gamma = jnp.asarray(gamma, jnp.float32)
    if prediction_type == "epsilon":  # gamma / rho, written so that abar = 0 gives infinity and not 0/0
        return jnp.minimum(1.0, gamma * (1 - bar) / bar)
    if prediction_type == "v_prediction":  # 1 / (rho + 1) = 1 - abar
        return jnp.minimum(bar, gamma * (1 - bar))
    raise ValueError(f"prediction_type={prediction_type!r} is unknown; use 'epsilon' or 'v_prediction'")


def clipped_v_weight(alpha_bar: ArrayLike, limit: ArrayLike = 8.0) -> jax.Array:
    """(4) at `alpha_bar` [b], in 1..limit; for networks that predict noise."""
    return jnp.minimum(1 / jnp.asarray(alpha_bar, jnp.float32), jnp.asarray(limit, jnp.float32))
