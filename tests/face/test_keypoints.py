import sys
from pathlib import Path

import numpy as np
import pytest

from instantid_jax.face import KEYPOINT_COLORS, AnalyzerError, KeypointError, PhotoError, draw_kps
from instantid_jax.face.keypoints import keypoints_outside

GOLDEN = Path(__file__).parents[1] / "golden" / "dev" / "golden.npz"
KPS = np.array([[100.7, 120.2], [180.4, 118.9], [141.5, 160.1], [110.0, 200.6], [170.3, 201.7]], np.float32)


def test_equals_the_picture_of_the_published_code():
    with np.load(GOLDEN) as golden:
        np.testing.assert_array_equal(np.asarray(draw_kps((128, 128), golden["kps"])), golden["kps_image"])


def test_discs_have_full_colour_and_sticks_sixty_percent():
    picture = np.asarray(draw_kps((300, 280), KPS))
    assert picture.shape == (280, 300, 3)
    for (x, y), color in zip(KPS.astype(int), KEYPOINT_COLORS, strict=True):
        assert tuple(picture[y, x]) == color
        assert tuple(picture[y, x + 10]) == color
    halfway = KPS[[0, 2]].mean(axis=0).astype(int)
    assert tuple(picture[halfway[1], halfway[0]]) == (153, 0, 0)
    assert set(np.unique(picture)) == {0, 153, 255}


def test_discs_sit_on_truncated_positions():
    exact, floored, rounded_up = (np.asarray(draw_kps((300, 280), kps)) == 255 for kps in (KPS, np.floor(KPS), np.ceil(KPS)))
    np.testing.assert_array_equal(exact, floored)
    assert not np.array_equal(exact, rounded_up)


def test_where_sticks_cross_the_later_one_is_on_top():
    # Seen from the side: both eyes, and both mouth corners, lie nearly in one line with the nose.
    profile = np.array([[20, 20], [30, 20], [100, 100], [30, 180], [20, 180]], np.float32)
    picture = np.asarray(draw_kps((200, 200), profile))
    assert tuple(picture[60, 62]) == (0, 153, 0)
    assert tuple(picture[140, 62]) == (153, 0, 153)


def test_points_outside_are_drawn_where_they_are():
    moved = KPS - np.array([130, 0], np.float32)
    assert keypoints_outside(moved, (300, 280)) == 2
    inside = np.asarray(draw_kps((300, 280), moved))
    wider = np.asarray(draw_kps((300, 280), KPS))
    # The same drawing seen through a window 130 pixels to the right; the border of the window decides nothing.
    np.testing.assert_array_equal(inside[:, 12:150], wider[:, 142:280])


@pytest.mark.parametrize(
    ("kps", "code"),
    [
        (KPS + 1000, "keypoints_outside"),
        (np.full((5, 2), np.nan), "keypoints_not_finite"),
        (KPS[:3], "keypoints_shape"),
        (np.vstack([KPS[:4], [[1e30, 0]]]), "keypoints_outside"),
    ],
)
def test_unusable_keypoints_are_refused(kps, code):
    with pytest.raises(KeypointError) as caught:
        draw_kps((300, 280), kps)
    assert caught.value.code == code


def test_unusable_size_and_colors_are_refused():
    with pytest.raises(PhotoError, match="at least 1 x 1"):
        draw_kps((0, 10), KPS)
    with pytest.raises(KeypointError, match="five colors"):
        draw_kps((300, 280), KPS, [(1, 2, 3)])


def test_an_opencv_that_cannot_be_imported_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(AnalyzerError, match="opencv-python-headless") as caught:
        draw_kps((300, 280), KPS)
    assert caught.value.code == "no_opencv"
