"""Steering between a conditional and an unconditional prediction, and when the control image counts.

    (1)  g = u + w (c - u)                                  classifier-free guidance (arXiv 2207.12598, in diffusers' scale)
    (2)  r = p g std(c) / std(g) + (1 - p) g                rescale (arXiv 2305.08891, section 3.4)
    (3)  keep_i = 0 if i/N < start or (i+1)/N > end else 1
    (4)  g = u + w_t (t - u) + w_i (c - t)                  guidance by branch: t has the text alone, c text and identity

Scales and factors are arrays like any other: changing them compiles nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

__all__ = ["by_branch", "classifier_free", "control_window", "rescale"]


def classifier_free(uncond: jax.Array, cond: jax.Array, scale: ArrayLike) -> jax.Array:
    """Equation (1). `scale` 1 gives `cond` up to rounding; it broadcasts, so it may be a scalar or one number a picture.

    Float32, whatever the predictions' dtype.
    """
    uncond, cond = uncond.astype(jnp.float32), cond.astype(jnp.float32)
    return uncond + jnp.asarray(scale, jnp.float32) * (cond - uncond)


def by_branch(uncond: jax.Array, text: jax.Array, cond: jax.Array, text_scale: ArrayLike, identity_scale: ArrayLike) -> jax.Array:
    """Equation (4), as u + w_i (c - u) + (w_t - w_i) (t - u): with equal scales it is equation (1), bit for bit. Float32."""
    uncond, text = uncond.astype(jnp.float32), text.astype(jnp.float32)
    difference = jnp.asarray(text_scale, jnp.float32) - jnp.asarray(identity_scale, jnp.float32)
    return classifier_free(uncond, cond, identity_scale) + difference * (text - uncond)


def rescale(guided: jax.Array, cond: jax.Array, factor: ArrayLike) -> jax.Array:
    """Equation (2): pulls the spread of a guided prediction back to that of the conditional one, picture by picture.

    Args:
        guided: the result of `classifier_free`, [b, ...].
        cond: the conditional prediction, same shape.
        factor: p in 0..1; at 0 `guided` comes back unchanged, bit for bit. A scalar, or [b, 1, ...].

    Returns:
        an array like `guided`; the arithmetic is float32.
    """
    axes = tuple(range(1, guided.ndim))
    wide, plain = guided.astype(jnp.float32), cond.astype(jnp.float32)
    spread_guided = jnp.std(wide, axis=axes, ddof=1, keepdims=True)
    spread_cond = jnp.std(plain, axis=axes, ddof=1, keepdims=True)
    factor = jnp.asarray(factor, jnp.float32)
    mixed = factor * (wide * (spread_cond / spread_guided)) + (1 - factor) * wide
    return jnp.where(factor == 0, guided, mixed.astype(guided.dtype))


def control_window(num_steps: int, start: float, end: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Equation (3): for each of `num_steps` steps, 1 where the control net counts and 0 where it does not.

    `start` and `end` are fractions of the whole run. Computed in float64, because the comparison is exact: 0.3 as float32 is
    larger than 3/10 and would drop a step.

    Raises:
        ValueError: unless 0 <= start < end <= 1.
    """
    if not 0 <= start < end <= 1:
        raise ValueError(f"control window: start={start} and end={end} must satisfy 0 <= start < end <= 1")
    i = np.arange(num_steps, dtype=np.float64)
    dropped = (i / num_steps < start) | ((i + 1) / num_steps > end)
    return 1 - dropped.astype(np.float32)
