"""Checkpoints: what is read is what was written, to the bit, or a refusal that names it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.training.checkpoints import CheckpointError, Checkpoints
from instantid_jax.training.config import CheckpointConfig

EXTRA = {"data": {"position": 8}, "guard": {"mean": None, "recent": [], "bad": 0}, "config": "{}"}


def state(number: float = 0.0, **shapes):
    """A tree with the kinds of leaves that a run's state has."""
    rng = np.random.default_rng(3)
    return {
        "step": jnp.int32(number),
        "parameters": {"unet": {"kernel": jnp.asarray(rng.normal(size=shapes.get("kernel", (7, 5))), jnp.float32) + number}},
        "optimizer": [{"mu": jnp.asarray(rng.normal(size=(7, 5)), jnp.bfloat16)}, {"count": jnp.int32(4)}],
        "odd": jnp.asarray([np.nan, -0.0, np.inf, 1e-45], jnp.float32),
        "empty": {},
    }


def abstract(tree):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def bits(tree):
    return {jax.tree_util.keystr(path): (str(x.dtype), np.asarray(x).tobytes()) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def opened(folder, **fields):
    return Checkpoints(folder / "checkpoints", CheckpointConfig(**fields))


def saved(folder, *steps, **fields):
    """Checkpoints of these steps, written and closed."""
    checkpoints = opened(folder, **fields)
    for step in steps:
        checkpoints.save(step, state(step), EXTRA)
        checkpoints.wait()
    checkpoints.close()


@pytest.fixture
def like():
    return abstract(state())


def test_step_one_comes_back_to_the_bit(tmp_path, like):
    saved(tmp_path, 1)
    checkpoints = opened(tmp_path)
    found = checkpoints.restore(like)
    assert found.step == 1 and found.extra == EXTRA
    assert bits(found.state) == bits(state(1))
    checkpoints.close()


def test_nothing_is_no_checkpoint(tmp_path, like):
    checkpoints = opened(tmp_path)
    assert checkpoints.restore(like) is None
    with pytest.raises(CheckpointError, match="has no checkpoint of step 3; it has none"):
        checkpoints.restore(like, step=3)
    checkpoints.close()


def test_the_last_ones_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert opened(tmp_path).steps == [3, 4]


def test_the_best_are_kept_besides(tmp_path):
    checkpoints = opened(tmp_path, keep=1, keep_best=2)
    for step, value in enumerate([5.0, 1.0, 4.0, 2.0, 3.0, None], 1):
        checkpoints.save(step, state(step), EXTRA, value)
        checkpoints.wait()
    assert checkpoints.steps == [2, 4, 6]
    checkpoints.close()


def test_what_is_saved_may_be_overwritten_at_once(tmp_path, like):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    checkpoints, tree = opened(tmp_path), state(1)
    wanted = bits(tree)
    checkpoints.save(1, tree, EXTRA)
    overwrite(tree)
    assert bits(checkpoints.restore(like).state) == wanted
    checkpoints.close()


def test_an_old_one_goes_only_when_a_newer_one_is_complete(tmp_path):
    """At every removal or renaming within a complete checkpoint, a newer complete one is there."""
    folder, moments = tmp_path / "checkpoints", []

    def watch(event, arguments):
        if (moments and moments[0] == "off") or event not in ("os.remove", "os.rmdir", "os.rename", "shutil.rmtree"):
            return
        step = re.match(rf"{folder}/(\d+)(/|$)", os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else "")
        if step is not None:
            complete = {int(p.name) for p in folder.iterdir() if p.name.isdecimal() and (p / "commit_success.txt").is_file()}
            moments.append(max(complete - {int(step[1])}, default=0) > int(step[1]))

    sys.addaudithook(watch)  # it cannot be taken away, only silenced
    saved(tmp_path, 1, 2, 3, keep=1)
    found = list(moments)
    moments[:] = ["off"]
    assert opened(tmp_path).steps == [3]
    assert found and all(found)


DYING = """
import os, sys, pathlib
sys.path.insert(0, sys.argv[2])
from test_checkpoints import EXTRA, opened, state
import orbax.checkpoint._src.path.atomicity as atomicity
checkpoints = opened(pathlib.Path(sys.argv[1]), keep=1)
checkpoints.save(1, state(1), EXTRA); checkpoints.wait()
rename = os.rename
def die(*args, **kwargs):
    os.kill(os.getpid(), 9)
os.rename = os.replace = pathlib.Path.rename = pathlib.Path.replace = die
checkpoints.save(2, state(2), EXTRA); checkpoints.wait()
"""


def test_dying_before_the_last_rename_leaves_the_old_one(tmp_path, like):
    done = subprocess.run([sys.executable, "-c", DYING, str(tmp_path), str(Path(__file__).parent)], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    checkpoints = opened(tmp_path, keep=1)
    found = checkpoints.restore(like)
    assert found.step == 1 and bits(found.state) == bits(state(1))
    checkpoints.save(2, state(2), EXTRA)  # the torn one is not in the way
    checkpoints.wait()
    assert checkpoints.steps == [2]
    checkpoints.close()


def damage_cut(folder):
    for file in folder.rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)


def damage_missing(folder):
    for file in list(folder.rglob("d/*")):
        file.unlink()


def damage_metadata(folder):
    file = folder / "checkpoint_metadata.json"
    file = next(f for f in folder.rglob("*") if f.is_file() and b"sha256" in f.read_bytes())
    file.write_bytes(file.read_bytes().replace(b'position\\\\\\": 8', b'position\\\\\\": 9').replace(b'position\\": 8', b'position\\": 9'))


def damage_empty(folder):
    for file in [f for f in folder.rglob("*") if f.is_file()]:
        os.truncate(file, 0)


DAMAGES = [damage_cut, damage_missing, damage_metadata, damage_empty]


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_previous_used_only_when_asked(tmp_path, like, damage, capsys):
    saved(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints" / "2"
    damage(folder)
    checkpoints = opened(tmp_path)
    with pytest.raises(CheckpointError, match=rf"checkpoint {folder} is damaged \(.*--resume-damaged previous goes on from step 1"):
        checkpoints.restore(like)
    assert checkpoints.steps == [1, 2]  # nothing was touched
    found = checkpoints.restore(like, damaged="previous")
    assert found.step == 1 and bits(found.state) == bits(state(1))
    said = capsys.readouterr().out
    assert f"checkpoint {folder} is damaged" in said and "going on from step 1" in said
    assert checkpoints.steps == [1] and (tmp_path / "set_aside" / "2-1").is_dir()
    checkpoints.save(2, state(2), EXTRA)
    checkpoints.wait()
    assert bits(checkpoints.restore(like).state) == bits(state(2))
    checkpoints.close()


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_flipped_bit_goes_unnoticed(tmp_path, like):
    """Each file of a checkpoint, a bit in three places: refused, or of no effect on what is read."""
    saved(tmp_path / "whole", 1)
    files = sorted(f.relative_to(tmp_path / "whole") for f in (tmp_path / "whole").rglob("*") if f.is_file())
    refused = 0
    for file in files:
        for number, share in enumerate((0.1, 0.5, 0.9)):
            folder = tmp_path / f"{file.name}-{number}"
            shutil.copytree(tmp_path / "whole", folder)
            content = bytearray((folder / file).read_bytes())
            content[int(share * len(content))] ^= 1 << number
            (folder / file).write_bytes(bytes(content))
            try:
                checkpoints = opened(folder)
                found = checkpoints.restore(like)
            except CheckpointError as problem:
                assert str(folder) in str(problem)
                refused += 1
            else:
                assert bits(found.state) == bits(state(1)) and found.extra == EXTRA, file
            shutil.rmtree(folder)
    assert refused >= 6


def wrapped(problem):
    """As Orbax passes on what its handlers raise."""
    error = KeyError("Failed to load checkpointable")
    error.__cause__ = problem
    return error


def out_of_memory():
    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")


def broken_disk():
    return OSError(5, "Input/output error")


@pytest.mark.parametrize(("make", "wrap"), [(make, wrap) for make in (MemoryError, out_of_memory, broken_disk) for wrap in (False, True)])
@pytest.mark.parametrize("method", ["metadata", "load"])
def test_what_a_healthy_one_may_meet_is_not_damage(tmp_path, like, monkeypatch, make, wrap, method):
    saved(tmp_path, 1, 2)
    checkpoints = opened(tmp_path)

    def fail(*_):
        raise wrapped(make()) if wrap else make()

    monkeypatch.setattr(type(checkpoints._orbax), method, fail)
    with pytest.raises(type(make())):
        checkpoints.restore(like, damaged="previous")
    monkeypatch.undo()
    assert checkpoints.steps == [1, 2] and checkpoints.restore(like).step == 2
    checkpoints.close()


@pytest.mark.parametrize("damaged", ["stop", "previous"])
@pytest.mark.parametrize("how", ["raised", "wrapped", "swallowed"])
def test_one_that_may_not_be_read_is_not_damaged(tmp_path, like, monkeypatch, how, damaged):
    """Whether Orbax passes the refusal on, wraps it or keeps it to itself. Root may read all, so permission is played."""
    saved(tmp_path, 1, 2)
    checkpoints = opened(tmp_path)
    file = tmp_path / "checkpoints" / "2" / "state" / "manifest.ocdbt"
    assert file.is_file()

    def load(*_):
        refusal = PermissionError(13, "Permission denied", str(file))
        raise {"raised": refusal, "wrapped": wrapped(refusal), "swallowed": KeyError("Failed to load")}[how]

    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != str(file) and access(path, mode))
    monkeypatch.setattr(type(checkpoints._orbax), "load", load)
    with pytest.raises(CheckpointError, match=rf"^checkpoint .*/2 is not this user's to read: permission denied for {file}; change its"):
        checkpoints.restore(like, damaged=damaged)
    assert checkpoints.steps == [1, 2]
    checkpoints.close()


def test_a_leaf_in_another_s_place_is_damage(tmp_path, like, monkeypatch):
    """Files that are whole, but not what was saved."""
    saved(tmp_path, 1)
    checkpoints = opened(tmp_path)
    load = type(checkpoints._orbax).load

    def swapped(self, step, wanted):
        arrays = dict(load(self, step, wanted))
        arrays["parameters/unet/kernel"] = arrays["parameters/unet/kernel"].at[2, 2].add(1e-6)
        return arrays

    monkeypatch.setattr(type(checkpoints._orbax), "load", swapped)
    with pytest.raises(CheckpointError, match=r"damaged \(parameters/unet/kernel is not what was saved\)"):
        checkpoints.restore(like)
    checkpoints.close()


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_only_one_damaged_is_never_a_fresh_start(tmp_path, like):
    saved(tmp_path, 1)
    damage_cut(tmp_path / "checkpoints" / "1")
    checkpoints = opened(tmp_path)
    for damaged in ("stop", "previous"):
        with pytest.raises(CheckpointError, match=r"1 is damaged \(.*\); move it elsewhere to begin anew"):
            checkpoints.restore(like, damaged=damaged)
    checkpoints.close()


def test_going_back_sets_later_ones_aside(tmp_path, like, capsys):
    saved(tmp_path, 1, 2, 3, keep=3)
    checkpoints = opened(tmp_path, keep=3)
    assert checkpoints.restore(like, step=1).step == 1
    assert checkpoints.steps == [1]
    assert re.search(r"moved the later checkpoints of steps 2, 3 to .*set_aside", capsys.readouterr().out)
    checkpoints.save(2, state(2), EXTRA)
    checkpoints.close()
    with pytest.raises(CheckpointError, match="has no checkpoint of step 3; it has 1, 2"):
        opened(tmp_path).restore(like, step=3)


def test_one_of_another_architecture_gives_a_diff(tmp_path):
    saved(tmp_path, 1)
    other = state(kernel=(7, 6))
    other["optimizer"][1]["nu"] = jnp.zeros(3)
    del other["odd"]
    checkpoints = opened(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(abstract(other), damaged="previous")
    text = str(caught.value)
    assert "is of another model, stage or optimizer" in text
    assert "only in the checkpoint: odd (4,)" in text and "only in this run: optimizer/1/nu (3,)" in text
    assert "parameters/unet/kernel: (7, 5) float32 in the checkpoint, (7, 6) float32 in this run" in text
    assert checkpoints.steps == [1]
    checkpoints.close()


def test_a_step_is_written_once(tmp_path):
    checkpoints = opened(tmp_path)
    checkpoints.save(1, state(1), EXTRA)
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=r"checkpoint .*/1 cannot be written"):
        checkpoints.save(1, state(2), EXTRA)
    checkpoints.close()


def test_a_full_disk_leaves_the_earlier_ones(tmp_path, like):
    """RLIMIT_FSIZE stops the writing as a full disk does."""
    saved(tmp_path, 1)
    code = (
        "import resource, sys, pathlib, signal; sys.path.insert(0, sys.argv[2])\n"
        "import numpy as np, jax.numpy as jnp\n"
        "from test_checkpoints import EXTRA, opened, state\n"
        "from instantid_jax.training.checkpoints import CheckpointError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "checkpoints = opened(pathlib.Path(sys.argv[1]))\n"
        "big = state(2) | {'big': jnp.asarray(np.random.default_rng(0).normal(size=(300, 1000)), jnp.float32)}\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    checkpoints.save(2, big, EXTRA); checkpoints.wait()\n"
        "except CheckpointError as problem:\n    print(problem)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)], capture_output=True, text=True, check=False)
    assert "earlier checkpoints are untouched" in done.stdout, done.stdout + done.stderr
    checkpoints = opened(tmp_path)
    assert bits(checkpoints.restore(like).state) == bits(state(1))
    checkpoints.close()


def test_a_folder_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be used for checkpoints"):
        opened(tmp_path)
