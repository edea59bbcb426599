"""What a network predicts, and how one prediction is turned into another.

With x = alpha x_0 + sigma e and alpha^2 + sigma^2 = 1:

    (1)  x_0 = (x - sigma e) / alpha
    (2)  v   = alpha e - sigma x_0                  Salimans & Ho 2022 (arXiv 2202.00512)
    (3)  x_0 = alpha x - sigma v
    (4)  e   = sigma x + alpha v

All functions compute and return float32. `alpha` and `sigma` broadcast against the sample; `coefficients` gives them in
the right shape for a batch of times. `prediction_type` is "epsilon" or "v_prediction", as in the scheduler's file.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = ["add_noise", "coefficients", "epsilon", "target", "velocity", "x0"]

PREDICTION_TYPES = ("epsilon", "v_prediction")


def _float32(*arrays: ArrayLike) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def _check(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={prediction_type!r} is unknown; use one of {', '.join(PREDICTION_TYPES)}")


def coefficients(alphas_cumprod: ArrayLike, t: ArrayLike, ndim: int) -> tuple[jax.Array, jax.Array]:
    """(alpha, sigma) at integer times `t` [b], each shaped [b, 1, ...] with `ndim` axes. `alphas_cumprod` is abar [T]."""
    (table,) = _float32(alphas_cumprod)
    times = jnp.asarray(t)
    bar = table[times].reshape(times.shape + (1,) * (ndim - times.ndim))
    return jnp.sqrt(bar), jnp.sqrt(1 - bar)


def add_noise(clean: ArrayLike, noise: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> jax.Array:
    """The forward process: alpha x_0 + sigma e. `noise` is unit normal, shaped like `clean`."""
    clean, noise, alpha, sigma = _float32(clean, noise, alpha, sigma)
    return alpha * clean + sigma * noise


def velocity(clean: ArrayLike, noise: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> jax.Array:
    """Equation (2)."""
    clean, noise, alpha, sigma = _float32(clean, noise, alpha, sigma)
    return alpha * noise - sigma * clean


def x0(prediction_type: str, x: ArrayLike, output: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> jax.Array:
    """The clean sample that a network's `output` at `x` implies: (1) or (3). Raises ValueError for an unknown type."""
    _check(prediction_type)
    x, output, alpha, sigma = _float32(x, output, alpha, sigma)
    return (x - sigma * output) / alpha if prediction_type == "epsilon" else alpha * x - sigma * output


def epsilon(prediction_type: str, x: ArrayLike, output: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> jax.Array:
    """The noise that a network's `output` at `x` implies: itself, or (4). Raises ValueError for an unknown type."""
    _check(prediction_type)
    x, output, alpha, sigma = _float32(x, output, alpha, sigma)
    return output if prediction_type == "epsilon" else sigma * x + alpha * output


def target(prediction_type: str, clean: ArrayLike, noise: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> jax.Array:
    """What the network should have said for add_noise(clean, noise, ...). Raises ValueError for an unknown type."""
    _check(prediction_type)
    return _float32(noise)[0] if prediction_type == "epsilon" else velocity(clean, noise, alpha, sigma)
