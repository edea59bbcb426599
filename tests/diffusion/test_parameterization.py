"""Conversions between what networks predict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.config import SchedulerConfig
from instantid_jax.diffusion import alphas_cumprod, parameterization

TIMES = np.array([1, 500, 999])


def example() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    clean, noise = jnp.asarray(np.random.default_rng(5).standard_normal((2, 3, 4, 4, 2)), jnp.float32)
    alpha, sigma = parameterization.coefficients(alphas_cumprod(SchedulerConfig()), TIMES, clean.ndim)
    return clean, noise, alpha, sigma, parameterization.add_noise(clean, noise, alpha, sigma)


def test_coefficients():
    _, _, alpha, sigma, _ = example()
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)
    np.testing.assert_allclose((sigma / alpha).ravel(), [0.0413145, 1.6182797, 14.6146469], rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_target_leads_back_to_picture_and_noise(prediction_type):
    clean, noise, alpha, sigma, x = example()
    output = parameterization.target(prediction_type, clean, noise, alpha, sigma)
    np.testing.assert_allclose(parameterization.x0(prediction_type, x, output, alpha, sigma), clean, atol=1e-5)
    np.testing.assert_allclose(parameterization.epsilon(prediction_type, x, output, alpha, sigma), noise, atol=1e-6)


def test_targets():
    clean, noise, alpha, sigma, _ = example()
    np.testing.assert_array_equal(parameterization.target("epsilon", clean, noise, alpha, sigma), noise)
    np.testing.assert_allclose(parameterization.target("v_prediction", clean, noise, alpha, sigma), alpha * noise - sigma * clean, atol=1e-6)


def test_everything_is_float32():
    clean, noise, alpha, sigma, x = (a.astype(jnp.bfloat16) for a in example())
    for made in (
        parameterization.add_noise(clean, noise, alpha, sigma),
        parameterization.target("epsilon", clean, noise, alpha, sigma),
        parameterization.x0("v_prediction", x, noise, alpha, sigma),
        parameterization.epsilon("epsilon", x, noise, alpha, sigma),
    ):
        assert made.dtype == jnp.float32


def test_unknown_prediction_type():
    clean, noise, alpha, sigma, _ = example()
    for function in (parameterization.x0, parameterization.epsilon, parameterization.target):
        with pytest.raises(ValueError, match="'sample' is unknown; use one of epsilon, v_prediction"):
            function("sample", clean, noise, alpha, sigma)
