"""Samplers that need no memory of earlier steps, and the list of all samplers by name.

x is the sample, x_0 the network's opinion of the clean one, e that of the noise, z fresh unit normal noise. Step i goes
from noise level s_i to s_{i+1}; Euler and Heun hold the variance exploding sample x = x_0 + s e (see `schedule`).

    Euler              (1)  x' = x + (s_{i+1} - s_i) d,   d = (x - x_0) / s_i         arXiv 2206.00364, algorithm 2 without churn
                               = x_0 + (s_{i+1} / s_i) (x - x_0)
    Euler ancestral    (2)  u^2 = s_{i+1}^2 (s_i^2 - s_{i+1}^2) / s_i^2,   w^2 = s_{i+1}^2 - u^2
                            x' = (1) down to w instead of s_{i+1}, + u z              k-diffusion's ancestral step
    Heun               (3)  x' = (1);   x'' = x + (s_{i+1} - s_i) (d + d') / 2,   d' = (x' - x_0') / s_{i+1}
                            arXiv 2206.00364, algorithm 1; the last step, to s = 0, is (1) alone
    DDIM               (4)  x' = alpha' x_0 + sqrt(sigma'^2 - v^2) e + v z            arXiv 2010.02502, eq. 12
                            v = eta (sigma' / sigma) sqrt(1 - alpha^2 / alpha'^2)     eq. 16
    LCM                (5)  f = c_out x_0 + c_skip x,   x' = alpha' f + sigma' z      arXiv 2310.04378, algorithm 3
                            c_skip = q^2 / ((k t)^2 + q^2),  c_out = k t / sqrt((k t)^2 + q^2),  q = 1/2; the last step gives f
    TCD                (6)  x_s = alpha_s x_0 + sigma_s e,   s = floor((1 - eta) t')     arXiv 2402.19159, algorithm 4
                            x' = (alpha' / alpha_s) x_s + sqrt(1 - (alpha' / alpha_s)^2) z; the last step gives x_s with s = 0

The second form of (1) is the one that is computed: the first subtracts two numbers near 4096 where a schedule begins in
pure noise (`rescale_betas_zero_snr`), and loses 1e-4.

Times and levels follow diffusers' classes of the same names, as of version 0.42, with one scheduler's file loaded into each
of them. In two settings this code goes on where diffusers does not: `rescale_betas_zero_snr` counts for Heun too, and
"trailing" spacing never gives more times than steps.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from instantid_jax.config import SchedulerConfig
from instantid_jax.diffusion.multistep import DPMpp2M, UniPC
from instantid_jax.diffusion.plan import Row, Rows, Sampler
from instantid_jax.diffusion.schedule import SamplerError, alphas_cumprod, karras_levels, levels_at, noise_levels, spaced_timesteps, vp
from instantid_jax.published import did_you_mean

__all__ = ["DDIM", "LCM", "SAMPLERS", "TCD", "Euler", "EulerAncestral", "Heun", "make_sampler"]


class Memoryless(NamedTuple):
    """The state of a sampler that remembers nothing."""

    sample: jax.Array


@dataclasses.dataclass(frozen=True)
class _Exploding(Sampler):
    """What Euler and Heun share: samples in variance exploding form, from level s_0 down."""

    def _levels(self, steps: int, karras: bool) -> tuple[np.ndarray, np.ndarray]:
        """Times [steps] and noise levels [steps + 1], the last of them 0."""
        times = spaced_timesteps(self.config, steps)
        levels = levels_at(self.config, times)
        if karras:
            levels, times = karras_levels(self.config, steps, levels[0], levels[-1])
        return times, np.append(levels, 0.0)

    def _init_noise_sigma(self, rows: Rows) -> float:
        largest = rows["level"].max()
        return np.sqrt(largest**2 + 1) if self.config.timestep_spacing == "leading" else largest

    def _scaled(self, sample: jax.Array, row: Row) -> jax.Array:
        return sample * row["alpha"]

    def _unscaled(self, noisy: jax.Array, row: Row) -> jax.Array:
        return noisy / row["alpha"]


@dataclasses.dataclass(frozen=True)
class Euler(_Exploding):
    """The default of SDXL and InstantID, equation (1). diffusers: EulerDiscreteScheduler."""

    karras: bool = False

    def init(self, sample: jax.Array) -> Memoryless:
        return Memoryless(sample)

    def _table(self, steps: int, start: int) -> Rows:
        times, levels = self._levels(steps, self.karras)
        if self.config.final_sigmas_type == "sigma_min":
            levels[-1] = noise_levels(self.config)[0]
        alpha, sigma = vp(levels[:-1])
        return {"timestep": times, "alpha": alpha, "sigma": sigma, "level": levels[:-1], "ratio": levels[1:] / levels[:-1]}

    def _update(self, state: Memoryless, clean: jax.Array, row: Row, noise: jax.Array) -> Memoryless:
        return Memoryless(clean + row["ratio"] * (state.sample - clean))


@dataclasses.dataclass(frozen=True)
class EulerAncestral(_Exploding):
    """Equation (2): goes too far down and comes back up with fresh noise. diffusers: EulerAncestralDiscreteScheduler."""

    @property
    def needs_noise(self) -> bool:
        return True

    def init(self, sample: jax.Array) -> Memoryless:
        return Memoryless(sample)

    def _table(self, steps: int, start: int) -> Rows:
        times, levels = self._levels(steps, karras=False)
        level, after = levels[:-1], levels[1:]
        up = np.sqrt(after**2 * (level**2 - after**2) / level**2)
        down = np.sqrt(after**2 - up**2)
        alpha, sigma = vp(level)
        return {"timestep": times, "alpha": alpha, "sigma": sigma, "level": level, "ratio": down / level, "up": up}

    def _update(self, state: Memoryless, clean: jax.Array, row: Row, noise: jax.Array) -> Memoryless:
        return Memoryless(clean + row["ratio"] * (state.sample - clean) + row["up"] * noise)


class HeunState(NamedTuple):
    """Between the two halves of a step: where it began, and the slope there."""

    sample: jax.Array
    origin: jax.Array
    slope: jax.Array


@dataclasses.dataclass(frozen=True)
class Heun(_Exploding):
    """Equation (3): two calls a step, but one in the last. diffusers: HeunDiscreteScheduler."""

    karras: bool = False
    calls_per_step: ClassVar[int] = 2

    def init(self, sample: jax.Array) -> HeunState:
        zeros = jnp.zeros(sample.shape, jnp.float32)
        return HeunState(sample, zeros, zeros)

    def _table(self, steps: int, start: int) -> Rows:
        times, levels = self._levels(steps, self.karras)
        alpha, sigma = vp(levels[:-1])
        # The calls see the levels 0, 1, 1, 2, 2, ...: each step ends where the next begins, and looks there twice.
        level = np.repeat(np.arange(steps), 2)[1:]
        calls = np.arange(2 * steps - 1)
        return {
            "timestep": times[level],
            "alpha": alpha[level],
            "sigma": sigma[level],
            "level": levels[level],
            "dlevel": np.diff(levels)[calls // 2],
            "second": calls % 2,
        }

    def _update(self, state: HeunState, clean: jax.Array, row: Row, noise: jax.Array) -> HeunState:
        second = row["second"] > 0
        slope = (state.sample - clean) / row["level"]
        slope = jnp.where(second, (state.slope + slope) / 2, slope)
        origin = jnp.where(second, state.origin, state.sample)
        return HeunState(origin + row["dlevel"] * slope, origin, slope)


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
    """Equation (4). diffusers: DDIMScheduler."""

    eta: float = 0.0
    """0 is deterministic; 1 adds as much noise as DDPM."""

    @property
    def needs_noise(self) -> bool:
        return self.eta > 0

    def init(self, sample: jax.Array) -> Memoryless:
        return Memoryless(sample)

    def _table(self, steps: int, start: int) -> Rows:
        table = alphas_cumprod(self.config).astype(np.float64)
        times = spaced_timesteps(self.config, steps, whole=True).astype(int)
        after = times - self.config.num_train_timesteps // steps
        final = 1.0 if self.config.set_alpha_to_one else table[0]
        bar, bar_after = table[times], np.where(after >= 0, table[after], final)
        variance = self.eta**2 * (1 - bar_after) / (1 - bar) * (1 - bar / bar_after)
        return {
            "timestep": times,
            "alpha": np.sqrt(bar),
            "sigma": np.sqrt(1 - bar),
            "alpha_after": np.sqrt(bar_after),
            "sigma_after": np.sqrt(np.maximum(1 - bar_after - variance, 0)),
            "spread": np.sqrt(variance),
        }

    def _update(self, state: Memoryless, clean: jax.Array, row: Row, noise: jax.Array) -> Memoryless:
        epsilon = (state.sample - row["alpha"] * clean) / row["sigma"]
        sample = row["alpha_after"] * clean + row["sigma_after"] * epsilon
        return Memoryless(sample + row["spread"] * noise)


@dataclasses.dataclass(frozen=True)
class LCM(Sampler):
    """Equation (5), for distilled models; its times ignore spacing and offset. diffusers: LCMScheduler."""

    original_inference_steps: int = 50
    """Steps of the solver that the model was distilled from; the sampler's times are a subset of that solver's."""
    timestep_scaling: float = 10.0
    """k of equation (5)."""

    @property
    def needs_noise(self) -> bool:
        return True

    def init(self, sample: jax.Array) -> Memoryless:
        return Memoryless(sample)

    def _table(self, steps: int, start: int) -> Rows:
        times = _solver_times("LCM", self.config, steps, self.original_inference_steps)
        bar = alphas_cumprod(self.config)[times].astype(np.float64)
        bar_after = np.append(bar[1:], 1.0)
        scaled = times * self.timestep_scaling
        return {
            "timestep": times,
            "alpha": np.sqrt(bar),
            "sigma": np.sqrt(1 - bar),
            "alpha_after": np.sqrt(bar_after),
            "sigma_after": np.sqrt(1 - bar_after),
            "c_skip": 0.25 / (scaled**2 + 0.25),
            "c_out": scaled / np.sqrt(scaled**2 + 0.25),
        }

    def _update(self, state: Memoryless, clean: jax.Array, row: Row, noise: jax.Array) -> Memoryless:
        boundary = row["c_out"] * clean + row["c_skip"] * state.sample
        return Memoryless(row["alpha_after"] * boundary + row["sigma_after"] * noise)


@dataclasses.dataclass(frozen=True)
class TCD(Sampler):
    """Equation (6), for models distilled along their trajectories; times as LCM's. diffusers: TCDScheduler."""

    eta: float = 0.3
    """How far each step goes past its aim before fresh noise brings it back (gamma in the paper); 0 is deterministic."""
    original_inference_steps: int = 50
    """As LCM's."""

    @property
    def needs_noise(self) -> bool:
        return self.eta > 0

    def init(self, sample: jax.Array) -> Memoryless:
        return Memoryless(sample)

    def _table(self, steps: int, start: int) -> Rows:
        table = alphas_cumprod(self.config).astype(np.float64)
        times = _solver_times("TCD", self.config, steps, self.original_inference_steps)
        after = np.append(times[1:], 0)
        aim = np.floor(np.float32(1 - self.eta) * after.astype(np.float32)).astype(int)
        keep = table[after] / table[aim]
        keep[-1] = 1.0
        return {
            "timestep": times,
            "alpha": np.sqrt(table[times]),
            "sigma": np.sqrt(1 - table[times]),
            "alpha_aim": np.sqrt(keep * table[aim]),
            "sigma_aim": np.sqrt(keep * (1 - table[aim])),
            "spread": np.sqrt(1 - keep),
        }

    def _update(self, state: Memoryless, clean: jax.Array, row: Row, noise: jax.Array) -> Memoryless:
        epsilon = (state.sample - row["alpha"] * clean) / row["sigma"]
        return Memoryless(row["alpha_aim"] * clean + row["sigma_aim"] * epsilon + row["spread"] * noise)


