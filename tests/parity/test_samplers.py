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
from diffusers.schedulers import scheduling_ddim, scheduling_dpmsolver_multistep, scheduling_euler_ancestral_discrete, scheduling_lcm, scheduling_tcd

from instantid_jax.config import SchedulerConfig
from instantid_jax.diffusion import PRESETS, guidance, make_sampler, parameterization, schedule

# diffusers turns torch tensors into numpy arrays in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")

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
    "tcd": (diffusers.TCDScheduler, {}),
}
NOISY = (scheduling_ddim, scheduling_dpmsolver_multistep, scheduling_euler_ancestral_discrete, scheduling_lcm, scheduling_tcd)
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


def reference(
    scheduler, steps: int, monkeypatch, start: int = 0, eta: float = 0.0, sample: np.ndarray | None = None, mask: np.ndarray | None = None
) -> np.ndarray:
    """All samples of diffusers' run, the first included: [calls + 1, *SHAPE]. With a mask as its inpainting pipelines for 4-channel UNets."""
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
    for i, t in enumerate(times):
        output = network(scheduler.scale_model_input(x, t), t, torch)
        x = scheduler.step(output, t, x, **({"eta": eta} if eta else {})).prev_sample
        if mask is not None:
            kept = torch.from_numpy(sample)
            if i < len(times) - 1:
                kept = scheduler.add_noise(kept, torch.from_numpy(draws(1)[0]), times[i + 1 : i + 2])
            x = (1 - torch.from_numpy(mask)) * kept + torch.from_numpy(mask) * x
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
    # What a step computes depends on the prediction type alone; all else is in the plan. So most settings share a compilation.
    stepper = dataclasses.replace(sampler, config=SchedulerConfig(prediction_type=sampler.config.prediction_type))
    return np.concatenate([x[None], scan(stepper, plan, x, noise[1:])])


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference at any call, relative to the largest value at that call."""
    assert actual.shape == expected.shape and np.isfinite(expected).all()
    axes = tuple(range(1, expected.ndim))
    return float((np.abs(actual - expected).max(axes) / np.abs(expected).max(axes)).max())


@pytest.mark.parametrize("steps", [4, 5, 20, 30])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", ORACLES)
def test_trajectory(name, prediction_type, steps, monkeypatch):
    config = SchedulerConfig(prediction_type=prediction_type)
    expected = reference(oracle(name, config), steps, monkeypatch)
    assert error(ours(make_sampler(name, config), steps), expected) <= TOLERANCE


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 14, 15])
def test_order_of_the_last_step(steps, final_sigmas_type, monkeypatch):
    """DPM-Solver++ lowers its order at the end of runs under 15 steps, and always when it ends at level 0."""
    config = SchedulerConfig(final_sigmas_type=final_sigmas_type)
    for name in ("dpmpp_2m", "unipc"):
        expected = reference(oracle(name, config), steps, monkeypatch)
        assert error(ours(make_sampler(name, config), steps), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m_sde", "unipc"])
def test_karras_from_the_file(name, monkeypatch):
    for prediction_type, steps in (("epsilon", 30), ("v_prediction", 5)):
        config = SchedulerConfig(prediction_type=prediction_type, use_karras_sigmas=True)
        expected = reference(oracle(name, config), steps, monkeypatch)
        assert error(ours(make_sampler(name, config), steps), expected) <= TOLERANCE


def test_karras_by_option_equals_karras_from_the_file():
    by_option = ours(make_sampler("euler", SchedulerConfig(), karras=True), 8)
    np.testing.assert_array_equal(by_option, ours(make_sampler("euler", SchedulerConfig(use_karras_sigmas=True)), 8))


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("name", SIGMA_MIN)
def test_older_final_level(name, karras, monkeypatch):
    for steps in (5, 20):
        config = SchedulerConfig(final_sigmas_type="sigma_min", use_karras_sigmas=karras)
        expected = reference(oracle(name, config), steps, monkeypatch)
        assert error(ours(make_sampler(name, config), steps), expected) <= TOLERANCE


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("name", ORACLES)
def test_spacings(name, spacing, monkeypatch):
    for steps in (5, 30):
        config = SchedulerConfig(timestep_spacing=spacing)
        expected = reference(oracle(name, config), steps, monkeypatch)
        assert error(ours(make_sampler(name, config), steps), expected) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in ORACLES if name != "heun"])  # diffusers' Heun drops the setting
def test_zero_terminal_snr(name, monkeypatch):
    config = SchedulerConfig(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    # diffusers' own Euler step out of pure noise (level 4096) loses 1e-4 in float32: see the next test for that step.
    start, sample = (1, draws(3)[2]) if name.startswith("euler") else (0, None)
    for steps in (5 + start, 30 + start):
        expected = reference(oracle(name, config), steps, monkeypatch, start=start, sample=sample)
        assert error(ours(make_sampler(name, config), steps, start, sample), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["euler", "euler_a"])
def test_first_step_out_of_pure_noise_against_float64(name, monkeypatch):
    config = SchedulerConfig(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    scheduler = oracle(name, config)
    scheduler.set_timesteps(7)
    s, after = scheduler.sigmas.double().numpy()[:2]
    t = float(scheduler.timesteps[0])
    start, noise = draws(2).astype(np.float64)
    up = np.sqrt(after**2 * (s**2 - after**2) / s**2) if name == "euler_a" else 0.0
    x = (start.astype(np.float32) * np.float32(scheduler.init_noise_sigma)).astype(np.float64)
    clean = x / (s**2 + 1) - network(x / np.sqrt(s**2 + 1), t, np) * s / np.sqrt(s**2 + 1)
    expected = x + (np.sqrt(after**2 - up**2) - s) * (x - clean) / s + up * noise
    assert error(ours(make_sampler(name, config), 7)[1:2], expected[None]) <= TOLERANCE


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_eta(eta, monkeypatch):
    for prediction_type, steps in (("epsilon", 20), ("v_prediction", 5)):
        config = SchedulerConfig(prediction_type=prediction_type)
        expected = reference(oracle("ddim", config), steps, monkeypatch, eta=eta)
        assert error(ours(make_sampler("ddim", config, eta=eta), steps), expected) <= TOLERANCE


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("eta", [0.7, 1.0])
def test_tcd_eta(eta, steps, monkeypatch):
    for prediction_type in PREDICTIONS:
        config = SchedulerConfig(prediction_type=prediction_type)
        expected = reference(oracle("tcd", config, original_inference_steps=40), steps, monkeypatch, eta=eta)
        assert error(ours(make_sampler("tcd", config, eta=eta, original_inference_steps=40), steps), expected) <= TOLERANCE


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", [name for name in ORACLES if name not in ("lcm", "tcd")])
def test_spacing_by_option_is_spacing_from_the_file(name, spacing):
    assert make_sampler(name, SchedulerConfig(), timestep_spacing=spacing) == make_sampler(name, SchedulerConfig(timestep_spacing=spacing))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, monkeypatch):
    """Their authors' schedulers and settings, on the model's own noise schedule."""
    cls, options, steps, eta = {
        "turbo": (diffusers.EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}, 1, 0.0),
        "lightning-2": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, 2, 0.0),
        "lightning-4": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, 4, 0.0),
        "lightning-8": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, 8, 0.0),
        "hyper-1": (diffusers.TCDScheduler, {}, 1, 1.0),
        "hyper-8": (diffusers.DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}, 8, 0.0),
        "lcm": (diffusers.LCMScheduler, {}, 4, 0.0),
    }[preset]
    chosen = PRESETS[preset]
    config = SchedulerConfig()
    scheduler = cls.from_config(oracle("euler", config).config, **options)
    scheduler.register_to_config(set_alpha_to_one=False)
    if cls is diffusers.DDIMScheduler:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    expected = reference(scheduler, steps, monkeypatch, eta=eta)
    sampler = make_sampler(chosen["sampler"], config, **chosen["sampler_options"])
    assert chosen["guidance_scale"] == 0 and chosen["num_inference_steps"] == steps
    assert error(ours(sampler, steps), expected) <= TOLERANCE


def test_ddim_final_alpha_of_one(monkeypatch):
    config = SchedulerConfig(set_alpha_to_one=True)
    assert error(ours(make_sampler("ddim", config), 5), reference(oracle("ddim", config), 5, monkeypatch)) <= TOLERANCE


@pytest.mark.parametrize("name", ORACLES)
def test_image_to_image(name, monkeypatch):
    """The first steps are skipped: noise to the level of the first kept one, and multistep memory begins there."""
    config, sample = SchedulerConfig(), draws(3)[2]
    for steps, start in ((9, 5), (20, 15)):
        expected = reference(oracle(name, config), steps, monkeypatch, start=start, sample=sample)
        assert error(ours(make_sampler(name, config), steps, start, sample), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ORACLES)
def test_inpainting(name, monkeypatch):
    """Outside a mask the picture at the noise level reached takes the sample's place after each call."""
    config, sample, mask = SchedulerConfig(), draws(3)[2], (draws(4)[3] > 0).astype(np.float32)
    for steps, start in ((5, 2), (9, 3)):
        expected = reference(oracle(name, config), steps, monkeypatch, start=start, sample=sample, mask=mask)
        sampler = make_sampler(name, config)
        plan = sampler.plan(steps, start)
        noise = jnp.asarray(draws(1 + plan.num_calls))
        state = sampler.init(sampler.add_noise(jnp.asarray(sample), noise[0], plan))
        found = [state.sample]
        for i in range(plan.num_calls):
            row, following = ({key: column[j] for key, column in plan.rows.items()} for j in (i, min(i + 1, plan.num_calls - 1)))
            output = network(sampler.model_input(state, row), row["timestep"], jnp)
            state = sampler.step(state, output, row, noise[1 + i] if plan.needs_noise else None)
            kept = sampler.noised(jnp.asarray(sample), noise[0], following) if i + 1 < plan.num_calls else sample
            state = state._replace(sample=(1 - mask) * kept + mask * state.sample)
            found.append(state.sample)
        assert error(np.stack(found), expected) <= TOLERANCE


