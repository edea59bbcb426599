"""A batch goes on where it stopped, keeps account of everything, and one bad photo stops nothing. Drawing itself is a stub here."""

import json
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from instantid_jax import jobs
from instantid_jax.defaults import default_config, people
from instantid_jax.job_file import JobError
from instantid_jax.lora import Lora
from instantid_jax.output import read_settings, weights_digest
from instantid_jax.running import LeaseError, lease
from instantid_jax.sample_options import SampleOptions

DIM = default_config().resampler.embedding_dim
KPS = np.float32([[24, 24], [40, 24], [32, 34], [26, 44], [38, 44]])


class Stub:
    """A pipeline and its spread in one: pictures in the gray of their seed. After `stop_after` batches a signal comes."""

    width = 2

    def __init__(self):
        self.drawn, self.stop_after, self.bad, self.fail = [], None, (), None

    def prepare(self, request, image, image_embeds, control_mask=None, guidance=None):
        assert image_embeds.shape == (DIM,) and len(image) == 1
        return {"seed": np.uint32(request.seed), "size": np.zeros(image[0].size)}

    def kind(self, request, inputs):
        return inputs["size"].shape

    def draw(self, request, calls):
        if self.fail is not None:
            raise self.fail
        assert 1 <= len(calls) <= self.width
        self.drawn += [int(call["seed"]) for call in calls]
        self.batches = getattr(self, "batches", 0) + 1
        if self.batches == self.stop_after:
            signal.raise_signal(signal.SIGTERM)
        values = [np.nan if call["seed"] in self.bad else call["seed"] / 255 for call in calls]
        return np.stack([np.full((1, *call["size"].shape, 3), value, np.float32) for call, value in zip(calls, values, strict=True)])


@pytest.fixture
def stub(monkeypatch):
    stub = Stub()
    monkeypatch.setattr(jobs, "open_pipeline", lambda given, loras: stub)
    monkeypatch.setattr(jobs, "Spread", type("Spread", (), {"__new__": lambda cls, pipe: stub, "kind": stub.kind}))
    return stub


@pytest.fixture
def face(tmp_path):
    np.savez(tmp_path / "anna.npz", embedding=np.arange(1, DIM + 1, dtype=np.float32), kps=KPS, size=(64, 64))
    return "anna.npz"


def run(tmp_path, *lines, loras=(), **given):
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return jobs.run_jobs(SampleOptions(jobs=tmp_path / "jobs.jsonl", out=tmp_path / "out", watermark=False, **given), lambda config: loras)


def report(tmp_path):
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["asked"] == told["made"] + told["failed"] + told["missing"]
    return [told[name] for name in ("asked", "made", "failed", "missing")]


def ledger(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text(encoding="utf-8").split("\n") if line]


def test_all_are_made_and_told_once(stub, face, tmp_path, capsys):
    assert run(tmp_path, {"face": face, "seed": [1, 2, 3], "prompt": "x"}, {"face": face, "seed": 3, "prompt": "x"}) == 0
    assert report(tmp_path) == [3, 3, 0, 0] and stub.drawn == [1, 2, 3]
    rows = ledger(tmp_path)
    assert [(row["status"], row["seed"], row["person"], row["line"], row["prompt"]) for row in rows] == [
        ("made", s, "anna", 1, "x") for s in (1, 2, 3)
    ]
    for row in rows:
        path = tmp_path / "out" / row["path"]
        assert path.name == f"{row['seed']:06d}-{row['key'][:12]}.png" and path.stat().st_size == row["bytes"]
        assert read_settings(path)["seed"] == row["seed"] and np.asarray(Image.open(path)).max() == row["seed"]
    assert "3 asked: 3 made, 0 failed, 0 missing" in capsys.readouterr().out
    assert run(tmp_path, {"face": face, "seed": [1, 2, 3], "prompt": "x"}) == 0
    assert stub.drawn == [1, 2, 3]


def test_another_lora_makes_another_picture_and_its_place_does_not(stub, face, tmp_path):
    def drawn(name, digest, scale=1.0):
        assert run(tmp_path, {"face": face, "prompt": "x"}, lora=(tmp_path / name,), lora_scale=(scale,), loras=[Lora(name, digest, {})]) == 0
        return ledger(tmp_path)[0]["path"]

    first = drawn("a.safetensors", "11")
    assert read_settings(tmp_path / "out" / first)["lora_sha256"] == ["11"]
    assert drawn("b.safetensors", "11") == first and len(stub.drawn) == 1
    assert len({first, drawn("a.safetensors", "22"), drawn("a.safetensors", "11", 0.5)}) == 3 and len(stub.drawn) == 3


