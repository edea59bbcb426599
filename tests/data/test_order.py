"""The global order: every record once an epoch, whatever the batch and the buckets, and computable at any place alone."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantid_jax.data.order import BatchOrder, Buckets, permute, pick, uniform
from instantid_jax.data.record import DataError


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 100, 1000, 4097])
def test_permute_is_a_permutation(count):
    assert sorted(permute(i, count, 5) for i in range(count)) == list(range(count))


def test_permutations_differ_by_seed_epoch_and_stream():
    rows = [[permute(i, 1000, *key) for i in range(1000)] for key in [(0,), (1,), (0, 1), (0, 0, 1), (0, 1, 1)]]
    for a in range(len(rows)):
        for b in range(a):
            equal = np.count_nonzero(np.array(rows[a]) == rows[b])
            assert equal <= 10, (a, b, equal)  # chance gives 1
    correlation = np.corrcoef(np.arange(1000), rows[0])[0, 1]
    assert abs(correlation) < 0.1


def test_permute_is_even():
    """Each of 6 places gets each of 6 values about equally often over 6000 epochs."""
    counts = np.zeros((6, 6), int)
    for epoch in range(6000):
        for i in range(6):
            counts[i, permute(i, 6, 3, epoch)] += 1
    assert counts.min() > 850 and counts.max() < 1150  # 1000 expected, five standard deviations are 144


def test_the_order_is_pinned():
    """A changed order would make resumed runs see some records twice and others never."""
    assert [permute(i, 10, 7) for i in range(10)] == [5, 4, 6, 0, 3, 9, 8, 1, 7, 2]
    assert uniform(1, 2, 3) == 0.814259011529328
    assert permute(123_456_789, 60_000_000_000, 7, 3) == 4075994944


def test_uniform_is_uniform_and_independent():
    draws = np.array([[uniform(0, k, purpose) for purpose in range(4)] for k in range(20_000)])
    assert draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(draws.mean(axis=0), 0.5, atol=0.011)  # five standard errors
    np.testing.assert_allclose(draws.var(axis=0), 1 / 12, atol=0.004)
    correlations = np.corrcoef(draws.T) - np.eye(4)
    assert np.abs(correlations).max() < 0.036
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.036
    assert {pick(3, 0, k, 0) for k in range(100)} == {0, 1, 2}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 16), st.integers(0, 3))
def test_every_record_once_an_epoch_of_its_bucket(counts, batch, seed):
    if not sum(counts):
        return
    assignment = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    order = BatchOrder(Buckets(assignment, len(counts)), batch, seed)
    for cycle in range(1, 4):
        steps = sum(cycle * n // batch for n in counts)  # equation (1) of the module
        seen = np.zeros(len(assignment), int)
        for step in range(steps):
            rows = [order.index(step * batch + r) for r in range(batch)]
            assert (assignment[rows] == order.bucket(step)).all()
            np.add.at(seen, rows, 1)
        for bucket, n in enumerate(counts):
            times = seen[assignment == bucket]
            expected = cycle * n // batch * batch
            assert times.sum() == expected and (not n or times.max() - times.min() <= 1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=2, max_size=4), st.integers(1, 16))
def test_buckets_take_turns_in_proportion(counts, batch):
    order = BatchOrder(Buckets(np.repeat(np.arange(len(counts)), counts), len(counts)), batch, 0)
    steps = 4 * sum(counts) // batch + 1
    taken = np.bincount([order.bucket(step) for step in range(steps)], minlength=len(counts))
    np.testing.assert_allclose(taken, steps * np.array(counts) / sum(counts), atol=max(counts) / batch + len(counts))


def test_one_bucket_does_not_depend_on_the_batch():
    a, b = (BatchOrder(Buckets(np.zeros(50, int), 1), batch, 4) for batch in (4, 10))
    assert [a.index(k) for k in range(200)] == [b.index(k) for k in range(200)]


def test_records_without_a_bucket_are_left_out_and_none_is_an_error():
    buckets = Buckets(np.array([-1, 0, 1, -1, 1]), 2)
    assert buckets.counts.tolist() == [1, 2] and [buckets.member(1, r) for r in range(2)] == [2, 4] and buckets.member(0, 0) == 1
    with pytest.raises(DataError, match="no record to train on"):
        BatchOrder(Buckets(np.array([-1, -1]), 2), 4, 0)


def test_far_positions_cost_nothing():
    """Position ten to the twelve of sixty million records: no list is built, and the place is found at once."""

    class Many(Buckets):
        def __init__(self):
            self.counts = np.array([40_000_000, 19_999_999, 1])

        def member(self, bucket, rank):
            assert 0 <= rank < self.counts[bucket]
            return bucket

    order = BatchOrder(Many(), 96, 1)
    assert order.index(10**12) in (0, 1, 2)
    again = pickle.loads(pickle.dumps(BatchOrder(Buckets(np.zeros(9, int), 1), 3, 1)))
    assert [again.index(k) for k in range(9)] == [BatchOrder(Buckets(np.zeros(9, int), 1), 3, 1).index(k) for k in range(9)]
