import numpy as np
import pytest

from instantid_jax.face import ARCFACE_TEMPLATE, KeypointError, align, umeyama
from instantid_jax.face.align import check_keypoints

KPS = np.array([(420, 380), (560, 372), (498, 460), (440, 545), (556, 538)], np.float32)


def test_umeyama_equals_the_known_matrix():
    expected = [[0.247329340, -0.0115189000, -61.0652226], [0.0115189000, 0.247329340, -47.3229374]]
    np.testing.assert_allclose(umeyama(KPS, ARCFACE_TEMPLATE), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_umeyama_recovers_any_similarity_and_never_reflects(seed):
    rng = np.random.default_rng(seed)
    angle, scale, shift = rng.uniform(-np.pi, np.pi), rng.uniform(0.1, 5), rng.uniform(-300, 300, 2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    source = rng.uniform(0, 500, (5, 2))
    found = umeyama(source, source @ (scale * rotation).T + shift)
    np.testing.assert_allclose(found, np.hstack([scale * rotation, shift[:, None]]), atol=1e-8 * 300)
    mirrored = umeyama(source, source * [-1, 1])
    assert np.linalg.det(mirrored[:, :2]) > 0


def test_coinciding_keypoints_are_refused():
    with pytest.raises(KeypointError, match="one place") as caught:
        umeyama(np.full((5, 2), 7.0), ARCFACE_TEMPLATE)
    assert caught.value.code == "keypoints_degenerate"


def test_a_crop_that_is_already_aligned_stays_as_it_is():
    crop = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    np.testing.assert_array_equal(align(crop, ARCFACE_TEMPLATE), crop)


def test_outside_of_the_photo_is_black():
    white = np.full((112, 112, 3), 255, np.uint8)
    shifted = align(white, ARCFACE_TEMPLATE - [56, 0])
    assert shifted[:, :50].max() == 0
    assert shifted[:, 60:].min() == 255


@pytest.mark.parametrize(
    ("kps", "code"),
    [
        (np.zeros((4, 2)), "keypoints_shape"),
        (np.zeros((5, 3)), "keypoints_shape"),
        ([["a", "b"]] * 5, "keypoints_shape"),
        (np.full((5, 2), np.nan), "keypoints_not_finite"),
        (np.where(np.eye(5, 2) > 0, np.inf, KPS), "keypoints_not_finite"),
    ],
)
def test_unusable_keypoints_are_named(kps, code):
    with pytest.raises(KeypointError, match=r"^face 3: ") as caught:
        check_keypoints(kps, "face 3")
    assert caught.value.code == code


def test_keypoints_keep_their_precision():
    assert check_keypoints(KPS).dtype == np.float32
    assert check_keypoints(KPS.astype(int).tolist()).dtype == np.float64