def test_a_signal_stops_between_batches_and_the_same_command_goes_on(stub, face, tmp_path):
    line = {"face": face, "seed": [1, 2, 3, 4, 5], "prompt": "x"}
    stub.stop_after = 1
    assert run(tmp_path, line) == 75
    assert report(tmp_path) == [5, 2, 0, 3] and [row["status"] for row in ledger(tmp_path)] == ["made"] * 2 + ["missing"] * 3
    stub.drawn.clear()
    assert run(tmp_path, line) == 0
    assert stub.drawn == [3, 4, 5] and report(tmp_path) == [5, 5, 0, 0]


def test_bad_photos_fail_alone_with_their_reason(stub, face, tmp_path, capsys):
    Image.new("RGB", (200, 200), "gray").save(tmp_path / "nobody.png")
    (tmp_path / "text.png").write_text("no picture")
    np.savez(tmp_path / "other.npz", embedding=np.ones(7, np.float32))
    lines = [{"face": name, "seed": [0, 1], "prompt": "x"} for name in ("gone.png", "text.png", "other.npz", face)]
    lines += [{"face": "nobody.png", "prompt": "x"}, {"face": face, "pose": "gone.png", "seed": 7}]
    stub.bad = (1,)
    assert run(tmp_path, *lines) == 3
    assert report(tmp_path) == [10, 1, 9, 0]
    told = json.loads((tmp_path / "out" / "report.json").read_text())["reasons"]
    assert told == {"embedding_dim": 2, "missing": 3, "no_face": 1, "not_a_picture": 2, "not_finite": 1}
    assert "gone.png: there is no such file" in capsys.readouterr().err
    stub.bad = ()
    photo = people()[0].photo
    (tmp_path / "gone.png").write_bytes(photo.read_bytes())
    stub.drawn.clear()
    assert run(tmp_path, *lines) == 3  # what failed is tried again, and the photo that is there now is another picture
    assert sorted(stub.drawn) == [0, 1, 1, 7] and report(tmp_path) == [10, 5, 5, 0]


def test_killed_between_picture_and_row_or_in_the_middle_of_either(stub, face, tmp_path):
    line = {"face": face, "seed": [1, 2, 3, 4], "prompt": "x"}
    assert run(tmp_path, line) == 0
    rows = ledger(tmp_path)
    own = tmp_path / "out" / "ledger" / "00000.jsonl"
    lines = own.read_bytes().splitlines(keepends=True)
    own.write_bytes(lines[0] + lines[1] + lines[2][:20])  # the rows of 3 and 4 are lost
    torn = tmp_path / "out" / rows[3]["path"]
    torn.write_bytes(torn.read_bytes()[:-30])
    (tmp_path / "out" / rows[0]["path"]).unlink()
    stub.drawn.clear()
    assert run(tmp_path, line) == 0
    assert stub.drawn == [1, 4]
    assert [bool(row.get("adopted")) for row in ledger(tmp_path)] == [False, False, True, False]
    assert all(json.loads(text) for text in own.read_text().splitlines() if text != lines[2][:20].decode())


