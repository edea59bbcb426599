"""What is counted, and the guard's limit."""

import json
import types

import jax
import numpy as np
import pytest

from instantid_jax.training import meters
from instantid_jax.training.meters import LossGuard, Meters, memory_gib, peak_flops
from instantid_jax.training.step import Metrics


def row(loss=1.0, good=True, buckets=(2.0, 0.0), counts=(4, 0)):
    return Metrics(*map(np.asarray, (loss, loss / 2, 3.0, 0.1, good, np.array(buckets), np.array(counts), np.full(4, loss))))


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""
    now = types.SimpleNamespace(value=100.0)
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now.value)
    return now


def test_means_since_the_last_summary(clock):
    found = Meters(16)
    found.add(row(1.0, buckets=(2.0, 1.0), counts=(3, 1)), 8e12)
    found.add(row(3.0, buckets=(4.0, 0.0), counts=(4, 0)), 8e12)
    found.waited(1.0)
    clock.value += 4.0
    told = found.summary()
    assert (told["loss"], told["plain_loss"], told["gradient_norm"], told["learning_rate"]) == (2.0, 1.0, 3.0, 0.1)
    assert (told["images_per_second"], told["data_wait_share"], told["bad_steps"]) == (8.0, 0.25, 0)
    assert told["loss_by_noise"] == [6 / 7, 1.0]
    assert told["tflops_per_device"] == pytest.approx(16 / 4 / jax.device_count())
    assert found.summary() == {}
    json.dumps(told, allow_nan=False)


def test_what_is_no_training_does_not_slow_it(clock):
    found = Meters(16)
    found.add(row(), 0.0)
    with found.paused():
        clock.value += 100.0
    clock.value += 2.0
    assert found.summary()["images_per_second"] == 8.0


def test_a_bad_step_does_not_spoil_the_means(clock):
    found = Meters(4)
    found.add(row(np.nan, good=False, buckets=(np.nan, np.nan), counts=(2, 2)), 0.0)
    found.add(row(2.0), 0.0)
    clock.value += 1.0
    told = found.summary()
    assert told["loss"] == 2.0 and told["bad_steps"] == 1 and told["loss_by_noise"] == [0.5, None]


def test_share_of_the_peak(clock, monkeypatch):
    monkeypatch.setattr(meters, "peak_flops", lambda device: 1e12)
    found = Meters(4)
    found.add(row(), 2e12 * jax.device_count())
    clock.value += 4.0
    assert found.summary()["mfu"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kind", "peak"), [("TPU v5p", 459e12), ("TPU v5 lite", 197e12), ("TPU v4", 275e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)]
)
def test_peaks_by_name(kind, peak):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == peak  # pyright: ignore


def test_memory_is_of_this_process():
    assert 0.05 < memory_gib() < 1000


def test_the_limit_follows_losses_up_to_two_steps_before():
    guard = LossGuard(2.0)
    assert guard.limit(1) == np.inf
    guard.add(1, 1.0, True)
    assert guard.limit(2) == np.inf  # step 1 may not be known yet when step 2 starts
    guard.add(2, 3.0, True)
    assert guard.limit(3) == 2.0
    assert guard.limit(4) == pytest.approx(2 * (0.95 * 1.0 + 0.05 * 3.0))


def test_the_limit_does_not_depend_on_when_losses_were_fetched():
    early, late = LossGuard(3.0), LossGuard(3.0)
    losses = {1: 1.0, 2: 2.0, 3: 4.0}
    for step in (1, 2, 3):
        early.limit(step), late.limit(step)
        early.add(step, losses[step], True)
        if step > 1:
            late.add(step - 1, losses[step - 1], True)
    assert early.limit(4) == late.limit(4)


def test_bad_losses_do_not_count_and_good_ones_end_a_row():
    guard = LossGuard(2.0)
    guard.add(1, 1.0, True)
    guard.add(2, 99.0, False)
    guard.add(3, 98.0, False)
    assert guard.bad == 2 and guard.limit(9) == 2.0
    guard.add(9, 1.0, True)
    assert guard.bad == 0


def test_a_guard_survives_a_checkpoint():
    guard = LossGuard(2.0)
    for step, loss in enumerate([1.0, 2.0, 3.0], 1):
        guard.limit(step)
        guard.add(step, loss, step != 3)
    again = LossGuard(2.0)
    again.restore(json.loads(json.dumps(guard.state())))
    assert [again.limit(n) for n in (4, 5)] == [guard.limit(n) for n in (4, 5)] and again.bad == 1


def test_without_a_spike_there_is_no_limit():
    guard = LossGuard(None)
    guard.add(1, 1.0, True)
    assert guard.limit(9) == np.inf
