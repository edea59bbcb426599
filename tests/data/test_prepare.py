"""Preparing: every input is written or refused by name, on one machine and on Beam alike, from each kind of input."""

import collections
import importlib.util
import io
import json
import pickle
import shutil
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from instantid_jax.data.filters import Examiner, FilterConfig
from instantid_jax.data.inputs import Candidate, FolderReader, ManifestReader, Refusal, WebDatasetReader, candidate_from_fields
from instantid_jax.data.preparation import Report, ordered_map, prepare
from instantid_jax.data.record import DataError, encode_array
from instantid_jax.data.sources import DatasetSource, JoinedSource, find_dataset, open_source, quiet_tfds
from instantid_jax.options import OptionError
from tests.data.samples import ColorAnalyzer, encoded, photo

CONFIG = FilterConfig(min_side=32)
# Beam's local runner in its portable form, which Dataflow, Flink and Spark share; the name DirectRunner may first fetch a program.
RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
CODES = {"no_face": 2, "several_faces": 1, "small": 1, "no_caption": 1, "not_a_picture": 1, "broken": 1, "duplicate": 2, "bad_fields": 1}


def beam_only(test):
    """Skips without Beam; Beam's own warnings of its dependencies are not this project's."""
    test = pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is not installed (extra: beam)")(test)
    return pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")(test)


def picture(i, **options):
    """Photo number i; all differ."""
    background = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(background).resize((64, 48), Image.Resampling.NEAREST)
    image.paste((200, 40, 40), (16, 8, 40, 38))
    return encoded(image, **options)


