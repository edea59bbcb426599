"""The noise schedule of a latent diffusion model, and the noise levels that a sampler visits.

A sample at time t is a mix of picture and noise with coefficients alpha and sigma (variance preserving, "VP"); its noise
level s is the same ratio for a sample that keeps the picture's scale (variance exploding, "VE"):

    (1)  x_t = alpha_t x_0 + sigma_t e,    alpha_t^2 = abar_t,    sigma_t^2 = 1 - abar_t
    (2)  abar_t = prod_{i <= t} (1 - beta_i)
    (3)  beta_i = (sqrt(b_0) + i/(T-1) (sqrt(b_1) - sqrt(b_0)))^2       "scaled_linear"; "linear" has no roots and no square
    (4)  s_t = sigma_t / alpha_t,    alpha = 1 / sqrt(s^2 + 1),    sigma = s alpha
    (5)  s_i = (s_max^(1/r) + i/(N-1) (s_min^(1/r) - s_max^(1/r)))^r,  r = 7     Karras et al. 2022 (arXiv 2206.00364), eq. 5

Everything here is numpy on the host. The published tables were made in float32, and 1 - abar is tiny at small t, so one
float32 rounding there moves s_0 by 3e-5: (2) and (3) repeat torch's order of rounding and are equal to it bit for bit.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from instantid_jax.config import SchedulerConfig

__all__ = ["SamplerError", "alphas_cumprod", "betas", "karras_levels", "levels_at", "noise_levels", "spaced_timesteps", "vp"]

Array = np.ndarray[Any, np.dtype[Any]]

TERMINAL_ALPHA_BAR = 2.0**-24
"""Stands for abar = 0 where a finite noise level is needed (the smallest positive float16, as in diffusers)."""


class SamplerError(ValueError):
    """A sampler or a number of steps that cannot be used; the message says what is wrong and what is accepted."""


def _linspace(start: float, stop: float, num: int) -> Array:
    """Evenly spaced float32 numbers, filled from both ends with one rounding each, as `torch.linspace` does."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(max(num - 1, 1)))
    i = np.arange(num)
    return np.where(i < num // 2, first + step * i, last - step * (num - 1 - i)).astype(np.float32)


def _cumprod(x: Array) -> Array:
    """Running product of float32 numbers, accumulated in float64, each entry rounded to float32."""
    return np.cumprod(x, dtype=np.float64).astype(np.float32)


@functools.lru_cache(maxsize=16)
def betas(config: SchedulerConfig) -> Array:
    """Equation (3): float32 [T], the noise variance that each training time adds.

    With `rescale_betas_zero_snr` sqrt(abar) is shifted and scaled so that the last time is pure noise and the first is
    unchanged (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
    """
    if config.beta_schedule == "linear":
        table = _linspace(config.beta_start, config.beta_end, config.num_train_timesteps)
    else:
        table = _linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
    if config.rescale_betas_zero_snr:
        root = np.sqrt(_cumprod(1 - table))
        first, last = root[0], root[-1]
        bar = ((root - last) * (first / (first - last))) ** 2
        table = 1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
    table.setflags(write=False)
    return table


@functools.lru_cache(maxsize=16)
def alphas_cumprod(config: SchedulerConfig) -> Array:
    """Equation (2): float32 [T], abar_t, from almost 1 at t = 0 down to almost (or, rescaled, exactly) 0."""
    table = _cumprod(1 - betas(config))
    table.setflags(write=False)
    return table


@functools.lru_cache(maxsize=16)
def noise_levels(config: SchedulerConfig) -> Array:
    """Equation (4): float32 [T], s_t, rising. The last is kept finite where the schedule ends in pure noise."""
    bar = alphas_cumprod(config).copy()
    if config.rescale_betas_zero_snr:
        bar[-1] = TERMINAL_ALPHA_BAR
    table = np.sqrt((1 - bar) / bar)
    table.setflags(write=False)
    return table


def vp(levels: Array) -> tuple[Array, Array]:
    """Equation (4) backwards: (alpha, sigma) in float64 of noise levels s."""
    s = np.asarray(levels, np.float64)
    alpha = 1 / np.sqrt(s**2 + 1)
    return alpha, s * alpha


def spaced_timesteps(config: SchedulerConfig, steps: int, *, endpoint: bool = False, whole: bool = False) -> Array:
    """`steps` training times, falling, spaced as `config.timestep_spacing` says (arXiv 2305.08891, table 2).

    With `endpoint` the range is cut into `steps` intervals whose lower end is left out, so that the last step may run to
    a noise level of its own (DPM-Solver++, UniPC); "trailing" spacing is the same either way. "linspace" times are fractional
    unless `whole`.

    Returns:
        float64 [steps], rounded to what float32 can hold, because the networks see float32 times.

    Raises:
        SamplerError: fewer than one step, or more steps than there are distinct times.
    """
    total = config.num_train_timesteps
    points = steps + endpoint
    if steps < 1:
        raise SamplerError(f"num_inference_steps={steps}: at least 1 is needed")
    if points > total:
        raise SamplerError(f"num_inference_steps={steps} is more than the {total - endpoint} that a schedule of {total} times allows")
    if config.timestep_spacing == "leading":
        times = np.arange(points)[::-1] * (total // points) + float(config.steps_offset)
    elif config.timestep_spacing == "trailing":
        times = np.arange(total, 0, -total / steps)[:steps].round() - 1
    else:
        times = np.linspace(0, total - 1, points)[::-1]
    times = times[:steps].round() if whole else times[:steps]
    if times[0] > total - 1 or times[-1] < 0:
        raise SamplerError(f"num_inference_steps={steps} with steps_offset={config.steps_offset} leaves the times 0..{total - 1}; use fewer steps")
    return times.astype(np.float32).astype(np.float64)


def levels_at(config: SchedulerConfig, times: Array) -> Array:
    """Noise levels at times that may be fractional: linear in s between the entries of the table, float64."""
    table = noise_levels(config)
    return np.interp(times, np.arange(len(table)), table)


def karras_levels(config: SchedulerConfig, steps: int, largest: float, smallest: float) -> tuple[Array, Array]:
    """Equation (5): noise levels from `largest` to `smallest`, and the times that have them (linear in log s), float64."""
    rho = 7.0
    ramp = np.linspace(0, 1, steps)
    levels = (largest ** (1 / rho) + ramp * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho
    table = np.log(noise_levels(config))
    return levels, np.interp(np.log(levels), table, np.arange(len(table)))
