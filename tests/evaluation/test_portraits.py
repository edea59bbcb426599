"""The command line, from people to files, with noise in place of pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from instantid_jax.evaluation import portraits
from instantid_jax.evaluation.generate import Painter

from .conftest import ColorJudge
from .test_suite import NEEDED

pytest.importorskip("numba")
QUICK = ("--identities", "3", "--steps", "1", "--guidance-scale", "1", "--batch", "3", "--arms", "references_1")


@pytest.fixture(autouse=True)
def color_judge(monkeypatch, few_fitting):
    monkeypatch.setattr(portraits, "load_judge", lambda name: ColorJudge())


def noise(job, size):
    """In place of a picture, something that the job decides."""
    return np.random.default_rng([job.seed, len(job.prompt)]).integers(0, 256, (size, size, 3), dtype=np.uint8)


def test_mistakes_are_one_sentence(capsys, tmp_path):
    for arguments, status, message in (
        (("--arms", "both", "boht"), 2, "there is no arm 'boht'"),
        ((), 2, "no --out given"),
        (("--out", str(tmp_path), "--weights", str(tmp_path)), 1, "no config.json"),
        (("--real-only", "--identities", "1"), 2, "2 to 1000 test people, got 1"),
        (("--real-only", "--identities", "501", "--split", "validation"), 2, "2 to 500 validation people, got 501"),
        (("--batch", "0"), 2, "--batch must be at least 1, got 0"),
    ):
        assert portraits.main(list(arguments)) == status
        error = capsys.readouterr().err
        assert error.startswith("portraits: ") and message in error and error.count("\n") == 1


def test_from_people_to_files_and_again_from_the_cache(tmp_path, capsys, monkeypatch, pipe):
    monkeypatch.setattr(portraits, "default_pipeline", lambda: pipe)
    monkeypatch.setattr(Painter, "_draw", lambda self, jobs: np.stack([noise(job, self.sampling.size) for job in jobs]))
    arguments = [*QUICK, "--out", str(tmp_path)]
    assert portraits.main(arguments) == 0
    result = json.loads((tmp_path / "portraits.json").read_text())
    assert list(result["arms"]) == ["both", "neither", "references_1"]
    assert all(name in result and f"{name}_ci" in result for name in NEEDED)
    assert all(name in figures for figures in result["arms"].values() for name in NEEDED)
    assert result["arms"]["references_1"] == result["arms"]["both"] and result["gap_ratio"] == result["arms"]["both"]["gap_ratio"]
    assert result["settings"]["judge"] == "colours" and result["settings"]["conditioned_by"] == "opencv"
    assert (tmp_path / "portraits.md").read_text() in capsys.readouterr().out
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.size == (5 * 128, 18 + 3 * 128)  # reference, pose, both, neither, real

    def never(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(Painter, "_draw", never)
    assert portraits.main(arguments) == 0
    assert json.loads((tmp_path / "portraits.json").read_text()) == result


def test_ceilings_need_no_weights(tmp_path, capsys):
    assert portraits.main(["--real-only", "--identities", "3", "--out", str(tmp_path)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["ceiling_detected"] == 1 and 0.05 < figures["keypoint_nme_ceiling"] < 0.15
    assert figures["ceiling_background"] == 1
    assert np.isfinite([figures["ceiling_same"], figures["ceiling_other"]]).all()
