"""The command line, from portraits to training batches."""

import collections
import json

import numpy as np
import pytest

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


def test_a_folder_without_faces(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encoded(photo([])))
    (tmp_path / "photos" / "a.txt").write_text("nobody")
    assert main(["folder", "--folder", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--filters.min-side", "16"]) == 1
    assert capsys.readouterr().err == (
        f"prepare: no input became a record of the split 'train' (no_face 1); {tmp_path / 'out' / 'quarantine'} names each\n"
    )


def test_inputs_that_are_not_there(tmp_path, capsys):
    for arguments in (
        ["folder", "--folder", str(tmp_path / "none")],
        ["manifest", "--manifest", str(tmp_path / "none.jsonl")],
        ["webdataset", "--folder", str(tmp_path)],
        ["portraits", "--validation", "2000"],
        ["folder", "--folder", str(tmp_path), "--analyzer", "antelopev2"],
    ):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
        message = capsys.readouterr().err
        assert message.startswith("prepare: ") and message.count("\n") == 1, message
    assert main(["inspect", str(tmp_path)]) == 1


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
