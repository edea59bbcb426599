"""The published schedule as numbers: SDXL's tables, and the times and levels that each sampler visits."""

import numpy as np
import pytest

from instantid_jax.config import SchedulerConfig
from instantid_jax.diffusion import SamplerError, make_sampler, schedule

SDXL = SchedulerConfig()
EULER_30 = """11.47685 9.54359 8.00431 6.76838 5.76777 4.95104 4.27900 3.72159 3.25559 2.86293 2.52949 2.24412 1.99802 1.78413 1.59683
1.43156 1.28462 1.15299 1.03417 0.92608 0.82697 0.73534 0.64986 0.56929 0.49241 0.41788 0.34393 0.26765 0.18217 0.04131"""


def columns(name: str, steps: int, **settings) -> tuple[np.ndarray, np.ndarray, float]:
    """Times, noise levels and initial sigma of a plan."""
    plan = make_sampler(name, SchedulerConfig(**settings)).plan(steps)
    return plan.rows["timestep"], plan.rows["sigma"] / plan.rows["alpha"], float(plan.init_noise_sigma)


@pytest.mark.parametrize(
    ("table", "values"),
    [
        (schedule.betas, {0: 0.00085, 1: 0.0008547, 499: 0.00480379, 500: 0.00481495, 998: 0.01198237, 999: 0.012}),
        (schedule.alphas_cumprod, {0: 0.99915, 1: 0.998296, 499: 0.27766943, 500: 0.27633247, 998: 0.0047167, 999: 0.00466009}),
        (schedule.noise_levels, {0: 0.0291675, 1: 0.0413145, 500: 1.6182797, 999: 14.6146469}),
    ],
)
def test_tables(table, values):
    got = table(SDXL)
    assert got.shape == (1000,) and got.dtype == np.float32
    np.testing.assert_allclose(got[list(values)], list(values.values()), rtol=3e-6)


@pytest.mark.parametrize(
    ("steps", "times", "first", "last", "initial"),
    [
        (4, [751, 501, 251, 1], (4.116698, 1.623693), (0.698399, 0.041314), 4.236414),
        (8, [876, 751, 626, 501, 376, 251, 126, 1], (7.371847, 4.116698), (0.402218, 0.041314), 7.439363),
        (10, list(range(901, 0, -100)), (8.390687, 5.134433), (0.346187, 0.041314), 8.450067),
        (20, list(range(951, 0, -50)), (11.028336, 8.390687), (0.228147, 0.041314), 11.073581),
        (25, list(range(961, 0, -40)), (11.67605, 9.338079), (0.201794, 0.041314), 11.718795),
        (30, list(range(958, 0, -33)), (11.476851, 9.543586), (0.182166, 0.041314), 11.520334),
        (50, list(range(981, 0, -20)), (13.120416, 11.67605), (0.141464, 0.041314), 13.158469),
    ],
)
def test_euler(steps, times, first, last, initial):
    got_times, levels, init = columns("euler", steps)
    assert got_times.tolist() == times
    np.testing.assert_allclose(levels[[0, 1, -2, -1]], [*first, *last], rtol=2e-5)
    assert init == pytest.approx(initial, rel=1e-6)


def test_euler_30_levels():
    np.testing.assert_allclose(columns("euler", 30)[1], np.array(EULER_30.split(), float), atol=6e-6)


def test_euler_ends_at_zero():
    assert make_sampler("euler", SDXL).plan(30).rows["ratio"][-1] == 0


def test_euler_karras_30():
    times, levels, init = columns("euler", 30, use_karras_sigmas=True)
    np.testing.assert_allclose(times[[0, 1, 2, 3, -3, -2, -1]], [958.0, 934.0721, 908.7943, 882.0246, 5.2045, 2.6009, 1.0], atol=1e-4)
    np.testing.assert_allclose(levels[[0, 1, 2, 3, -3, -2, -1]], [11.47685, 10.03129, 8.7447, 7.60221, 0.07318, 0.05531, 0.04131], atol=6e-6)
    assert init == pytest.approx(11.520334, rel=1e-6)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "unipc"])