def _solver_times(name: str, config: SchedulerConfig, steps: int, original: int) -> np.ndarray[Any, np.dtype[Any]]:
    """Of the times of the solver that a model was distilled from, as many as there are steps."""
    total = config.num_train_timesteps
    if not steps <= original <= total:
        raise SamplerError(f"{name}: needs num_inference_steps ({steps}) <= original_inference_steps ({original}) <= {total}; use fewer steps")
    times = np.arange(original, 0, -1) * (total // original) - 1
    return times[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)]


SAMPLERS: dict[str, tuple[type[Sampler], dict[str, Any]]] = {
    "euler": (Euler, {}),
    "euler_a": (EulerAncestral, {}),
    "heun": (Heun, {}),
    "ddim": (DDIM, {}),
    "dpmpp_2m": (DPMpp2M, {}),
    "dpmpp_2m_karras": (DPMpp2M, {"karras": True}),
    "dpmpp_2m_sde": (DPMpp2M, {"sde": True}),
    "unipc": (UniPC, {}),
    "lcm": (LCM, {}),
    "tcd": (TCD, {}),
}
"""Name -> (class, the options that the name stands for)."""


_ENDING = (Euler, DPMpp2M, UniPC)
"""Samplers that may end above noise level 0, as `final_sigmas_type` says."""
_SPACED = (Euler, EulerAncestral, Heun, DDIM, DPMpp2M, UniPC)
"""Samplers whose times follow `timestep_spacing`."""


