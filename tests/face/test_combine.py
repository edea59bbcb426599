"""Several photos of one person as one embedding."""

import itertools
from typing import Any

import numpy as np
import pytest

from instantid_jax.face import EmbeddingError, combine_embeddings, interpolate_embeddings

RNG = np.random.default_rng(0)
PERSON = RNG.standard_normal(64)
PHOTOS = np.stack([PERSON + 0.3 * RNG.standard_normal(64) for _ in range(5)])
STRANGER = RNG.standard_normal(64) * 2


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_mean_and_a_weighted_mean() -> None:
    np.testing.assert_allclose(combine_embeddings(PHOTOS).embedding, PHOTOS.mean(axis=0), rtol=1e-12)
    found = combine_embeddings(PHOTOS[:2], "mean", [3, 1])
    np.testing.assert_allclose(found.embedding, 0.75 * PHOTOS[0] + 0.25 * PHOTOS[1], rtol=1e-12)
    assert found.weights.tolist() == [0.75, 0.25]
    assert found.similarities == pytest.approx([cosine(*PHOTOS[:2])] * 2)


def test_normalised_photos_count_alike_whatever_their_length() -> None:
    lengths = np.linalg.norm(PHOTOS[:2], axis=1)
    longer = combine_embeddings(PHOTOS[:2] * [[1], [9]], "normalised").embedding
    plain = combine_embeddings(PHOTOS[:2], "normalised").embedding
    assert cosine(longer, plain) == pytest.approx(1)
    np.testing.assert_allclose(plain, (PHOTOS[0] / lengths[0] + PHOTOS[1] / lengths[1]) / 2 * lengths.mean(), rtol=1e-12)
    assert cosine(combine_embeddings(PHOTOS[:2] * [[1], [9]]).embedding, PHOTOS[1]) > 0.99


def test_a_stranger_among_the_photos_is_left_out() -> None:
    mixed = np.concatenate([PHOTOS[:2], STRANGER[None], PHOTOS[2:]])
    found = combine_embeddings(mixed, "trimmed")
    assert found.weights.tolist() == pytest.approx([0.2, 0.2, 0, 0.2, 0.2, 0.2])
    np.testing.assert_allclose(found.embedding, PHOTOS.mean(axis=0), rtol=1e-12)
    assert found.similarities.argmin() == 2 and found.similarities[2] < 0.3 < 0.8 < np.delete(found.similarities, 2).min()
    np.testing.assert_array_equal(combine_embeddings(PHOTOS, "trimmed").weights, np.full(5, 0.2))
    assert combine_embeddings(mixed[1:3], "trimmed").weights.tolist() == [0.5, 0.5]  # of two nobody can say which


def test_a_single_photo_is_itself() -> None:
    for how in ("mean", "normalised", "trimmed"):
        found = combine_embeddings(PHOTOS[:1], how)
        np.testing.assert_allclose(found.embedding, PHOTOS[0], rtol=1e-12)
        assert np.isnan(found.similarities).all()


@pytest.mark.parametrize(
    ("how", "weights", "message"),
    [
        ("median", None, "combined by mean, normalised, trimmed, not 'median'"),
        ("mean", [1, 2], "each of 5 photos needs one weight above 0"),
        ("mean", [1, 1, 1, 1, 0], "weight above 0"),
        ("mean", [1, 1, 1, 1, np.nan], "weight above 0"),
    ],
)
def test_wrong_ways_are_refused(how: Any, weights: Any, message: str) -> None:
    with pytest.raises(EmbeddingError, match=message):
        combine_embeddings(PHOTOS, how, weights)


# --- from one person to another


def test_the_ends_are_the_people_and_the_middle_lies_between() -> None:
    points = np.stack([PERSON, STRANGER, PHOTOS[0]])
    for how in ("linear", "spherical"):
        found = interpolate_embeddings(points, 5, how)
        np.testing.assert_allclose(found[[0, 2, 4]], points, rtol=1e-5, atol=1e-6)
        assert found.dtype == np.float32
    np.testing.assert_allclose(interpolate_embeddings(points, 5)[1], (PERSON + STRANGER) / 2, rtol=1e-5, atol=1e-6)


def test_the_arc_has_even_angles_and_lengths() -> None:
    found = interpolate_embeddings(np.stack([PERSON, STRANGER]), 9, "spherical").astype(np.float64)
    angles = [np.arccos(cosine(a, b)) for a, b in itertools.pairwise(found)]
    np.testing.assert_allclose(angles, np.arccos(cosine(PERSON, STRANGER)) / 8, rtol=1e-3)
    lengths = np.linalg.norm(found, axis=1)
    np.testing.assert_allclose(lengths, np.linspace(np.linalg.norm(PERSON), np.linalg.norm(STRANGER), 9), rtol=1e-5)
    straight = interpolate_embeddings(np.stack([PERSON, STRANGER]), 3)
    assert np.linalg.norm(straight[1]) < lengths[4]
    np.testing.assert_allclose(interpolate_embeddings(np.stack([PERSON, 2 * PERSON]), 3, "spherical")[1], 1.5 * PERSON, rtol=1e-5)


@pytest.mark.parametrize(
    ("points", "count", "how", "message"),
    [
        (PHOTOS[:1], 3, "linear", "needs two embeddings"),
        (PHOTOS[:2], 1, "linear", "two places"),
        (PHOTOS[:2], 3, "cubic", "linear or spherical, not 'cubic'"),
        (np.stack([PERSON, -PERSON]), 3, "spherical", "opposite directions"),
    ],
)
def test_wrong_interpolations_are_refused(points: Any, count: int, how: Any, message: str) -> None:
    with pytest.raises(EmbeddingError, match=message):
        interpolate_embeddings(points, count, how)
