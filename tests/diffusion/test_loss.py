"""Training losses and their weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.config import SchedulerConfig
from instantid_jax.diffusion import alphas_cumprod, loss, parameterization

BAR = jnp.asarray(alphas_cumprod(SchedulerConfig())[[1, 300, 700, 999]])


def arrays(count: int = 2) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(1).standard_normal((count, 4, 3, 3, 2)), jnp.float32)


def test_squared_error():
    a, b = arrays()
    np.testing.assert_allclose(loss.squared_error(a, b), np.square(np.asarray(a) - np.asarray(b)).mean((1, 2, 3)), rtol=1e-6)
    assert loss.squared_error(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)).dtype == jnp.float32


def test_mask_picks_places_and_has_no_scale():
    a, b = arrays()
    mask = jnp.zeros((4, 3, 3, 1)).at[:, 1, 2].set(7.0)
    np.testing.assert_allclose(loss.squared_error(a, b, mask), np.square(np.asarray(a) - np.asarray(b))[:, 1, 2].mean(-1), rtol=1e-6)
    np.testing.assert_allclose(loss.squared_error(a, b, jnp.full((4, 3, 3, 1), 0.2)), loss.squared_error(a, b), rtol=1e-6)


def test_weighted_mean():
    errors = jnp.array([1.0, 2.0, 3.0, 6.0])
    assert float(loss.weighted_mean(errors)) == 3
    assert float(loss.weighted_mean(errors, jnp.array([0.0, 2.0, 0.0, 0.0]))) == 1


def test_min_snr():
    snr = np.asarray(BAR / (1 - BAR), np.float64)
    np.testing.assert_allclose(loss.min_snr_weight("epsilon", BAR), np.minimum(snr, 5) / snr, rtol=1e-5)
    np.testing.assert_allclose(loss.min_snr_weight("v_prediction", BAR), np.minimum(snr, 5) / (snr + 1), rtol=1e-4)
    np.testing.assert_allclose(loss.min_snr_weight("epsilon", BAR, 1.0), np.minimum(snr, 1) / snr, rtol=1e-5)
    with pytest.raises(ValueError, match="'sample' is unknown"):
        loss.min_snr_weight("sample", BAR)


def test_weights_at_pure_noise_are_finite():
    nothing = jnp.zeros(1)
    assert float(loss.min_snr_weight("epsilon", nothing)[0]) == 1
    assert float(loss.min_snr_weight("v_prediction", nothing)[0]) == 0
    assert float(loss.clipped_v_weight(nothing)[0]) == 8


def test_clipped_v_weight_makes_the_noise_loss_the_v_loss():
    clean, noise, wrong = arrays(3)
    bar = jnp.array([0.9, 0.5, 0.2, 0.126])[:, None, None, None]
    alpha, sigma = jnp.sqrt(bar), jnp.sqrt(1 - bar)
    x = parameterization.add_noise(clean, noise, alpha, sigma)
    implied = parameterization.x0("epsilon", x, wrong, alpha, sigma)
    as_v = loss.squared_error(parameterization.velocity(implied, wrong, alpha, sigma), parameterization.velocity(clean, noise, alpha, sigma))
    np.testing.assert_allclose(loss.clipped_v_weight(bar.ravel()) * loss.squared_error(wrong, noise), as_v, rtol=1e-5)
    assert loss.clipped_v_weight(jnp.array([0.01]), 8.0).tolist() == [8.0]
