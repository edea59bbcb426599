"""In which order a training run sees its records: a function of seed, data-set size and global batch, and of nothing else.

The records of one aspect bucket form an endless stream: a permutation of all of them, then another, and so on. Every record of
the bucket appears once an epoch. A global batch is the next `global_batch` records of one bucket's stream. Over one cycle e, in
which N records are due, bucket b with n_b records contributes

    floor((e + 1) n_b / G) - floor(e n_b / G)                                                                          (1)

batches, in a permuted sequence, so buckets take turns in proportion to their size, no record is left out and none is padded.

Permutations are Feistel networks with cycle walking (Black and Rogaway 2002): any place can be computed alone, with no memory.
They are written out here so that a run resumed with newer libraries goes on in the same order.
"""

from __future__ import annotations

import functools

import numpy as np

from instantid_jax.data.record import DataError

__all__ = ["CAPTION", "CROP_X", "CROP_Y", "DROP", "OTHER", "REFERENCE", "BatchOrder", "Buckets", "permute", "pick", "uniform", "uniforms"]

DROP, CAPTION, REFERENCE, OTHER, CROP_Y, CROP_X = range(6)
"""What a number is drawn for at a position: the `purpose` of `uniform`."""

_MASK = (1 << 64) - 1
_ROUNDS = 6


def _mix(x: int) -> int:
    """A 64-bit integer stirred (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _hash(*values: int) -> int:
    """64 bits that depend on all the values and their order."""
    state = 0
    for value in values:
        state = _mix(state ^ (value & _MASK))
    return state


def uniform(seed: int, position: int, purpose: int) -> float:
    """A number in [0, 1) that belongs to one purpose at one position of one run."""
    return (_hash(seed, position, purpose) >> 11) * 2.0**-53


def uniforms(seed: int, positions: np.ndarray, purpose: int) -> np.ndarray:
    """`uniform` at many positions at once: float64 of their shape."""
    state = _mixes(np.uint64(_mix(seed & _MASK)) ^ positions.astype(np.uint64))
    return (_mixes(state ^ np.uint64(purpose)) >> np.uint64(11)) * 2.0**-53


def _mixes(x: np.ndarray) -> np.ndarray:
    """`_mix` of an array of uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pick(count: int, seed: int, position: int, purpose: int) -> int:
    """A number in ``range(count)`` for one purpose at one position. `count` is at least 1."""
    return min(int(uniform(seed, position, purpose) * count), count - 1)


@functools.lru_cache(maxsize=1024)
def _round_keys(seed: int, epoch: int, stream: int) -> tuple[int, ...]:
    return tuple(_hash(seed, epoch, stream, r) for r in range(_ROUNDS))


def permute(index: int, count: int, seed: int, epoch: int = 0, stream: int = 0) -> int:
    """Where a permutation of ``range(count)`` sends `index`; another permutation for every (seed, epoch, stream)."""
    if not 0 <= index < count:
        raise IndexError(f"index {index} is not in range({count})")
    bits = max((count - 1).bit_length(), 2)
    high_bits = bits // 2
    low_bits = bits - high_bits
    keys = _round_keys(seed, epoch, stream)
    while True:  # fewer than two rounds on average, as the domain is less than twice as large
        a, b, bits_a, bits_b = index >> low_bits, index & ((1 << low_bits) - 1), high_bits, low_bits
        for key in keys:
            a, b = b, (a + _mix(b ^ key)) & ((1 << bits_a) - 1)
            bits_a, bits_b = bits_b, bits_a
        index = (a << low_bits) | b
        if index < count:
            return index


class Buckets:
    """Which records are in which bucket, as two arrays and not as lists: 4 or 8 bytes a record."""

    def __init__(self, assignment: np.ndarray, count: int) -> None:
        """`assignment` [n] holds each record's bucket number below `count`; negative ones are in none."""
        assignment = np.asarray(assignment)
        self.counts = np.bincount(assignment[assignment >= 0], minlength=count).astype(np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        if count == 1 and self.counts[0] == len(assignment):
            self._members = None  # all records in their own order
        else:
            order = np.argsort(assignment, kind="stable")[len(assignment) - int(self.counts.sum()) :]
            self._members = order.astype(np.int32 if len(assignment) < 2**31 else np.int64)

    def member(self, bucket: int, rank: int) -> int:
        """The data-set index of record number `rank` of a bucket."""
        return rank if self._members is None else int(self._members[self._starts[bucket] + rank])


class BatchOrder:
    """Which record stands at which position of the global order.

    Position k is row ``k % global_batch`` of global batch ``k // global_batch``. With a single bucket the order does not
    depend on the batch size.
    """

    def __init__(self, buckets: Buckets, global_batch: int, seed: int) -> None:
        """Raises `DataError` where no bucket holds a record."""
        self._buckets, self._batch, self._seed = buckets, global_batch, seed
        self._counts = [int(n) for n in buckets.counts]
        self._total = sum(self._counts)
        if not self._total:
            raise DataError("there is no record to train on: the data set is empty or none of its records falls into a bucket")
        self._occupied = [b for b, n in enumerate(self._counts) if n]
        self._plan = functools.lru_cache(maxsize=256)(self._find)

    def bucket(self, step: int) -> int:
        """The bucket of global batch number `step`."""
        return self._plan(step)[0]

    def index(self, position: int) -> int:
        """The data-set index of the record at `position`."""
        step, row = divmod(position, self._batch)
        bucket, number = self._plan(step)
        count = self._counts[bucket]
        epoch, place = divmod(number * self._batch + row, count)
        return self._buckets.member(bucket, permute(place, count, self._seed, epoch, bucket))

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_plan"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._plan = functools.lru_cache(maxsize=256)(self._find)

    def _batches(self, cycle: int, bucket: int) -> int:
        """Batches that a bucket contributes before `cycle`."""
        return cycle * self._counts[bucket] // self._batch

    def _before(self, cycle: int) -> int:
        return sum(self._batches(cycle, b) for b in self._occupied)

    def _find(self, step: int) -> tuple[int, int]:
        """(bucket, number of the batch within the bucket's stream) of a step, by equation (1)."""
        if len(self._occupied) == 1:
            return self._occupied[0], step
        cycle = step * self._batch // self._total  # never too late, as equation (1) rounds down
        while self._before(cycle + 1) <= step:
            cycle += 1
        first, end = self._before(cycle), self._before(cycle + 1)
        place = permute(step - first, end - first, self._seed, cycle, -1)
        for bucket in self._occupied:
            done = self._batches(cycle, bucket)
            share = self._batches(cycle + 1, bucket) - done
            if place < share:
                return bucket, done + place
            place -= share
        raise AssertionError("a cycle's batches are the sum of its buckets' batches")
