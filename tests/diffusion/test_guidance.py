"""Guidance and control windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.diffusion import by_branch, classifier_free, control_window, rescale


def pair(dtype: str = "float32") -> tuple[jax.Array, jax.Array]:
    values = np.random.default_rng(3).standard_normal((2, 2, 4, 4, 3))
    return jnp.asarray(values[0], dtype), jnp.asarray(values[1] * 2, dtype)


def test_classifier_free():
    uncond, cond = pair()
    np.testing.assert_allclose(classifier_free(uncond, cond, 5.0), 5 * cond - 4 * uncond, atol=1e-5)
    np.testing.assert_array_equal(classifier_free(uncond, cond, 0.0), uncond)
    np.testing.assert_allclose(classifier_free(uncond, cond, 1.0), cond, atol=1e-6)
    each = classifier_free(uncond, cond, jnp.array([0.0, 5.0])[:, None, None, None])
    np.testing.assert_array_equal(each[0], uncond[0])
    np.testing.assert_array_equal(each[1], classifier_free(uncond, cond, 5.0)[1])


def test_guidance_of_narrow_predictions_is_float32():
    guided = classifier_free(*pair("bfloat16"), 7.3)
    assert guided.dtype == jnp.float32
    np.testing.assert_array_equal(guided, classifier_free(*(a.astype(jnp.float32) for a in pair("bfloat16")), 7.3))


def test_guidance_by_branch():
    uncond, cond = pair()
    text = jnp.cos(uncond + cond)
    expected = uncond + 6.0 * (text - uncond) + 2.5 * (cond - text)
    np.testing.assert_allclose(by_branch(uncond, text, cond, 6.0, 2.5), expected, atol=1e-5)
    np.testing.assert_allclose(by_branch(uncond, text, cond, 1.0, 0.0), text, atol=1e-6)
    for compiled in (lambda f: f, jax.jit):
        for scale in (0.0, 1.0, 3.7, 7.5):
            np.testing.assert_array_equal(compiled(by_branch)(uncond, text, cond, scale, scale), compiled(classifier_free)(uncond, cond, scale))


def test_rescale():
    uncond, cond = pair()
    guided = classifier_free(uncond, cond, 6.0)
    np.testing.assert_array_equal(rescale(guided, cond, 0.0), guided)
    spread = jnp.std(rescale(guided, cond, 1.0), axis=(1, 2, 3))
    np.testing.assert_allclose(spread, jnp.std(cond, axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(rescale(guided, cond, 0.5), (guided + rescale(guided, cond, 1.0)) / 2, atol=1e-5)


def test_scale_and_factor_are_traced():
    traces = []

    @jax.jit
    def guide(uncond, cond, scale, factor):
        traces.append(scale)
        return rescale(classifier_free(uncond, cond, scale), cond, factor)

    uncond, cond = pair()
    flat = jnp.ones_like(cond)
    np.testing.assert_array_equal(guide(uncond, cond, 5.0, 0.0), jax.jit(classifier_free)(uncond, cond, 5.0))
    guide(uncond, cond, 2.0, 0.7)
    assert np.isfinite(guide(flat, flat, 2.0, 0.0)).all()  # a constant prediction has no spread to divide by
    assert len(traces) == 1


def test_control_window_is_the_published_rule():
    for steps in (1, 4, 7, 10, 30, 49, 50):
        for start, end in ((0.0, 1.0), (0.0, 0.3), (0.1, 0.6), (0.3, 0.7), (0.29, 0.58), (1 / 3, 2 / 3)):
            expected = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]
            window = control_window(steps, start, end)
            assert window.dtype == np.float32 and window.tolist() == expected


def test_control_window_ends_before_a_step_that_reaches_over():
    assert control_window(10, 0.0, 0.3).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert control_window(4, 0.0, 0.3).tolist() == [1, 0, 0, 0]
    assert control_window(4, 0.3, 1.0).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.6, 0.5), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_control_window_out_of_range(start, end):
    with pytest.raises(ValueError, match="0 <= start < end <= 1"):
        control_window(10, start, end)
