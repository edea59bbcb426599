"""Samplers that look back at the network's earlier opinions of the clean sample: DPM-Solver++(2M) and UniPC.

x is the variance preserving sample; m_i is the x_0 that the network gives at step i. With lambda = ln(alpha / sigma),
h_i = lambda_{i+1} - lambda_i and r = h_{i-1} / h_i:

    2M                 (1)  D = m_i + (m_i - m_{i-1}) / 2r             (order 1: D = m_i)
                       (2)  x' = (sigma' / sigma) x - alpha' (e^-h - 1) D          arXiv 2211.01095, algorithm 2
    2M SDE             (3)  x' = (sigma' / sigma) e^-h x + alpha' (1 - e^-2h) D + sigma' sqrt(1 - e^-2h) z
    UniPC-2, B = e^-h - 1, arXiv 2302.04867, algorithms 1 and 2
      predictor             (1) and (2)
      corrector        (4)  x'_c = (sigma' / sigma) x - alpha' B (m_i + (p_1 / r)(m_i - m_{i-1}) + p_2 (m' - m_i))
                       (5)  p_1 + p_2 = b_1,   -r p_1 + p_2 = b_2              (order 1: p_1 = 0, p_2 = 1/2)
                            b_1 = ((e^-h - 1) / -h - 1) / B,   b_2 = 2 (((e^-h - 1) / -h - 1) / -h - 1/2) / B

Order 1 is taken where there is no earlier opinion, in the last step of UniPC, and in the last step of 2M if it ends at
noise level 0 or if there are fewer than 15 steps. diffusers: DPMSolverMultistepScheduler ("dpmsolver++" and
"sde-dpmsolver++", midpoint) and UniPCMultistepScheduler ("bh2").
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from instantid_jax.diffusion.plan import Row, Rows, Sampler
from instantid_jax.diffusion.schedule import karras_levels, levels_at, noise_levels, spaced_timesteps, vp

__all__ = ["DPMpp2M", "UniPC"]


@dataclasses.dataclass(frozen=True)
class _Multistep(Sampler):
    """What both solvers share: times, levels, and the exponential step."""

    karras: bool = False

    def _levels(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Times [steps] and noise levels [steps + 1]; the last level is 0 or, as diffusers 0.25 had it, the schedule's smallest."""
        table = noise_levels(self.config)
        if self.karras:
            levels, times = karras_levels(self.config, steps, float(table[-1]), float(table[0]))
            times = times.round()
        else:
            times = spaced_timesteps(self.config, steps, endpoint=True, whole=True)
            levels = levels_at(self.config, times)
        last = 0.0 if self.config.final_sigmas_type == "zero" else min(levels[-1], float(table[0]))  # Karras levels end there, up to rounding
        return times, np.append(levels, last)

    def _predictor(self, times: np.ndarray, levels: np.ndarray, order: np.ndarray) -> tuple[Rows, np.ndarray]:
        """The coefficients of (1) and (2) as x' = decay x + gain (m + lookback (m - m_before)), and h [steps]."""
        alpha, sigma = vp(levels)
        with np.errstate(divide="ignore"):
            h = np.diff(-np.log(levels))  # lambda = -ln s; infinite in a step to level 0
        inverse_r = np.append(0.0, h[1:] / h[:-1])
        rows = {
            "timestep": times,
            "alpha": alpha[:-1],
            "sigma": sigma[:-1],
            "decay": sigma[1:] / sigma[:-1],
            "gain": -alpha[1:] * np.expm1(-h),
            "lookback": np.where(order == 2, inverse_r / 2, 0.0),
        }
        return rows, h


class TwoStep(NamedTuple):
    """The sample and the opinion of the step before."""

    sample: jax.Array
    before: jax.Array


@dataclasses.dataclass(frozen=True)
class DPMpp2M(_Multistep):
    """DPM-Solver++(2M), equations (1) and (2), or its SDE form (3)."""

    sde: bool = False

    @property
    def needs_noise(self) -> bool:
        return self.sde

    def init(self, sample: jax.Array) -> TwoStep:
        return TwoStep(sample, jnp.zeros(sample.shape, jnp.float32))

    def _table(self, steps: int, start: int) -> Rows:
        times, levels = self._levels(steps)
        order = np.full(steps, 2)
        order[start] = 1
        if steps < 15 or levels[-1] == 0:
            order[-1] = 1
        rows, h = self._predictor(times, levels, order)
        rows["spread"] = np.zeros(steps)
        if self.sde:
            alpha, sigma = vp(levels[1:])
            rows["decay"] = rows["decay"] * np.exp(-h)
            rows["gain"] = -alpha * np.expm1(-2 * h)
            rows["spread"] = sigma * np.sqrt(-np.expm1(-2 * h))
        return rows

    def _update(self, state: TwoStep, clean: jax.Array, row: Row, noise: jax.Array) -> TwoStep:
        slope = clean + row["lookback"] * (clean - state.before)
        sample = row["decay"] * state.sample + row["gain"] * slope
        return TwoStep(sample + row["spread"] * noise, clean)


class UniPCState(NamedTuple):
    """The sample, the corrected one of the step before, and the last two opinions."""

    sample: jax.Array
    origin: jax.Array
    before: jax.Array
    before_that: jax.Array


@dataclasses.dataclass(frozen=True)
class UniPC(_Multistep):
    """UniPC of order 2: each call first corrects the step that led to it (4), then predicts the next (2)."""

    def init(self, sample: jax.Array) -> UniPCState:
        zeros = jnp.zeros(sample.shape, jnp.float32)
        return UniPCState(sample, zeros, zeros, zeros)

    def _table(self, steps: int, start: int) -> Rows:
        times, levels = self._levels(steps)
        order = np.full(steps, 2)
        order[[start, -1]] = 1
        rows, h = self._predictor(times, levels, order)
        past, current = _corrector(h[:-1], order[:-1])
        # The call at step i corrects step i - 1, so these columns are one later. The first call has nothing to correct.
        rows["correct"] = (np.arange(steps) > start).astype(float)
        for name, column in (("past", past), ("current", current), ("decay_before", rows["decay"][:-1]), ("gain_before", rows["gain"][:-1])):
            rows[name] = np.append(0.0, column)
        return rows

    def _update(self, state: UniPCState, clean: jax.Array, row: Row, noise: jax.Array) -> UniPCState:
        blend = state.before + row["past"] * (state.before - state.before_that) + row["current"] * (clean - state.before)
        corrected = row["decay_before"] * state.origin + row["gain_before"] * blend
        x = jnp.where(row["correct"] > 0, corrected, state.sample)
        slope = clean + row["lookback"] * (clean - state.before)
        return UniPCState(row["decay"] * x + row["gain"] * slope, x, clean, state.before)


def _corrector(h: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p_1 / r and p_2 of (5) for each step of lengths `h`."""
    r = np.append(1.0, h[:-1] / h[1:])
    b_h = np.expm1(-h)
    phi = b_h / -h - 1
    b_1, b_2 = phi / b_h, 2 * (phi / -h - 0.5) / b_h
    p_1 = (b_1 - b_2) / (1 + r)
    second = order == 2
    return np.where(second, p_1 / r, 0.0), np.where(second, b_1 - p_1, 0.5)