@pytest.mark.parametrize(
    ("steps", "times", "first", "last"),
    [
        (20, list(range(941, 1, -47)), (10.425045, 8.08818, 6.380311), (0.332624, 0.22041)),
        (30, list(range(961, 1, -32)), (11.67605, 9.754844, 8.216094), (0.262845, 0.179259)),
    ],
)
def test_multistep(name, steps, times, first, last):
    got_times, levels, init = columns(name, steps)
    assert got_times.tolist() == times and init == 1
    np.testing.assert_allclose(levels[[0, 1, 2, -2, -1]], [*first, *last], rtol=3e-6)


def test_multistep_final_level():
    for setting, level in (("zero", 0.0), ("sigma_min", 0.0291675)):
        rows = make_sampler("dpmpp_2m", SchedulerConfig(final_sigmas_type=setting)).plan(20).rows
        after = level / np.sqrt(level**2 + 1)
        assert rows["decay"][-1] == pytest.approx(after / rows["sigma"][-1], rel=1e-5)


def test_multistep_karras_30():
    times, levels, init = columns("dpmpp_2m_karras", 30)
    assert times[:5].tolist() == [999, 975, 949, 923, 894] and times[-5:].tolist() == [11, 6, 3, 1, 0] and init == 1
    np.testing.assert_allclose(levels[[0, 1, 2, 3, -3, -2, -1]], [14.61465, 12.66061, 10.93493, 9.41492, 0.05636, 0.04086, 0.02917], atol=6e-6)


@pytest.mark.parametrize(
    ("steps", "times"),
    [
        (1, [999]),
        (2, [999, 499]),
        (4, [999, 759, 499, 259]),
        (5, [999, 799, 599, 399, 199]),
        (8, [999, 879, 759, 639, 499, 379, 259, 139]),
        (10, list(range(999, 0, -100))),
    ],
)
def test_lcm(steps, times):
    for spacing in ("leading", "trailing"):  # LCM has times of its own
        got, _, init = columns("lcm", steps, timestep_spacing=spacing)
        assert got.tolist() == times and init == 1


def test_lcm_boundary():
    rows = make_sampler("lcm", SDXL).plan(5).rows
    assert rows["timestep"][0] == 999 and rows["c_skip"][0] == pytest.approx(2.505e-9, rel=1e-3)
    assert rows["timestep"][-1] == 199 and rows["c_skip"][-1] == pytest.approx(6.313e-8, rel=1e-3)
    assert rows["c_out"][0] == pytest.approx(0.9999999987)
    assert rows["alpha_after"][-1] == 1 and rows["sigma_after"][-1] == 0


def test_ddim_and_heun_times():
    assert columns("ddim", 4)[0].tolist() == [751, 501, 251, 1]
    assert columns("heun", 4)[0].tolist() == [751, 501, 501, 251, 251, 1, 1]
    assert columns("heun", 4)[2] == pytest.approx(4.236414, rel=1e-6)


@pytest.mark.parametrize("steps", [61, 103, 999])
def test_trailing_spacing_gives_as_many_times_as_asked(steps):
    """`arange` with a fractional step may give one more, at time -1."""
    times = columns("euler", steps, timestep_spacing="trailing")[0]
    assert len(times) == steps and times[0] == 999 and times[-1] >= 0


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("euler", 0, "at least 1"),
        ("ddim", 1001, "more than the 1000"),
        ("euler", 1000, "steps_offset=1 leaves the times"),
        ("unipc", 1000, "more than the 999"),
        ("lcm", 51, "original_inference_steps"),
    ],
)
def test_impossible_numbers_of_steps(name, steps, message):
    with pytest.raises(SamplerError, match=message):
        make_sampler(name, SDXL).plan(steps)
