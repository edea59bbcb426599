"""Console, JSONL, TensorBoard, pictures."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from instantid_jax.training.logging import Log

VALUES = {"loss": 0.5, "gap": float("nan"), "by": [1.0, None, float("inf")], "text": "x", "nothing": None}


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_record_is_a_line_for_people_and_one_for_programs(tmp_path):
    stream = io.StringIO()
    log = Log(tmp_path, stream=stream)
    log.record("train", 7, VALUES)
    log.record("bad_step", 8, {"loss": 1.0}, quiet=True)
    log.record("train", 9, {})
    log.say("hello")
    log.close()
    assert stream.getvalue() == "train 7: loss 0.5\nhello\n"
    assert rows(tmp_path) == [
        {"kind": "train", "step": 7, "loss": 0.5, "gap": "nan", "by": [1.0, None, "inf"], "text": "x", "nothing": None},
        {"kind": "bad_step", "step": 8, "loss": 1.0},
    ]


def test_a_resumed_run_continues_the_file(tmp_path):
    for step in (1, 2):
        log = Log(tmp_path, stream=io.StringIO())
        log.record("train", step, {"loss": 1.0})
        log.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_every_line_is_on_disk_at_once(tmp_path):
    log = Log(tmp_path, stream=io.StringIO())
    log.record("train", 1, {"loss": 1.0})
    assert len(rows(tmp_path)) == 1
    log.close()


def test_tensorboard_has_every_number(tmp_path):
    log = Log(tmp_path, tensorboard=True, stream=io.StringIO())
    log.record("train", 7, VALUES)
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes() and b"train/by/0" in file.read_bytes()


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"log.tensorboard needs tensorboardX: pip install"):
        Log(tmp_path, tensorboard=True)


def test_pictures(tmp_path):
    log = Log(tmp_path, stream=io.StringIO())
    path = log.picture(12, Image.fromarray(np.zeros((4, 6, 3), np.uint8)))
    assert path == tmp_path / "samples" / "00000012.png"
    with Image.open(path) as picture:
        assert picture.size == (6, 4)
    log.close()


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    log = Log(tmp_path / "run", tensorboard=True)
    log.record("train", 1, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()
