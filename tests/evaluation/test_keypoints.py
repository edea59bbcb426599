"""The keypoint error in distances between the eyes."""

import numpy as np
import pytest

from instantid_jax.evaluation.keypoints import normalized_mean_error

ASKED = np.array([[[20, 30], [40, 30], [30, 40], [24, 50], [36, 50]]], float)


def test_error_is_in_eye_distances():
    moved = ASKED + np.array([3.0, 4.0])
    assert normalized_mean_error(moved, ASKED)[0] == pytest.approx(5 / 20)
    one = ASKED.copy()
    one[0, 2, 0] += 10
    assert normalized_mean_error(one, ASKED)[0] == pytest.approx(10 / 20 / 5)
    assert normalized_mean_error(one * 3, ASKED * 3)[0] == pytest.approx(0.1)


def test_what_was_not_found_is_nan():
    assert np.isnan(normalized_mean_error(np.full_like(ASKED, np.nan), ASKED)[0])


def test_refuses():
    with pytest.raises(ValueError, match=r"\[n, 5, 2\]"):
        normalized_mean_error(ASKED[:, :4], ASKED[:, :4])
    with pytest.raises(ValueError, match="in one place"):
        normalized_mean_error(ASKED, np.zeros_like(ASKED))
