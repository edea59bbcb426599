"""The samplers' interface: names, plans, dtypes, noise, and one compilation for any values. Numbers against diffusers are in parity/."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.config import SchedulerConfig
from instantid_jax.diffusion import SAMPLERS, Plan, SamplerError, make_sampler

SDXL = SchedulerConfig()
SHAPE = (2, 3, 3, 4)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def run(sampler, plan: Plan, sample: jax.Array, noise: jax.Array, network) -> jax.Array:
    def body(state, inputs):
        row, z = inputs
        output = network(sampler.model_input(state, row), row)
        return sampler.step(state, output, row, z if plan.needs_noise else None), None

    return jax.lax.scan(body, sampler.init(sample), (plan.rows, noise))[0].sample


def test_names():
    assert list(SAMPLERS) == ["euler", "euler_a", "heun", "ddim", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "unipc", "lcm", "tcd"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_a_value(name):
    assert make_sampler(name, SDXL) == make_sampler(name, SchedulerConfig())
    assert hash(make_sampler(name, SDXL)) == hash(make_sampler(name, SchedulerConfig()))
    assert make_sampler(name, SDXL) != make_sampler(name, SchedulerConfig(steps_offset=0))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_perfect_network_finds_the_picture(name, prediction_type):
    """A network that always knows x_0 must lead there, whatever the noise: at the last call every sampler trusts x_0 (almost) alone."""
    sampler = make_sampler(name, SchedulerConfig(prediction_type=prediction_type))
    plan, picture = sampler.plan(6), normal(0, *SHAPE)

    def network(x, row):
        epsilon = (x - row["alpha"] * picture) / row["sigma"]
        return epsilon if prediction_type == "epsilon" else row["alpha"] * epsilon - row["sigma"] * picture

    result = run(sampler, plan, normal(1, *SHAPE) * plan.init_noise_sigma, normal(2, plan.num_calls, *SHAPE), network)
    np.testing.assert_allclose(result, picture, atol=0.15 if name in ("ddim", "tcd") else 1e-5)  # these end at sigma_0 = 0.029


@pytest.mark.parametrize("name", SAMPLERS)
def test_other_values_compile_nothing(name):
    traces = []

    @jax.jit
    def sample(plan, x, noise):
        traces.append(plan.num_calls)
        return run(sampler, plan, x, noise, lambda x, row: jnp.tanh(x + row["timestep"] / 1000))

    sampler = make_sampler(name, SDXL)
    plans = [sampler.plan(6), make_sampler(name, SchedulerConfig(steps_offset=0, timestep_spacing="trailing")).plan(6), sampler.plan(8, start=2)]
    assert {plan.num_calls for plan in plans} == {plans[0].num_calls}
    noise = normal(0, plans[0].num_calls, *SHAPE)
    results = [sample(plan, normal(1, *SHAPE), noise) for plan in plans]
    assert len(traces) == 1
    assert np.isfinite(results).all() and (np.asarray(results[0]) != np.asarray(results[2])).any()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_arithmetic_is_float32_whatever_the_sample(name, dtype):
    sampler = make_sampler(name, SDXL)
    plan = sampler.plan(4)
    row = {key: jnp.asarray(column[0]) for key, column in plan.rows.items()}
    x, output, z = (normal(seed, *SHAPE).astype(dtype) for seed in range(3))
    state = sampler.init(x)
    assert sampler.model_input(state, row).dtype == dtype
    narrow = sampler.step(state, output, row, z if plan.needs_noise else None)
    assert jax.tree.map(jnp.shape, narrow) == jax.tree.map(jnp.shape, state)
    assert [a.dtype for a in narrow] == [a.dtype for a in state] and narrow.sample.dtype == dtype
    wide = sampler.step(sampler.init(x.astype(jnp.float32)), output.astype(jnp.float32), row, z.astype(jnp.float32) if plan.needs_noise else None)
    np.testing.assert_array_equal(narrow.sample, wide.sample.astype(dtype))


def test_steps_of_the_calls():
    plan = make_sampler("heun", SDXL).plan(4)
    assert plan.steps == (0, 0, 1, 1, 2, 2, 3) and plan.num_calls == 7 and plan.num_steps == 4
    kept = make_sampler("heun", SDXL).plan(4, start=2)
    assert kept.steps == (0, 0, 1) and kept.num_steps == 2
    assert kept.rows["timestep"].tolist() == plan.rows["timestep"][4:].tolist()
    assert kept.init_noise_sigma == plan.init_noise_sigma
    assert make_sampler("unipc", SDXL).plan(5, start=2).steps == (0, 1, 2)


def test_memory_begins_at_the_first_kept_step():
    full, kept = (make_sampler("unipc", SDXL).plan(20, start).rows for start in (0, 5))
    assert full["lookback"][0] == 0 and full["lookback"][5] > 0 and kept["lookback"][0] == 0
    assert full["correct"][5] == 1 and kept["correct"].tolist() == [0.0] + [1.0] * 14


@pytest.mark.parametrize("name", SAMPLERS)
def test_add_noise_then_model_input_has_the_forward_process(name):
    sampler = make_sampler(name, SDXL)
    plan, picture, noise = sampler.plan(10, start=4), normal(0, *SHAPE), normal(1, *SHAPE)
    row = {key: column[0] for key, column in plan.rows.items()}
    seen = sampler.model_input(sampler.init(sampler.add_noise(picture, noise, plan)), row)
    np.testing.assert_allclose(seen, row["alpha"] * picture + row["sigma"] * noise, atol=1e-6)


def test_which_samplers_need_noise():
    assert [name for name in SAMPLERS if make_sampler(name, SDXL).plan(4).needs_noise] == ["euler_a", "dpmpp_2m_sde", "lcm", "tcd"]
    assert make_sampler("ddim", SDXL, eta=0.5).plan(4).needs_noise and not make_sampler("tcd", SDXL, eta=0.0).plan(4).needs_noise
    sampler = make_sampler("euler_a", SDXL)
    row = {key: column[0] for key, column in sampler.plan(4).rows.items()}
    with pytest.raises(SamplerError, match="needs noise"):
        sampler.step(sampler.init(normal(0, *SHAPE)), normal(1, *SHAPE), row, None)


def test_options():
    assert make_sampler("euler", SDXL, karras=True) == make_sampler("euler", SchedulerConfig(), karras=True)
    assert make_sampler("dpmpp_2m", SDXL, karras=True) == make_sampler("dpmpp_2m_karras", SDXL)
    assert make_sampler("lcm", SDXL, original_inference_steps=40).plan(40).num_calls == 40


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eulr", {}, "did you mean 'euler'"),
        ("dpm++2m_karas", {}, "did you mean 'dpmpp_2m_karras'"),
        ("heun", {"kerras": True}, "did you mean 'karras'"),
        ("ddim", {"karras": True}, "no option 'karras'.*Its options: eta"),
        ("dpmpp_2m_karras", {"karras": False}, "no option 'karras'"),
        ("euler_a", {"eta": 1.0}, "Its options: timestep_spacing$"),
        ("tcd", {"timestep_spacing": "trailing"}, "Its options: eta, original_inference_steps"),
    ],
)
def test_wrong_names(name, options, message):
    with pytest.raises(SamplerError, match=message):
        make_sampler(name, SDXL, **options)


@pytest.mark.parametrize("start", [-1, 4, 5])
def test_start_outside_the_run(start):
    with pytest.raises(SamplerError, match=r"start=.* must be in 0\.\.3"):
        make_sampler("euler", SDXL).plan(4, start)


def test_the_last_noise_level_is_an_option():
    old = SchedulerConfig(final_sigmas_type="sigma_min")
    for name in ("euler", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "unipc"):
        assert make_sampler(name, SDXL, final_sigmas_type="sigma_min") == make_sampler(name, old) != make_sampler(name, SDXL)
    assert make_sampler("unipc", old, final_sigmas_type="zero") == make_sampler("unipc", SDXL)
    with pytest.raises(SamplerError, match="no option 'final_sigmas_type'"):
        make_sampler("heun", SDXL, final_sigmas_type="zero")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("euler", {"karras": 3}, "option 'karras' of sampler 'euler' must be True or False, not 3"),
        ("euler", {"final_sigmas_type": "min"}, "must be 'zero' or 'sigma_min', not 'min'"),
        ("ddim", {"eta": "x"}, "must be a number from 0 to 1, not 'x'"),
        ("ddim", {"eta": float("nan")}, "must be a number from 0 to 1"),
        ("lcm", {"original_inference_steps": 2.5}, "must be a whole number, at least 1, not 2.5"),
        ("lcm", {"timestep_scaling": 0}, "must be a number above 0, not 0"),
        ("euler", {"timestep_spacing": "tailing"}, "must be 'leading', 'trailing' or 'linspace', not 'tailing'"),
    ],
)
def test_wrong_values_of_options(name, options, message):
    with pytest.raises(SamplerError, match=message):
        make_sampler(name, SDXL, **options)


def test_epsilon_at_pure_noise_is_refused():
    config = SchedulerConfig(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(SamplerError, match="pure noise"):
        make_sampler("ddim", config).plan(4)
