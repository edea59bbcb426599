"""The command line, from portraits to training batches."""

import collections
import json

import numpy as np
import pytest

from instantid_jax.config import portraits, to_json
from instantid_jax.data.loader import LoaderConfig, make_loader
from instantid_jax.data.prepare import main
from instantid_jax.data.sources import open_source
from tests.data.samples import encoded, photo, tokenizers


def test_portraits_to_batches(tmp_path, capsys):
    pytest.importorskip("numba")
    out = tmp_path / "heads"
    arguments = ["portraits", "--out", str(out), "--train", "3", "--validation", "1", "--test", "0", "--views", "2", "--image-size", "64"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "8  100.0%  inputs" in table and "written to train" in table
    report = json.loads((out / "report.json").read_text())
    assert report["inputs"] == 8 == sum(report["written"].values()) + sum(report["refused"].values())
    source = open_source(out)
    people = collections.Counter(source[i].identity for i in range(len(source)))
    assert set(people) <= {"00002000", "00002001", "00002002"} and len(source) >= 5
    r = source[0]
    assert r.labels["identity_seed"] == int(r.identity) and r.caption != r.caption_identity and "person" in r.caption
    assert r.embedder == "opencv" and r.embeddings.shape == (1, 128) and r.licence == "CC0-1.0"
    config = LoaderConfig(global_batch=4, resolution=64, keypoint_scale=0.2, paired_reference=0.8, identity_caption=0.5, num_threads=0)
    loader = make_loader(source, config, tokenizers())
    batch = next(loader)
    loader.close()
    assert batch["image"].shape == batch["keypoint_image"].shape == (4, 64, 64, 3)
    norms = np.linalg.norm(batch["embedding"], axis=1)
    assert (norms > 5).all() and (norms < 25).all()
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"train: {len(source)} records" in shown and f"caption: {r.caption!r}" in shown and "embedding [1, 128] by opencv" in shown
    assert main(["index", str(out)]) == 0
    assert main(arguments) == 1 and "there is a data set already" in capsys.readouterr().err


@pytest.fixture
def photos(tmp_path):
    """A folder of one photo without a face, with its caption."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encoded(photo([])))
    (tmp_path / "photos" / "a.txt").write_text("nobody")
    return str(tmp_path / "photos")


def test_a_folder_without_faces_gets_its_table_and_a_sentence(photos, tmp_path, capsys):
    assert main(["folder", "--folder", photos, "--out", str(tmp_path / "out"), "--filters.min-side", "16"]) == 1
    said = capsys.readouterr()
    assert [line.split() for line in said.out.splitlines()] == [
        ["1", "100.0%", "inputs"],
        ["0", "0.0%", "written", "to", "train"],
        ["1", "100.0%", "refused:", "no_face"],
    ]
    assert said.err == f"prepare: no input became a record of the split 'train' (no_face 1); {tmp_path / 'out' / 'quarantine'} names each\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--num-shards 0", "--num-shards must be at least 1, got 0"),
        ("--workers 0", "--workers must be at least 1, got 0"),
        ("--holdout -1", "--holdout must be between 0 and 1, got -1.0"),
        ("--holdout 5", "--holdout must be between 0 and 1, got 5.0"),
        ("--embedding-scale nan", "--embedding-scale must be above 0 and finite, got nan"),
        ("--embedding-scale 0", "--embedding-scale must be above 0 and finite, got 0.0"),
    ],
)
@pytest.mark.parametrize("command", ["folder --folder {}", "manifest --manifest {}", "webdataset --folder {}"])
def test_a_number_out_of_range(command, arguments, says, photos, tmp_path, capsys):
    assert main([*command.format(photos).split(), "--out", str(tmp_path / "out"), *arguments.split()]) == 2
    assert capsys.readouterr().err == f"prepare: {says}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--resolution 63", "--resolution must be a multiple of the autoencoder's 4 pixels, at least 4, got 63"),
        ("--resolution 2", "--resolution must be a multiple of the autoencoder's 4 pixels, at least 4, got 2"),
        ("--resolution 0", "--resolution must be at least 1, got 0"),
        ("--buckets --resolution 100", "aspect_buckets: resolution 100 must be a positive multiple of step 64"),
        ("--batch 0", "--batch must be at least 1, got 0"),
        ("--workers -1", "--workers must be at least 1, got -1"),
        ("--part 2 2", "CacheConfig: part 2 of 2 does not exist; parts are counted from 0"),
    ],
)
def test_caching_refuses_before_weights_are_read(arguments, says, tmp_path, capsys):
    (tmp_path / "config.json").write_text(to_json(portraits()))
    named = ["--data", str(tmp_path / "none"), "--weights", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["cache", *named, *arguments.split()]) == 2
    assert capsys.readouterr().err == f"prepare: {says}\n"
    assert main(["cache", *named, "--resolution", "64"]) == 1
    assert "holds no dataset_info.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ("folder --folder none", 1, "none: there is no such folder"),
        ("folder --folder file", 1, "file: is a file; name a folder"),
        ("manifest --manifest none.jsonl", 1, "none.jsonl: there is no such file"),
        ("manifest --manifest .", 1, ".: is a folder; name a file of JSON lines"),
        ("manifest --manifest rows --rename identiy idenity", 2, "--rename to 'idenity': there is no such field; did you mean 'identity'?"),
        (
            "manifest --manifest rows --rename idd identity",
            2,
            "--rename from 'idd': no row at the beginning of rows has this field; did you mean 'id'?",
        ),
        ("webdataset --folder .", 1, ".: holds no file that matches '*.tar'"),
        ("portraits --validation 2000", 2, "PortraitReader: 2000 people do not fit the split 'validation', which begins with seed 1000"),
        ("folder --folder . --analyzer antelopev2", 1, "--analyzer-root DIR"),
        ("folder --folder . --out file", 1, "--out file: it is a file; name a folder"),
        ("inspect none", 1, "none: holds no dataset_info.json"),
    ],
)
def test_inputs_that_are_not_there(arguments, status, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "rows").write_text('{"image": "a.png", "id": "me"}\n')
    command = arguments.split()
    assert main(command if "--out" in command or "inspect" in command else [*command, "--out", "out"]) == status
    message = capsys.readouterr().err
    assert message.startswith("prepare: ") and says in message and message.count("\n") == 1, message


def test_a_command_that_does_not_exist(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["manifets", "--out", "x"])
    assert stopped.value.code == 2 and capsys.readouterr().err == "prepare: there is no command 'manifets'; did you mean 'manifest'?\n"


def test_a_manifest_with_other_names(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(encoded(photo([])))
    keypoints = [[20, 18], [34, 18], [27, 25], [22, 31], [33, 31]]
    row = {"file_name": "a.png", "additional_feature": "a man", "landmarks": keypoints, "vector": [1.0, 2.0], "embedder": "antelopev2"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    names = ["file_name", "image", "additional_feature", "caption", "landmarks", "keypoints", "vector", "embedding"]
    out = str(tmp_path / "out")
    arguments = ["manifest", "--manifest", str(tmp_path / "m.jsonl"), "--rename", *names, "--out", out, "--filters.min-side", "16"]
    assert main([*arguments, "--licence", "CC0", "--filters.duplicates", "none", "--holdout", "0.0"]) == 0
    assert "1  100.0%  written to train" in capsys.readouterr().out
    r = open_source(out)[0]
    assert (r.caption, r.licence, r.embedder) == ("a man", "CC0", "antelopev2") and r.keypoints.tolist() == keypoints


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["manifest", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for words in ("--filters.min-face-share", "--beam-runner", "--holdout", "JSON-lines"):
        assert words in text
