"""Figures against their definitions, written out as loops over resampled people."""

import numpy as np
import pytest

from instantid_jax.evaluation import statistics

PEOPLE = 9
SIMILARITY = np.round(np.random.default_rng(4).normal(size=(PEOPLE, PEOPLE)) + 0.8 * np.eye(PEOPLE), 1)  # rounded, so that some are equal
WEIGHTS = statistics.bootstrap(PEOPLE, resamples=150, seed=2)
ONES = np.ones((1, PEOPLE))


def spread(weights):
    """The people of one resample, as often as each was drawn."""
    return np.repeat(np.arange(PEOPLE), weights.astype(int))


def loop_auc(s, people):
    wins = games = 0.0
    for i in people:
        for j in people:
            for k in people:
                if j != k:
                    wins += (s[i, i] > s[j, k]) + 0.5 * (s[i, i] == s[j, k])
                    games += 1
    return wins / games


def test_resamples_draw_as_many_people():
    assert WEIGHTS.shape == (150, PEOPLE) and (WEIGHTS.sum(1) == PEOPLE).all()
    np.testing.assert_array_equal(WEIGHTS, statistics.bootstrap(PEOPLE, resamples=150, seed=2))


def test_same_and_other_are_their_definitions():
    same, other = statistics.same(SIMILARITY)(WEIGHTS), statistics.other(SIMILARITY)(WEIGHTS)
    for row, weights in enumerate(WEIGHTS):
        people = spread(weights)
        assert same[row] == pytest.approx(np.mean([SIMILARITY[i, i] for i in people]))
        assert other[row] == pytest.approx(np.mean([SIMILARITY[i, j] for i in people for j in people if i != j]))


def test_auc_is_its_definition():
    drawn = statistics.auc(SIMILARITY)(WEIGHTS)
    for row in range(0, 150, 10):
        assert drawn[row] == pytest.approx(loop_auc(SIMILARITY, spread(WEIGHTS[row])))
    assert statistics.auc(np.eye(4))(np.ones((1, 4)))[0] == 1
    assert statistics.auc(1 - np.eye(4))(np.ones((1, 4)))[0] == 0
    assert statistics.auc(np.zeros((4, 4)))(np.ones((1, 4)))[0] == 0.5


def test_mean_leaves_out_what_does_not_count():
    values = np.array([1.0, np.nan, 3.0])
    drawn = statistics.mean(values)(np.array([[1.0, 5.0, 1.0], [0.0, 1.0, 2.0], [0.0, 3.0, 0.0]]))
    np.testing.assert_array_equal(drawn, [2.0, 3.0, np.nan])


def test_median_counts_failures_as_worst():
    values = np.array([0.1, 0.3, np.nan, 0.2])
    weights = np.array([[1.0, 1, 1, 1], [1, 1, 0, 1], [1, 0, 3, 0], [0, 1, 1, 2]])
    np.testing.assert_allclose(statistics.median(values)(weights), [0.25, 0.2, np.inf, 0.25])
    rounds = np.random.default_rng(0).normal(size=PEOPLE)
    np.testing.assert_allclose(statistics.median(rounds)(WEIGHTS), [np.median(rounds[spread(w)]) for w in WEIGHTS])


def test_interval_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(1).normal(size=400)
    got = statistics.estimate(statistics.mean(values), statistics.bootstrap(400, resamples=4000))
    half = 1.96 * values.std() / 20
    assert got.value == pytest.approx(values.mean())
    assert got.value - got.low == pytest.approx(half, rel=0.06)
    assert got.high - got.value == pytest.approx(half, rel=0.06)


def test_intervals_hold_the_truth_as_often_as_they_say():
    random = np.random.default_rng(3)
    weights = statistics.bootstrap(60, resamples=400)
    held = 0
    for _ in range(300):
        got = statistics.estimate(statistics.mean(random.normal(size=60)), weights)
        held += got.low <= 0 <= got.high
    assert 0.90 <= held / 300 <= 0.98


def test_interval_of_infinite_medians():
    got = statistics.estimate(statistics.median(np.array([0.1, np.nan, np.nan])), statistics.bootstrap(3, resamples=200))
    assert got.value == np.inf and got.low == 0.1 and got.high == np.inf


def test_ranks():
    similarity = np.array([[0.9, 0.1, 0.5], [0.2, 0.3, 0.6], [0.1, 0.8, 0.5]])  # columns are pictures
    np.testing.assert_array_equal(statistics.ranks(similarity), [1, 2, 3])
    np.testing.assert_array_equal(statistics.ranks(np.ones((3, 3))), [3, 3, 3])


def test_proportion_is_wilsons():
    np.testing.assert_allclose(statistics.proportion(np.arange(100) < 95), [0.95, 0.8882, 0.9785], atol=1e-4)
    np.testing.assert_allclose(statistics.proportion(np.ones(100, bool)), [1.0, 0.9630, 1.0], atol=1e-4)
    np.testing.assert_allclose(statistics.proportion(np.zeros(100, bool)), [0.0, 0.0, 0.0370], atol=1e-4)
