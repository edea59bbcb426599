"""Keypoints of a head from the angles that it is seen at."""

import numpy as np
import pytest

from instantid_jax.face import ARCFACE_TEMPLATE, FACE_POINTS, KeypointError, View, read_view, umeyama, view_keypoints


def seen(**angles: float) -> np.ndarray:
    return view_keypoints(View(**angles), 0.1, (0.5, 0.4), (1000, 1000)).astype(np.float64)


def test_from_the_front_it_is_the_recognisers_template() -> None:
    points = seen()
    np.testing.assert_allclose(points[:2], [[450, 400], [550, 400]], atol=1e-3)
    moved = np.c_[points, np.ones(5)] @ umeyama(points, ARCFACE_TEMPLATE).T
    assert np.abs(moved - ARCFACE_TEMPLATE).max() < 0.03 * 35.2  # 3 % of an eye distance


def test_turns_go_where_they_say() -> None:
    front = seen()
    right, up, leaning = seen(yaw=30), seen(pitch=20), seen(roll=90)
    assert right[2, 0] > front[2, 0] + 20 and seen(yaw=-30)[2, 0] < front[2, 0] - 20
    assert right[1, 0] - right[0, 0] == pytest.approx(100 * np.cos(np.radians(30)), rel=1e-4)
    assert up[2, 1] < front[2, 1] and seen(pitch=-20)[2, 1] > front[2, 1] + 5
    np.testing.assert_allclose(leaning[:2], [[500, 350], [500, 450]], atol=1e-3)  # clockwise: the right eye goes down
    np.testing.assert_allclose(seen(roll=30)[:2].mean(0), [500, 400], atol=1e-3)


def test_all_three_turns_are_one_rotation() -> None:
    points = seen(yaw=25, pitch=-15, roll=40)
    flat = (points - [500, 400]) / 100
    # Three points that are not in one plane with the origin decide a linear map; a rotation's first two rows are orthonormal.
    rows = np.linalg.lstsq(FACE_POINTS, flat, rcond=None)[0].T
    np.testing.assert_allclose(rows @ rows.T, np.eye(2), atol=1e-5)


def test_scale_and_place() -> None:
    points = view_keypoints(View(scale=2, x=0.25, y=0.5), 0.1, (0.5, 0.4), (2000, 1000))
    np.testing.assert_allclose(points[:2], [[400, 500], [600, 500]], atol=1e-3)


def test_views_are_read_from_text() -> None:
    assert read_view("yaw=30, pitch=-10,roll=5.5,scale=1.2,x=0.5,y=0.4") == View(30, -10, 5.5, 1.2, 0.5, 0.4)
    for text in ("yaw", "yaw=x", "yow=3", "", "yaw=nan", "yaw=1;2"):
        with pytest.raises(KeypointError, match="a view is written as yaw=30,pitch=-10"):
            read_view(text)
    for text, message in (("yaw=91", "yaw of a view must be between -90 and 90, not 91"), ("scale=0", "scale of a view must be between 0.1 and 4")):
        with pytest.raises(KeypointError, match=message):
            read_view(text)
