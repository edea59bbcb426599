"""Curves out of a run's log."""

import json
from pathlib import Path

import pytest
from PIL import Image

from instantid_jax.training import curves


def write(run: Path, rows: list[dict]) -> None:
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_of_a_step_that_was_done_twice_the_later_record_counts(tmp_path: Path) -> None:
    write(tmp_path, [{"kind": "train", "step": s, "loss": v, "loss_by_noise": [1.0]} for s, v in ((1, 3.0), (2, 2.0), (2, 2.5))])
    assert curves.read_curves(tmp_path) == {"train/loss": [(1, 3.0), (2, 2.5)]}


def test_a_picture_with_a_panel_for_each_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"kind": "train", "step": s, "loss": 1 / s} for s in (1, 2)]
    rows += [{"kind": "validation", "step": s, "loss": 1 / s, "wrong_person_gap": 0.1 * s} for s in (1, 2)]
    write(tmp_path, rows)
    assert curves.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1200, 300)


@pytest.mark.parametrize(("content", "message"), [(None, "holds no log.jsonl"), ("", "logged nothing yet"), ("{\n", "line 1")])
def test_mistakes_are_one_sentence(content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    assert curves.main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("curves: ") and message in error and error.count("\n") == 1