def make_sampler(name: str, config: SchedulerConfig, **options: Any) -> Sampler:
    """A sampler by its name in `SAMPLERS`.

    Args:
        name: for instance "euler".
        config: the model's noise schedule, spacing, offset, prediction type and Karras setting. Settings that a sampler does not
            have (spacing for LCM and TCD, Karras for these, DDIM and Euler ancestral) do nothing there, as when swapping diffusers'
            schedulers.
        **options: the sampler's own:
            `karras` (euler, heun, dpmpp_2m, dpmpp_2m_sde, unipc): True or False; default from `config`.
            `final_sigmas_type` (euler, dpmpp_2m*, unipc): noise level after the last step, "zero" or "sigma_min"; default from
            `config`, where it is "zero", as in diffusers since 0.27. "sigma_min" is what DPM++ and UniPC did in 0.25.
            `timestep_spacing` (all but lcm and tcd): "leading", "trailing" or "linspace"; default from `config`.
            `eta` (ddim, tcd): fresh noise of each step, 0 to 1; 0 and 0.3 by default.
            `original_inference_steps` (lcm, tcd): whole, at least 1. `timestep_scaling` (lcm): above 0.

    Raises:
        SamplerError: an unknown name or option, with the nearest that exists, or a value that an option cannot have.
    """
    if name not in SAMPLERS:
        raise SamplerError(f"unknown sampler {name!r}; the samplers are {', '.join(SAMPLERS)}{did_you_mean(str(name), SAMPLERS)}")
    cls, preset = SAMPLERS[name]
    known = [field.name for field in dataclasses.fields(cls) if field.name not in ("config", *preset)]
    known += ["final_sigmas_type"] if issubclass(cls, _ENDING) else []
    known += ["timestep_spacing"] if issubclass(cls, _SPACED) else []
    for option, value in options.items():
        if option not in known:
            listed = f"Its options: {', '.join(known) or 'none'}"
            raise SamplerError(f"sampler {name!r} has no option {option!r}. {listed}{did_you_mean(option, known)}")
        _check_option(name, option, value)
    settings = {option: options.pop(option) for option in ("final_sigmas_type", "timestep_spacing") if option in options}
    config = dataclasses.replace(config, **settings)
    if "karras" in known:
        options.setdefault("karras", config.use_karras_sigmas)
    return cls(config, **preset, **options)


def _check_option(sampler: str, option: str, value: Any) -> None:
    """Raises `SamplerError` for a value of the wrong type or range."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    fits, needed = {
        "karras": (isinstance(value, bool), "True or False"),
        "final_sigmas_type": (value in ("zero", "sigma_min"), "'zero' or 'sigma_min'"),
        "timestep_spacing": (value in ("leading", "trailing", "linspace"), "'leading', 'trailing' or 'linspace'"),
        "eta": (number and 0 <= value <= 1, "a number from 0 to 1"),
        "original_inference_steps": (number and isinstance(value, int) and value >= 1, "a whole number, at least 1"),
        "timestep_scaling": (number and value > 0, "a number above 0"),
    }[option]
    if not fits:
        raise SamplerError(f"option {option!r} of sampler {sampler!r} must be {needed}, not {value!r}")