def write_folder(root):
    """26 inputs: 16 good photos of eight people, and ten that each filter refuses (CODES)."""
    for i in range(16):
        file = root / f"person {i // 2}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
        file.with_suffix(".txt").write_text(f"photo {i}\n")
    rest = {
        "empty1.png": encoded(photo([], seed=1)),
        "empty2.png": encoded(photo([], seed=2)),
        "two.png": encoded(photo([((4, 4, 20, 24), 0), ((30, 4, 50, 24), 1)])),
        "tiny.png": encoded(photo([((4, 4, 20, 24), 0)], (31, 31))),
        "silent.png": picture(100),
        "text.gif": b"GIF89a",
        "cut.png": picture(101)[:150],
        "z_again.png": picture(3),
        "z_smaller.jpg": picture(5, form="JPEG", quality=95),
        "odd.png": picture(102),
    }
    for name, data in rest.items():
        (root / name).write_bytes(data)
        if name != "silent.png":
            (root / name).with_suffix(".txt").write_text("a caption")
    (root / "odd.json").write_text('{"labels": 3}')
    (root / ".hidden.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    """The folder prepared with threads, and its report."""
    out = tmp_path_factory.mktemp("data")
    reader = FolderReader(str(folder), identity_from_folder=True, source="https://example.org", licence="CC0-1.0")
    return out, prepare(reader, Examiner(CONFIG, ColorAnalyzer, splits=("train", "test"), holdout=0.3), str(out), workers=3)


def rows(out, split="train"):
    source = open_source(out, split)
    return [source[i] for i in range(len(source))]


def test_every_input_is_accounted_for(prepared):
    out, report = prepared
    assert report.inputs == 26 and report.refused == CODES and sum(report.written.values()) == 16
    assert json.loads((out / "report.json").read_text()) == {
        "inputs": 26,
        "written": report.written,
        "refused": CODES,
        "dataset": report.dataset,
        "quarantine": report.quarantine,
    }
    lines = [json.loads(line) for file in sorted((out / "quarantine").glob("*.jsonl")) for line in file.read_text().splitlines()]
    assert collections.Counter(line["code"] for line in lines) == CODES
    by_key = {line["key"]: line for line in lines}
    assert by_key["z_smaller.jpg"]["message"].endswith("is the same picture as person 2/05.png")
    assert by_key["two.png"] == {
        "key": "two.png",
        "code": "several_faces",
        "message": "two.png: 2 faces found, at most 1 may be there",
        "source": "https://example.org/two.png",
    }
    assert report.lines()[0].split() == ["26", "100.0%", "inputs"] and any("refused: no_face" in line for line in report.lines())


def test_the_written_records(prepared, folder):
    out, report = prepared
    train, test = rows(out), rows(out, "test")
    assert report.written == {"train": len(train), "test": len(test)} and train and test
    assert not {r.identity for r in train} & {r.identity for r in test}
    keys = sorted(r.key for r in train + test)
    assert keys == [f"person {i // 2}/{i:02d}.png" for i in range(16)]
    for r in train + test:
        i = int(r.key[-6:-4])
        assert r.image == (folder / r.key).read_bytes() and r.caption == f"photo {i}" and r.identity == f"person {i // 2}"
        assert r.licence == "CC0-1.0" and r.source == f"https://example.org/{r.key}" and r.embedder == "colors"
        assert r.face_box.tolist() == [16, 8, 40, 38]
    index = open_source(out).index
    assert index.size.tolist() == [[48, 64]] * len(train) and isinstance(index.size, np.memmap)
    assert len(np.unique(index.identity)) == len({r.identity for r in train})


def test_nothing_is_written_over(prepared, folder):
    with pytest.raises(DataError, match="there is a data set already"):
        prepare(FolderReader(str(folder)), Examiner(CONFIG, ColorAnalyzer), str(prepared[0]))


def test_threads_do_not_change_the_result(prepared, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("instantid_jax.data.preparation._SECONDS", 0.0)
    told = []
    reader = FolderReader(str(folder), identity_from_folder=True, source="https://example.org", licence="CC0-1.0")
    report = prepare(reader, Examiner(CONFIG, ColorAnalyzer, splits=("train", "test"), holdout=0.3), str(tmp_path), tell=told.append)
    assert len(told) == 26 and told[0].startswith("train: ") and "26 inputs read, 9 refused" in told[-1]
    assert (report.written, report.refused) == (prepared[1].written, prepared[1].refused)
    assert [r.key for r in rows(tmp_path)] == [r.key for r in rows(prepared[0])]


@beam_only
def test_beam_gives_the_same_data_set(prepared, folder, tmp_path):
    reader = FolderReader(str(folder), identity_from_folder=True, source="https://example.org", licence="CC0-1.0")
    examiner = Examiner(CONFIG, ColorAnalyzer, splits=("train", "test"), holdout=0.3)
    report = prepare(reader, examiner, str(tmp_path), beam_runner=RUNNER)
    assert (report.inputs, report.written, report.refused) == (26, prepared[1].written, CODES)
    for split in ("train", "test"):
        assert [(r.key, r.image, r.caption) for r in rows(tmp_path, split)] == [(r.key, r.image, r.caption) for r in rows(prepared[0], split)]
    lines = {line for file in (tmp_path / "quarantine").glob("*.jsonl*") for line in file.read_text().splitlines()}
    here = {line for file in (prepared[0] / "quarantine").glob("*.jsonl") for line in file.read_text().splitlines()}
    assert lines == here


@beam_only
def test_no_data_set_of_nothing_on_beam(folder, tmp_path):
    examiner = Examiner(FilterConfig(min_side=4000), ColorAnalyzer)
    with pytest.raises(DataError, match="no input became a record of one of the splits"):
        prepare(FolderReader(str(folder)), examiner, str(tmp_path), beam_runner=RUNNER)


def test_no_data_set_of_nothing(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encoded(photo([])))
    with pytest.raises(DataError, match=r"no input became a record of the split 'train' \(no_caption 1\)"):
        prepare(FolderReader(str(tmp_path / "photos")), Examiner(CONFIG, ColorAnalyzer), str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("**/dataset_info.json"))
    (tmp_path / "photos" / "b.png").write_bytes(picture(1))
    config = FilterConfig(min_side=32, caption=False)
    again = prepare(FolderReader(str(tmp_path / "photos")), Examiner(config, ColorAnalyzer), str(tmp_path / "out"))  # in the same place
    assert again.written == {"train": 1} and again.refused == {"no_face": 1}
    with pytest.raises(DataError, match="there is no such folder"):
        prepare(FolderReader(str(tmp_path / "nowhere")), Examiner(CONFIG, ColorAnalyzer), str(tmp_path / "out2"))


def test_a_report_that_does_not_balance_is_an_error():
    with pytest.raises(DataError, match="10 inputs were read, but 7 written and 2 refused"):
        Report(10, {"train": 7}, {"small": 2}, "data", "quarantine").check()


# --- manifests --------------------------------------------------------------------------------------------------------------


def test_a_manifest(tmp_path):
    kps = [[20, 18], [34, 18], [27, 25], [22, 31], [33, 31]]
    (tmp_path / "images").mkdir()
    for i in range(8):
        (tmp_path / "images" / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "vector.npy").write_bytes(encode_array(np.ones(4, np.float32)))
    (tmp_path / "vector.pickle").write_bytes(pickle.dumps(np.ones(4)))
    known = {"keypoints": kps, "embedder": "x"}
    entries = [
        {"image": "images/0.png", "additional_feature": "plain", "url": "https://example.org/0", "license": "CC-BY-4.0"},
        {"image": "images/1.png", "text": "known face", "embedding": [1, 2, 3, 4], "bbox": [15, 5, 41, 40], **known, "key": "one", "identity": "Ann"},
        {"image": "images/2.png", "caption": "vector file", "embedding": "vector.npy", **known},
        {"image": "images/3.png", "caption": "pickle", "embedding": "vector.pickle", **known},
        {"image": "images/4.png", "caption": "no embedder", "embedding": [1, 2], "keypoints": kps},
        {"image": "images/none.png", "caption": "missing"},
        {"caption": "no image"},
        {"image": "images/5.png", "caption": 5},
        {"image": "images/6.png", "caption": "x", "keypoints": [[1, 2]]},
        {"image": "images/7.png", "caption": "x", "embedding": [0, 0], **known},
    ]
    lines = [json.dumps(entry) for entry in entries] + ["", "{broken", "[1]", '"\\ud800"']
    (tmp_path / "photos.jsonl").write_text("\n".join(lines))
    reader = ManifestReader(str(tmp_path / "photos.jsonl"), (("additional_feature", "caption"),), licence="unknown")
    report = prepare(reader, Examiner(CONFIG, ColorAnalyzer), str(tmp_path / "out"))
    assert report.inputs == 13 and report.written == {"train": 3} and report.refused == {"bad_fields": 9, "unreadable": 1}
    found = {r.key: r for r in rows(tmp_path / "out")}
    assert found["images/0.png"].source == "https://example.org/0" and found["images/0.png"].licence == "CC-BY-4.0"
    assert found["images/0.png"].caption == "plain" and found["images/0.png"].embedder == "colors"
    assert found["one"].embeddings.tolist() == [[1, 2, 3, 4]] and found["one"].embedder == "x" and found["one"].identity == "Ann"
    assert found["one"].face_box.tolist() == [15, 5, 41, 40] and found["one"].licence == "unknown" and found["one"].keypoints.tolist() == kps
    assert found["images/2.png"].embeddings.tolist() == [[1, 1, 1, 1]]
    text = (tmp_path / "out" / "quarantine" / "refused-train.jsonl").read_text()
    assert "a pickle, which is never read" in text and "photos.jsonl@" in text


@pytest.mark.parametrize(
    ("row", "options", "says"),
    [
        ({"identiy": "Ann"}, {}, "a.png: there is no field 'identiy'; did you mean 'identity'?"),
        ({"qqq": None}, {}, "a.png: there is no field 'qqq'; labels may hold anything else"),
        ({"labels": {"qqq": 1}}, {}, None),
        ({"qqq": 1, "width": 3}, {"ignore": ("qqq", "width")}, None),
        ({"who": "Ann"}, {"rename": (("who", "identity"),)}, None),
        ({"embedding": [1, 2, 3], "embedder": "x"}, {}, "a.png: has an embedding but no keypoints, which say whose it is; give both, or neither"),
    ],
)
def test_no_field_of_a_manifest_is_passed_over(row, options, says, tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "m.jsonl").write_text(json.dumps({"image": "a.png", **row}) + "\n")
    reader = ManifestReader(str(tmp_path / "m.jsonl"), **options)
    (entry,) = [entry for shard in reader.shards() for entry in reader.read(shard)]
    if says is None:
        assert isinstance(entry, Candidate)
    else:
        assert isinstance(entry, Refusal) and (entry.code, entry.message) == ("bad_fields", says)


@pytest.mark.parametrize(("name", "says"), [("captoin", "a.json: there is no field 'captoin'; did you mean 'caption'?"), ("original_width", None)])
def test_a_field_beside_a_picture_that_is_nearly_one(name, says, tmp_path):
    """Programs that download photos add fields of their own; those of people are near misses."""
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.json").write_text(json.dumps({"identity": "Ann", name: "x"}))
    reader = FolderReader(str(tmp_path))
    (entry,) = [entry for shard in reader.shards() for entry in reader.read(shard)]
    assert (entry.message if isinstance(entry, Refusal) else None) == says


def test_renamed_fields_exist(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    rows = [{"image": "a.png"}, {"image": "a.png", "who": "Ann"}]  # not in the first row
    (tmp_path / "m.jsonl").write_text("\n".join(["{broken", *map(json.dumps, rows)]))
    assert len(list(ManifestReader(str(tmp_path / "m.jsonl"), (("who", "identity"),)).shards())) == 1
    with pytest.raises(OptionError, match=r"--rename from 'whom': no row at the beginning of m.jsonl has this field; did you mean 'who'\?"):
        list(ManifestReader(str(tmp_path / "m.jsonl"), (("whom", "identity"),)).shards())
    with pytest.raises(OptionError, match=r"--rename to 'idenity': there is no such field; did you mean 'identity'\?"):
        ManifestReader(str(tmp_path / "m.jsonl"), (("who", "idenity"),))


def test_a_manifest_is_read_in_pieces(tmp_path, monkeypatch):
    """Whatever the pieces' ends, every line is read once: no list of rows is ever needed."""
    (tmp_path / "a.png").write_bytes(b"x")
    lines = [json.dumps({"image": "a.png", "key": f"{i}", "caption": "é" * (i % 7)}, ensure_ascii=False) for i in range(50)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    for piece in (1, 10, 37, 64, 1000, 10**6):
        monkeypatch.setattr("instantid_jax.data.inputs._CHUNK_BYTES", piece)
        reader = ManifestReader(str(tmp_path / "m.jsonl"))
        found = [entry.key for shard in reader.shards() for entry in reader.read(shard)]
        assert found == [str(i) for i in range(50)]


def test_a_long_manifest_is_never_held_in_memory(tmp_path):
    """Twice the rows take no more memory, which stays far below the file's 16 and 32 MiB."""
    (tmp_path / "a.png").write_bytes(b"x")
    peaks = []
    for count in (256, 512):
        with (tmp_path / "m.jsonl").open("w") as file:
            for i in range(count):
                file.write(json.dumps({"image": "a.png", "key": f"{i}", "caption": "x" * 65_536}) + "\n")
        reader = ManifestReader(str(tmp_path / "m.jsonl"), (("caption", "caption_identity"),))
        tracemalloc.start()
        read = sum(isinstance(entry, Candidate) for shard in reader.shards() for entry in reader.read(shard))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert read == count
    assert max(peaks) < 2 << 20 and peaks[1] < 1.1 * peaks[0]


def test_fields_of_the_wrong_kind_are_named():
    for fields, says in (
        ({"labels": [1]}, "labels must be an object"),
        ({"caption": 3}, "caption must be a string"),
        ({"keypoints": [[1, 2]] * 5, "embedding": "gone.npy", "embedder": "x"}, "gone.npy cannot be read"),
        ({"keypoints": [[1, float("nan")]] * 5}, "NaN"),
        ({"landmarks": [1, 2, 3]}, r"landmarks must be numbers of shape \[-1, 2\]"),
    ):
        with pytest.raises(DataError, match=says):
            candidate_from_fields("k", b"", fields)
    assert isinstance(candidate_from_fields("k", b"", {"landmarks": [[1, 2], [3, 4]], "other": object()}), Candidate)


# --- WebDataset -------------------------------------------------------------------------------------------------------------


def write_tar(path, files, cut=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    path.write_bytes(buffer.getvalue()[:cut])


def test_img2dataset_shards(tmp_path):
    def sample(i):
        fields = {
            "caption": f"from json {i}",
            "url": f"https://example.org/{i}.jpg",
            "key": f"{i:09d}",
            "status": "success",
            "width": 64,
            "exif": "{}",
        }
        return [
            (f"{i:09d}.jpg", picture(i, form="JPEG", quality=95)),
            (f"{i:09d}.json", json.dumps(fields | {"license": None}).encode()),
            (f"{i:09d}.txt", f"caption {i}".encode()),
        ]

    write_tar(tmp_path / "00000.tar", [file for i in range(3) for file in sample(i)])
    write_tar(tmp_path / "00001.tar", [*sample(3), ("000000009.txt", b"alone"), ("000000010.jpg", picture(10)), ("000000010.png", picture(11))])
    write_tar(tmp_path / "00002.tar", [file for i in range(4, 6) for file in sample(i)], cut=6000)
    (tmp_path / "00003.tar").write_bytes(b"no archive")
    reader = WebDatasetReader(str(tmp_path), licence="by link")
    report = prepare(reader, Examiner(CONFIG, ColorAnalyzer), str(tmp_path / "out"))
    entries = [e for shard in reader.shards() for e in reader.read(shard)]
    assert report.inputs == len(entries) and report.refused == {"no_picture": 2, "broken_shard": 2}
    found = {r.key: r for r in rows(tmp_path / "out")}
    assert {"00000/000000000", "00000/000000001", "00000/000000002", "00001/000000003"} <= found.keys()
    assert found["00001/000000003"].caption == "caption 3" and found["00001/000000003"].source == "https://example.org/3.jpg"
    assert found["00001/000000003"].licence == "by link"
    assert [e.code for e in entries if isinstance(e, Refusal)] == ["no_picture", "no_picture", "broken_shard", "broken_shard"]
    with pytest.raises(DataError, match=r"holds no file that matches '\*.tgz'"):
        list(WebDatasetReader(str(tmp_path), "*.tgz").shards())


# --- what reads it back -----------------------------------------------------------------------------------------------------


def test_sources_on_disk(prepared, tmp_path):
    out, report = prepared
    assert str(find_dataset(out)) == report.dataset
    with pytest.raises(DataError, match="has no split 'validation', only test, train"):
        open_source(out, "validation")
    with pytest.raises(DataError, match="holds no dataset_info"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="holds no dataset_info"):
        DatasetSource(tmp_path)
    joined = open_source([out, report.dataset])
    single = open_source(out)
    assert isinstance(joined, JoinedSource) and len(joined) == 2 * len(single)
    assert joined[len(single)].key == single[0].key and joined.index.size.shape == (len(joined), 2)
    with pytest.raises(IndexError):
        joined[len(joined)]


def test_an_index_of_other_rows_is_refused(prepared, tmp_path):
    shutil.copytree(prepared[1].dataset, tmp_path / "copy")
    source = DatasetSource(tmp_path / "copy")
    np.save(source.index_folder / "size.npy", np.zeros((2, 2), np.int32))
    with pytest.raises(DataError, match="delete the folder"):
        _ = source.index
    shutil.rmtree(source.index_folder)
    assert len(source.index) == len(source) and (source.index_folder / "size.npy").is_file()
    shutil.rmtree(source.index_folder)
    whole, parts = source.index, DatasetSource(tmp_path / "copy").build_index(2)
    assert np.array_equal(whole.identity, parts.identity) and np.array_equal(whole.size, parts.size) and len(set(parts.identity)) > 3


def test_anyone_can_read_it_with_tfds(prepared):
    import tensorflow_datasets as tfds

    with quiet_tfds():
        example = tfds.builder_from_directory(prepared[1].dataset).as_data_source("train")[0]
    assert example["image"].shape == (48, 64, 3) and example["image"].dtype == np.uint8 and example["keypoints"].shape == (5, 2)


def test_shards_for_elsewhere_are_written_here_first(folder, tmp_path, monkeypatch, prepared):
    with pytest.raises(DataError, match="leave it out"):
        prepare(FolderReader(str(folder)), Examiner(CONFIG, ColorAnalyzer), "gs://bucket/data")
    monkeypatch.setattr("instantid_jax.data.builder.is_remote", lambda path: True)
    reader = FolderReader(str(folder), identity_from_folder=True)
    prepare(reader, Examiner(CONFIG, ColorAnalyzer, splits=("train", "test"), holdout=0.3), str(tmp_path))
    assert [r.key for r in rows(tmp_path)] == [r.key for r in rows(prepared[0])]


def test_threads_keep_the_order():
    import time

    def slow(i):
        time.sleep(0.002 * (i % 3))
        return i

    assert list(ordered_map(slow, iter(range(60)), 4)) == list(range(60))
