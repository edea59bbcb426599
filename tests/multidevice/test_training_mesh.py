"""One device, eight simulated devices and two processes train alike; what one saved, another goes on with."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("training_worker.py")
# Compiling less well takes half as long, and rounds as any other order of sums does.
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2)}


def start(out, weights, mesh, devices, steps=4, **fields):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICKLY}"}
    argument = json.dumps({"out": str(out), "weights": str(weights), "mesh_shape": mesh, "steps": steps, **fields})
    return subprocess.Popen(
        [sys.executable, str(WORKER), argument], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes):
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)


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
        by_share = {tuple(told["share"]): told["order"] for told in self.processes}
        parts = [by_share[share] for share in sorted(by_share)]
        return [[index for row in rows for index in row] for rows in zip(*parts, strict=True)]

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
    finish(start(out, weights, (1, 1, 1), 8, bad=[5]))
    return Told(out)


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_are_one(name, one, weights, tmp_path):
    finish(start(tmp_path / "run", weights, MESHES[name], 8, bad=[5]))
    told = Told(tmp_path / "run")
    assert told.order == one.order
    assert [row["samples"] for row in told.bad] == [row["samples"] for row in one.bad] == [[5]]
    assert (told.processes[0]["split"] > 0.5) == (name in ("fsdp", "mixed"))
    told.alike(one)


def denoise(tmp_path, names, part="whole"):
    weights = small.write_weights(tmp_path / "weights", small.PARTS[part]("unused", "unused"))
    finish(start(tmp_path / "one", weights, (1, 1, 1), 8, steps=2, part=part))
    for name in names:
        finish(start(tmp_path / name, weights, MESHES[name], 8, steps=2, part=part))
        told = Told(tmp_path / name)
        assert (told.processes[0]["split"] > 0.1) == (name != "data")
        told.alike(Told(tmp_path / "one"))


def test_an_adapter_on_a_mixed_mesh_is_one_on_one_device(tmp_path):
    denoise(tmp_path, ["mixed"], "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_instantid_on_every_mesh_is_instantid_on_one_device(name, tmp_path):
    denoise(tmp_path, [name])


@pytest.mark.parametrize(("first", "second"), [("fsdp", "mixed"), pytest.param("mixed", "data", marks=pytest.mark.slow)])
def test_a_run_goes_on_upon_another_mesh(first, second, one, weights, tmp_path):
    finish(start(tmp_path / "run", weights, MESHES[first], 8, bad=[5]))
    before = Told(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    finish(start(tmp_path / "run", weights, MESHES[second], 8, bad=[5]))
    after = Told(tmp_path / "run")
    assert after.order == before.order[2:] == one.order[2:]
    after.alike(one)


def port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def two_processes(out, weights, mesh, steps=4):
    address = f"localhost:{port()}"
    finish(*(start(out, weights, mesh, 2, steps, bad=[5], processes=2, process=p, coordinator=address) for p in (0, 1)))
    return Told(out)


def test_two_processes_are_one_and_one_goes_on_with_what_two_saved(one, weights, tmp_path):
    two = two_processes(tmp_path / "two", weights, (2, 2, 1))
    assert len(two.processes) == 2 and [tuple(told["share"]) for told in two.processes] == [(0, 2), (1, 2)]
    assert two.order == one.order
    assert [row["samples"] for row in two.bad] == [[5]]
    two.alike(one)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "4")
    (tmp_path / "two" / "told-1.json").unlink()
    finish(start(tmp_path / "two", weights, (1, 1, 1), 1, bad=[5]))
    again = Told(tmp_path / "two")
    assert again.order == one.order[2:]
    again.alike(one)


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_saved(one, weights, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(one.out, out)
    shutil.rmtree(out / "checkpoints" / "4")
    two = two_processes(out, weights, (1, 2, 2))  # both processes feed half of the batch
    assert two.order == one.order[2:]
    two.alike(one)
