"""train.py as a newcomer meets it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parents[2]
RECIPE = """
import sys
sys.path.insert(0, {tests!r})
import small

def config():
    return small.quick("run", {weights!r}, steps=4)
"""
# The same command with records in memory: preparing a data set has its own tests.
WITH_RECORDS = """
import sys
sys.path.insert(0, {tests!r})
import small, train
from instantid_jax.training import run
source = small.source(24)
run.open_source = lambda *_: source
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    sys.path.insert(0, str(ROOT / "tests" / "training"))
    try:
        import small
    finally:
        sys.path.remove(str(ROOT / "tests" / "training"))
    return small.write_weights(tmp_path_factory.mktemp("cli") / "weights", small.quick("unused", "unused"))


@pytest.fixture
def recipe(tmp_path, monkeypatch, weights):
    """A recipe in the working folder."""
    (tmp_path / "mine.py").write_text(RECIPE.format(tests=str(ROOT / "tests" / "training"), weights=str(weights)))
    (tmp_path / "broken.py").write_text("def config():\n    return {}['x']")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", None)  # train.py sets it; this puts it back
    return "mine.py"


def command(*arguments):
    return [sys.executable, "-c", WITH_RECORDS.format(tests=str(ROOT / "tests" / "training")), *arguments]


def environment(folder):
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def test_sigterm_saves_and_the_same_command_goes_on(recipe, tmp_path):
    arguments = command("--config", recipe, "--steps", "100000", "--checkpoint.every", "100000", "--log.every", "1")
    with subprocess.Popen(arguments, env=environment(tmp_path / "cache"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("train 3:"):
                break
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
        process.send_signal(signal.SIGTERM)  # a second one harms nothing
        said = process.stdout.read()
    assert process.returncode == 75, said
    assert "stopped by signal 15 at step " in said
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name)
    assert step >= 3
    arguments = command("--config", recipe, "--steps", str(step + 2))
    done = subprocess.run(arguments, env=environment(tmp_path / "cache"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"training from step {step} to {step + 2}" in done.stdout and f"steps: 100000 is now {step + 2}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--config", "mime.py"], 2, "there is no recipe mime.py; there are configs/ablations/"),
        (["--config", "configs/portrait.py"], 2, "did you mean 'configs/portraits.py'"),
        ([], 2, "name a recipe: --config FILE; there are configs/ablations/"),
        (["--config", "mine.py", "--optimizer.lerning-rate", "1"], 2, "--optimizer.learning-rate"),
        (["--config", "mine.py", "--optimizer.name", "adamv"], 2, "adamw"),
        (["--config", "mine.py", "--steps", "0"], 2, "train.py: TrainConfig: steps must be at least 1, got 0"),
        (["--config", "mine.py", "--mesh.data", "2"], 1, "a mesh of 2 x 1 x 1 needs 2 devices; there are "),
        (["--config", "mine.py", "--loader.global-batch", "0"], 2, "LoaderConfig: global_batch must be at least 1, got 0"),
        (["--config", "mine.py", "--loader.keypoint-scale", "0.5"], 2, "train.py: TrainConfig: keypoints are drawn at model.keypoint_scale"),
        (["--config", "mine.py", "--init.weights", "nowhere"], 1, "train.py: there is no folder nowhere, which init.weights names"),
        (["--config", "mine.py", "--init.weights", "configs"], 1, "train.py: configs has no weights of vae"),
        (["--config", "mine.py", "--out", "mine.py"], 1, "train.py: --out mine.py: it is a file; name a folder"),
        (["--config", "broken.py"], 2, "train.py: broken.py, line 2: KeyError: 'x'"),
        (["--config", "mine.py", "--distributed"], 1, "train.py: the processes could not join ("),
        (["--config", "mine.py", "--process", "0"], 2, "train.py: --coordinator, --processes and --process go with --distributed"),
        (["--config", "mine.py", "--distributed", "--processes", "2"], 2, "name coordinator, number of processes and this process's number together"),
    ],
)
def test_mistakes_have_a_sentence_and_a_status(recipe, arguments, status, says, capsys):
    try:
        found = train.main(arguments)
    except SystemExit as stop:
        found = stop.code
    printed = capsys.readouterr()
    text = " ".join((printed.err + printed.out).replace("│", " ").split())
    assert found == status and says in text, text
    assert "Traceback" not in text


def test_help_explains_every_field(recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", recipe, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--optimizer.learning-rate" in text and "--dry-run" in text and "75 stopped by a signal with its state saved" in text


def test_help_without_a_recipe_says_how_to_get_it(capsys):
    assert train.main(["--help"]) == 0
    assert "python train.py --config FILE --help" in capsys.readouterr().out


def test_plans_of_two_kinds_are_refused(recipe, capsys):
    assert train.main(["--config", recipe, "--dry-run", "--aot", "v5e:1x1"]) == 2
    assert capsys.readouterr().err == "train.py: --aot and --dry-run are plans of different kinds; ask for one\n"


def test_a_dry_run_trains_nothing(recipe, capsys, tmp_path):
    assert train.main(["--config", recipe, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "FLOPs a step" in text and "memory a device" in text
    assert not (tmp_path / "run").exists()


def explained(capsys, *mesh):
    """(rows by path, MiB a device by what it is, whether something large stays whole) of the paper's recipe."""
    assert train.main(["--config", "configs/instantid.py", "--explain-sharding", *mesh]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["path", "shape", "partition", "bytes", "a", "device"]
    by_path = {row[1]: row for row in rows if row[0] in ("trained", "frozen") and len(row) > 4 and row[2][0].isdigit()}
    totals = {row[0].rstrip(":"): float(row[1].replace(",", "")) for row in rows if row[2:] == ["MiB", "a", "device"]}
    return by_path, totals, "not split over fsdp" in text


def test_where_every_weight_would_lie(capsys, recipe):
    rows, totals, whole = explained(capsys, "--mesh.data", "3", "--mesh.fsdp", "16")
    kernel = rows["identitynet/down_blocks/2/attentions/0/transformer_blocks/ff/net_0/proj/kernel"]
    assert kernel == ["trained", kernel[1], "10x1280x10240", "(None,", "None,", "'fsdp')", f"{10 * 1280 * 10240 * 4 // 16:,}"]
    assert rows["unet/conv_norm_out/scale"][3] == "replicated"
    assert totals.keys() == {"trained", "frozen", "optimizer"} and not whole
    # InstantID's three networks in float32; what is small is whole on every device.
    small = sum(int(row[-1].replace(",", "")) for row in rows.values() if row[0] == "trained" and row[3] == "replicated")
    assert small / 4 < 0.002 * 1_673_779_984
    assert totals["trained"] == pytest.approx(((1_673_779_984 * 4 - small) / 16 + small) / 2**20, abs=0.1)  # of a tenth of a MiB
    assert totals["optimizer"] == pytest.approx(2 * totals["trained"], rel=1e-3)
    listed = sum(int(row[-1].replace(",", "")) for row in rows.values() if row[0] == "trained")
    assert totals["trained"] == pytest.approx(listed / 2**20, abs=0.1)


def test_a_mesh_that_splits_nothing_is_told(capsys, recipe):
    _, totals, whole = explained(capsys, "--mesh.fsdp", "48")
    assert whole and totals["trained"] > 1_673_779_984 * 4 / 2**20 / 2
