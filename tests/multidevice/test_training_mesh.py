"""One device, eight simulated devices, two and four processes train alike; what one saved, another goes on with."""

import json
import shutil
from pathlib import Path

import launched
import numpy as np
import pytest
import small

WORKER = Path(__file__).with_name("training_worker.py")
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2)}


def start(out, weights, mesh, devices, steps=4, place=None, **fields):
    argument = {"out": str(out), "weights": str(weights), "mesh_shape": mesh, "steps": steps, "joined": place is not None, **fields}
    return launched.start(WORKER, argument, devices, **(place or {}))


class Told:
    """What a run left behind."""

    def __init__(self, out: Path):
        self.out = out
        self.processes = [json.loads((out / f"told-{p}.json").read_text()) for p in range(len(list(out.glob("told-*.json"))))]
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        self.train = {row["step"]: row for row in rows if row["kind"] == "train"}
        self.bad = [row for row in rows if row["kind"] == "bad_step"]
        with np.load(out / "state.npz") as content:
            self.state = dict(content)

    @property
    def order(self):
        """The records of every global batch, put together of the processes' parts."""
        steps = [np.full(24, -1) for _ in self.processes[0]["order"]]
        for told in self.processes:
            for step, rows in zip(steps, told["order"], strict=True):
                step[told["rows"]] = rows
        return [[int(index) for index in step if index >= 0] for step in steps]

    def alike(self, other, *, rtol=2e-6):
        """Losses and gradient norms to float32 rounding, the final state to what rounding becomes in some steps."""
        for step, row in self.train.items():
            for name, factor in (("loss", 1), ("gradient_norm", 20)):
                mine, theirs = float(row[name]), float(other.train[step][name])
                np.testing.assert_allclose(mine, theirs, rtol=factor * rtol, err_msg=f"{name} of step {step}")
        assert self.state.keys() == other.state.keys()
        for name, leaf in other.state.items():
            scale = max(float(np.abs(leaf).max()), 1e-3)
            np.testing.assert_allclose(self.state[name], leaf, rtol=0, atol=50 * rtol * scale, err_msg=name)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small.write_weights(tmp_path_factory.mktemp("mesh") / "weights", small.quick("unused", "unused"))


@pytest.fixture(scope="module")
def one(tmp_path_factory, weights):
    """One of eight devices; one record is bad."""
    out = tmp_path_factory.mktemp("one") / "run"
    launched.finish(start(out, weights, (1, 1, 1), 8, bad=[5]))
    return Told(out)


@pytest.mark.parametrize("name", ["mixed", *(pytest.param(name, marks=pytest.mark.slow) for name in MESHES if name != "mixed")])
def test_eight_devices_are_one(name, one, weights, tmp_path):
    launched.finish(start(tmp_path / "run", weights, MESHES[name], 8, bad=[5]))
    told = Told(tmp_path / "run")
    assert told.order == one.order
    assert [row["samples"] for row in told.bad] == [row["samples"] for row in one.bad] == [[5]]
    assert (told.processes[0]["split"] > 0.5) == (name in ("fsdp", "mixed"))
    told.alike(one)


def denoise(tmp_path, names, part="whole"):
    weights = small.write_weights(tmp_path / "weights", small.PARTS[part]("unused", "unused"))
    launched.finish(start(tmp_path / "one", weights, (1, 1, 1), 8, steps=2, part=part))
    for name in names:
        launched.finish(start(tmp_path / name, weights, MESHES[name], 8, steps=2, part=part))
        told = Told(tmp_path / name)
        assert (told.processes[0]["split"] > 0.1) == (name != "data")
        told.alike(Told(tmp_path / "one"))


@pytest.mark.slow
def test_an_adapter_on_a_mixed_mesh_is_one_on_one_device(tmp_path):
    denoise(tmp_path, ["mixed"], "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_instantid_on_every_mesh_is_instantid_on_one_device(name, tmp_path):
    denoise(tmp_path, [name])


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("fsdp", "mixed"), ("mixed", "data")])
def test_a_run_goes_on_upon_another_mesh(first, second, one, weights, tmp_path):
    launched.finish(start(tmp_path / "run", weights, MESHES[first], 8, bad=[5]))
    before = Told(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    launched.finish(start(tmp_path / "run", weights, MESHES[second], 8, bad=[5]))
    after = Told(tmp_path / "run")
    assert after.order == before.order[2:] == one.order[2:]
    after.alike(one)


def several(count, out, weights, mesh, steps=4, **about):
    launched.finish(*(start(out, weights, mesh, 2, steps, place, bad=[5], **about) for place in launched.places(count)))
    return Told(out)


def test_two_processes_are_one_and_one_goes_on_with_what_two_saved(one, weights, tmp_path):
    two = several(2, tmp_path / "two", weights, (1, 2, 1, 2))  # each process is a slice
    assert len(two.processes) == 2 and [told["rows"] for told in two.processes] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert two.order == one.order
    assert [row["samples"] for row in two.bad] == [[5]]
    two.alike(one)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "4")
    (tmp_path / "two" / "told-1.json").unlink()
    launched.finish(start(tmp_path / "two", weights, (1, 1, 1), 1, bad=[5]))
    again = Told(tmp_path / "two")
    assert again.order == one.order[2:]
    again.alike(one)


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_saved(one, weights, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(one.out, out)
    shutil.rmtree(out / "checkpoints" / "4")
    two = several(2, out, weights, (1, 2, 2))  # both processes feed half of the batch
    assert two.order == one.order[2:]
    two.alike(one)


@pytest.mark.slow
def test_four_processes_are_one_and_two_go_on_with_what_four_saved(one, weights, tmp_path):
    four = several(4, tmp_path / "four", weights, (1, 2, 1, 4))
    assert [told["rows"] for told in four.processes] == [[2 * i, 2 * i + 1] for i in range(4)]
    assert four.order == one.order
    four.alike(one)
    shutil.rmtree(tmp_path / "four" / "checkpoints" / "4")
    for i in (2, 3):
        (tmp_path / "four" / f"told-{i}.json").unlink()
    again = several(2, tmp_path / "four", weights, (1, 2, 2))
    assert again.order == one.order[2:]
    again.alike(one)


@pytest.mark.slow
def test_a_process_may_feed_rows_that_lie_apart(one, weights, tmp_path):
    two = several(2, tmp_path / "two", weights, (1, 4, 1), mixed_up=True)
    assert [told["rows"] for told in two.processes] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert two.order == one.order
    assert [row["samples"] for row in two.bad] == [[5]]
    two.alike(one)
