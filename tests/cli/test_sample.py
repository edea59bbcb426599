"""The command line as a newcomer meets it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instantid_jax.output import read_settings

ROOT = Path(__file__).parents[2]
QUICK = ["--steps", "2", "--height", "64", "--width", "64"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys, sample; status = sample.main(sys.argv[1:]); print('HEAVY', sorted({'torch', 'tensorflow'} & set(sys.modules))); sys.exit(status)"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_run_without_weights_makes_pictures_twice_alike(tmp_path: Path) -> None:
    for name in ("a", "b"):
        done = run("--out", str(tmp_path / name), "--num-images", "2", *QUICK)
        assert done.returncode == 0, done.stderr
        assert "RANDOM weights" in done.stderr and "convert_weights import" in done.stderr
        assert "compiled in" in done.stdout
        assert "HEAVY []" in done.stdout
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["000000.png", "000001.png", "sheet.png"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    settings = read_settings(tmp_path / "a" / "000001.png")
    assert (settings["seed"], settings["size"], settings["model"]) == (1, "64x64", "random weights")
    with Image.open(tmp_path / "a" / "000000.png") as image:
        assert np.asarray(image).std() > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "nowhere"], "nowhere is not a folder of converted weights"),
        (["--face", "nowhere.jpg"], "nowhere.jpg: there is no such file"),
        (["--sampler", "eular"], "did you mean 'euler'"),
        (["--steps", "0"], "at least 1"),
        (["--height", "100"], "height must be a multiple of 8"),
        (["--face", "README.md"], "README.md"),
    ],
)
def test_bad_input_gets_one_sentence_and_a_status(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run("--out", str(tmp_path), *arguments)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sample.py: ") and message in last
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_typo_gets_the_nearest_name() -> None:
    done = run("--prompts", "x")
    assert done.returncode == 2
    assert "--prompt" in done.stderr