def test_lcm_with_another_solver(monkeypatch):
    config = SchedulerConfig()
    expected = reference(oracle("lcm", config, original_inference_steps=40, timestep_scaling=3.0), 8, monkeypatch)
    assert error(ours(make_sampler("lcm", config, original_inference_steps=40, timestep_scaling=3.0), 8), expected) <= TOLERANCE


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
def test_schedule_is_equal_bit_for_bit(beta_schedule):
    config = SchedulerConfig(beta_schedule=beta_schedule)
    ddim = oracle("ddim", config)
    np.testing.assert_array_equal(schedule.betas(config), ddim.betas.numpy())
    np.testing.assert_array_equal(schedule.alphas_cumprod(config), ddim.alphas_cumprod.numpy())
    # torch's vectorised square root is not always the nearest float32; numpy's is.
    np.testing.assert_allclose(schedule.noise_levels(config), ((1 - ddim.alphas_cumprod) / ddim.alphas_cumprod).sqrt().numpy(), rtol=1.2e-7)


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
def test_schedule_rescaled_to_zero_terminal_snr(beta_schedule):
    """Equal up to one last place of torch's square root, which 1 - ratio makes larger."""
    config = SchedulerConfig(beta_schedule=beta_schedule, rescale_betas_zero_snr=True)
    table = schedule.alphas_cumprod(config)
    assert table[-1] == 0
    np.testing.assert_allclose(table, oracle("ddim", config).alphas_cumprod.numpy(), rtol=1e-5)
    assert schedule.noise_levels(config)[-1] == pytest.approx(4096, rel=1e-6)


def test_forward_process_and_velocity():
    ddpm = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    clean, noise = draws(2)
    times = np.array([3, 981])
    alpha, sigma = parameterization.coefficients(schedule.alphas_cumprod(SchedulerConfig()), times, clean.ndim)
    arguments = torch.from_numpy(clean), torch.from_numpy(noise), torch.from_numpy(times)
    assert error(parameterization.add_noise(clean, noise, alpha, sigma), ddpm.add_noise(*arguments).numpy()) <= 1e-6
    assert error(parameterization.velocity(clean, noise, alpha, sigma), ddpm.get_velocity(*arguments).numpy()) <= 1e-6


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.7, 1.0])
def test_guidance_rescale(factor):
    uncond, cond = draws(2)
    guided = guidance.classifier_free(jnp.asarray(uncond), jnp.asarray(cond), 5.0)
    expected = torch.from_numpy(uncond) + 5.0 * (torch.from_numpy(cond) - torch.from_numpy(uncond))
    assert error(guided, expected.numpy()) <= 1e-6
    expected = rescale_noise_cfg(expected, torch.from_numpy(cond), factor)
    assert error(guidance.rescale(guided, jnp.asarray(cond), factor), expected.numpy()) <= 1e-6