def test_the_key_knows_all_that_decides_a_picture(stub, face, tmp_path, monkeypatch):
    def key(**changes):
        run(tmp_path, {"face": face, "seed": 1, "prompt": "x"} | changes)
        (row,) = ledger(tmp_path)
        return row["key"]

    keys = [
        key(),
        key(steps=3),
        key(prompt="y"),
        key(seed=2),
        key(negative_prompt=""),
        key(sampler="ddim"),
        key(face_index=0),
        key(height=72, width=64),
    ]
    assert key(person="somebody") == keys[0] == key(steps=20)  # a name decides nothing, and a default is a value
    np.savez(tmp_path / "anna.npz", embedding=np.arange(2, DIM + 2, dtype=np.float32), kps=KPS, size=(64, 64))
    keys.append(key())
    monkeypatch.setattr(jobs, "weights_digest", lambda folder: "others")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_what_concerns_all_pictures_ends_the_run(stub, face, tmp_path):
    with pytest.raises(JobError, match="line 1: has an unknown field"):
        run(tmp_path, {"face": face, "sed": 1})
    with pytest.raises(ValueError, match="list the seeds"):
        run(tmp_path, {"face": face}, num_images=2)
    with pytest.raises(ValueError, match="there is no such file"):
        jobs.run_jobs(SampleOptions(jobs=tmp_path / "none.jsonl"), lambda config: [])
    with lease(tmp_path / "out", "drawing"), pytest.raises(LeaseError, match="another process is drawing in"):
        run(tmp_path, {"face": face})
    stub.fail = OSError("no space left")
    with pytest.raises(OSError, match="no space left"):
        run(tmp_path, {"face": face})
    with pytest.raises(ValueError, match="--distributed goes with --jobs"):
        SampleOptions(distributed=True).check()
    for place in ({"coordinator": "a:1"}, {"processes": 2}, {"process": 0}):
        with pytest.raises(ValueError, match="--coordinator, --processes and --process go with --distributed"):
            SampleOptions(**place).check()
        with pytest.raises(ValueError, match="--coordinator, --processes and --process go with --distributed"):
            run(tmp_path, {"face": face}, **place)


def test_a_picture_that_cannot_be_drawn_or_written_fails_alone(stub, face, tmp_path, monkeypatch):
    lines = [{"face": face, "prompt": "x", "seed": [1, 2]}, {"face": face, "person": "bob", "prompt": "x", "seed": [3, 4]}]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "anna").write_text("a file where a folder should be")
    assert run(tmp_path, *lines) == 3
    assert report(tmp_path) == [4, 2, 2, 0] and [row.get("reason") for row in ledger(tmp_path)] == ["unwritable"] * 2 + [None] * 2
    (tmp_path / "out" / "anna").unlink()
    draw = stub.draw
    monkeypatch.setattr(stub, "draw", lambda request, calls: too_large() if len(set(calls[0]["size"].shape)) == 2 else draw(request, calls))

    def too_large():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    assert run(tmp_path, {"face": face, "prompt": "x", "height": 64, "width": 128}, *lines) == 3
    assert report(tmp_path) == [5, 4, 1, 0] and [row["reason"] for row in ledger(tmp_path) if row["status"] == "failed"] == ["too_large"]
    stub.draw, stub.fail = draw, jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        run(tmp_path, {"face": face, "prompt": "y"})


def test_a_signal_before_the_first_picture_is_told_to_the_others(stub, face, tmp_path, monkeypatch):
    raised = []
    monkeypatch.setattr(jobs, "raise_flag", raised.append)
    prepare = jobs._Drawing._prepare
    monkeypatch.setattr(jobs._Drawing, "_prepare", lambda self, task: signal.raise_signal(signal.SIGTERM) or prepare(self, task))
    assert run(tmp_path, {"face": face, "prompt": "x", "seed": [1, 2, 3]}) == 75
    assert "stop" in raised and stub.drawn == []


def test_another_process_s_signal_stops_before_the_next_picture(stub, face, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "flag_raised", lambda name: len(stub.drawn) >= 2)
    assert run(tmp_path, {"face": face, "prompt": "x", "seed": [1, 2, 3, 4, 5]}) == 75
    assert stub.drawn == [1, 2] and report(tmp_path) == [5, 2, 0, 3]


def test_names_and_texts_that_json_allows(stub, face, tmp_path):
    (tmp_path / "jobs.jsonl").write_text(
        json.dumps({"face": face, "prompt": "one\u2028two\x85three", "person": "王" * 100, "seed": 1}, ensure_ascii=False) + "\r\n", encoding="utf-8"
    )
    assert jobs.run_jobs(SampleOptions(jobs=tmp_path / "jobs.jsonl", out=tmp_path / "out", watermark=False), lambda config: []) == 0
    (row,) = ledger(tmp_path)
    assert row["prompt"] == "one\u2028two\x85three" and row["path"].split("/")[0] == "王" * 66


def test_weights_without_a_manifest_are_told_apart_by_their_files(tmp_path):
    (tmp_path / "a").write_text("1")
    one = weights_digest(tmp_path)
    (tmp_path / "a").write_text("2")
    assert weights_digest(tmp_path) != one
