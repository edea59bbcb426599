"""A batch drawn by several processes together is the batch that one draws."""

from pathlib import Path

import launched
import numpy as np
import pytest

WORKER = Path(__file__).with_name("sampling_worker.py")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "one.npz"
    launched.finish(launched.start(WORKER, {"out": str(out)}, 1))
    return dict(np.load(out))


def drawn(out, count, mesh, **more):
    argument = {"out": str(out), "mesh": mesh, "alone": False, **more}
    launched.finish(*(launched.start(WORKER, argument, 2, **place) for place in launched.places(count)))
    return dict(np.load(out))


@pytest.mark.parametrize(
    ("count", "mesh"), [(2, {"dcn_data": 2, "fsdp": 2}), pytest.param(4, {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow)]
)
def test_processes_draw_what_one_draws(count, mesh, one, tmp_path):
    many = drawn(tmp_path / "many.npz", count, mesh)
    assert one["devices"] == 1 and many["devices"] == 2 * count
    mine, theirs = (np.round(told["images"] * 255).astype(int) for told in (many, one))
    assert mine.shape == (4, 64, 64, 3) and mine.std() > 10
    assert np.abs(mine - theirs).max() <= 1 and (mine != theirs).mean() <= 1e-3


@pytest.mark.slow
def test_processes_that_all_watch_draw_the_same(one, tmp_path):
    """A watched run is a program a step, which every process starts."""
    mesh = {"dcn_data": 2, "fsdp": 2}
    watched, unwatched = drawn(tmp_path / "watched.npz", 2, mesh, watched=True), drawn(tmp_path / "many.npz", 2, mesh)
    assert watched["seen"] == 2 and unwatched["seen"] == 0
    assert np.abs(watched["images"] - unwatched["images"]).max() < 1e-5
    assert np.abs(watched["images"] - one["images"]).max() < 1.5 / 255
