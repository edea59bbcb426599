"""Every sampler against the class of diffusers that it stands for: whole trajectories with a fixed model and given noise.

The toy network is a smooth function of (x, t), written once for both sides. It is not linear, so that a wrong coefficient
cannot cancel, and it depends on t, so that a wrong time shows. Noise is drawn once and fed to both.
"""

import dataclasses
import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from diffusers.schedulers import scheduling_ddim, scheduling_dpmsolver_multistep, scheduling_euler_ancestral_discrete, scheduling_lcm

from instantid_jax.config import SchedulerConfig
from instantid_jax.diffusion import guidance, make_sampler, parameterization, schedule

TOLERANCE = 1e-5
SHAPE = (2, 3, 5, 4)  # [b, h, w, c]; nothing in a scheduler cares about the order of the axes

ORACLES = {
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
}
NOISY = (scheduling_ddim, scheduling_dpmsolver_multistep, scheduling_euler_ancestral_discrete, scheduling_lcm)
PREDICTIONS = ("epsilon", "v_prediction")
SIGMA_MIN = ("euler", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "unipc")


def network(x, t, xp):
    """Bounded, smooth, different at every time."""
    return xp.tanh(0.8 * x + 0.3) * (1 + 0.0004 * t) + 0.2 * xp.sin(2.0 * x - 0.01 * t)


@functools.lru_cache
def draws(count: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((count, *SHAPE)).astype(np.float32)


def oracle(name: str, config: SchedulerConfig, **extra):
    cls, options = ORACLES[name]
    published = dataclasses.asdict(config) | {"clip_sample": False}
    if name == "unipc" and config.use_karras_sigmas:
        options = options | {"use_karras_sigmas": True}
    base = diffusers.EulerDiscreteScheduler.from_config({k: v for k, v in published.items() if k not in ("set_alpha_to_one",)})
    return cls.from_config(base.config, **{"set_alpha_to_one": config.set_alpha_to_one, "clip_sample": False} | options | extra)


def reference(scheduler, steps: int, monkeypatch, start: int = 0, eta: float = 0.0, sample: np.ndarray | None = None) -> np.ndarray:
    """All samples of diffusers' run, the first included: [calls + 1, *SHAPE]."""
    scheduler.set_timesteps(steps)
    first = start * scheduler.order
    scheduler.set_begin_index(first) if hasattr(scheduler, "set_begin_index") else None
    times = scheduler.timesteps[first:]
    noise = iter(torch.from_numpy(draws(1 + len(times)))[1:])
    for module in NOISY:
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(noise))
    x = torch.from_numpy(draws(1)[0]) * scheduler.init_noise_sigma if sample is None else torch.from_numpy(sample)
    if sample is not None:
        x = scheduler.add_noise(x, torch.from_numpy(draws(1)[0]), times[:1])
    trajectory = [x]
    for t in times:
        output = network(scheduler.scale_model_input(x, t), t, torch)
        x = scheduler.step(output, t, x, **({"eta": eta} if eta else {})).prev_sample
        trajectory.append(x)
    return torch.stack(trajectory).numpy()


@functools.partial(jax.jit, static_argnums=0)
def scan(sampler, plan, sample, noise):
    def body(state, inputs):
        row, z = inputs
        output = network(sampler.model_input(state, row), row["timestep"], jnp)
        state = sampler.step(state, output, row, z if plan.needs_noise else None)
        return state, state.sample

    return jax.lax.scan(body, sampler.init(sample), (plan.rows, noise))[1]


def ours(sampler, steps: int, start: int = 0, sample: np.ndarray | None = None) -> np.ndarray:
    plan = sampler.plan(steps, start)
    noise = draws(1 + plan.num_calls)
    x = jnp.asarray(noise[0]) * plan.init_noise_sigma if sample is None else sampler.add_noise(jnp.asarray(sample), jnp.asarray(noise[0]), plan)
    return np.concatenate([x[None], scan(sampler, plan, x, noise[1:])])


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference at any call, relative to the largest value at that call."""
    assert actual.shape == expected.shape and np.isfinite(expected).all()
    axes = tuple(range(1, expected.ndim))
    return float((np.abs(actual - expected).max(axes) / np.abs(expected).max(axes)).max())
