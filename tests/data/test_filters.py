"""Each filter refuses what it should, with its code and a sentence, and nothing else."""

import dataclasses
import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instantid_jax.data.filters import Accepted, Examiner, FilterConfig, FirstSeen, alike, bands, fingerprint, split_by_share
from instantid_jax.data.inputs import Candidate, KnownFace, Refusal
from instantid_jax.data.record import DataError
from instantid_jax.face import Face
from tests.data.samples import FACE_COLORS, ColorAnalyzer, encoded, photo

LOOSE = FilterConfig(min_side=16)


def candidate(image, key="a.png", caption="a person", **fields):
    return Candidate(key, image if isinstance(image, bytes) else encoded(image), caption, **fields)


def examine(config, *arguments, make=ColorAnalyzer, **fields):
    return Examiner(config, make)(candidate(*arguments, **fields))


FACE = photo([((16, 8, 40, 38), 0)])


def test_a_good_photo_becomes_a_record():
    verdict = Examiner(LOOSE, ColorAnalyzer, embedding_scale=2.0)(
        candidate(FACE, source="here", licence="CC0", identity="Ann", labels={"hair": "red"})
    )
    assert isinstance(verdict, Accepted)
    r = verdict.record
    assert (r.key, r.caption, r.source, r.licence, r.identity, r.labels, r.split) == (
        "a.png",
        "a person",
        "here",
        "CC0",
        "Ann",
        {"hair": "red"},
        "train",
    )
    assert r.size == (48, 64) and r.face_box.tolist() == [16, 8, 40, 38] and r.embeddings.tolist() == [list(FACE_COLORS[0])]
    assert (r.embedder, r.embedding_scale) == ("colors", 2.0) and r.det_score == pytest.approx(0.9) and r.image == encoded(FACE)


@pytest.mark.parametrize(
    ("code", "config", "image", "fields"),
    [
        ("not_a_picture", {}, b"nonsense", {}),
        ("broken", {}, encoded(FACE)[:300], {}),
        ("small", {"min_side": 49}, FACE, {}),
        ("no_caption", {}, FACE, {"caption": ""}),
        ("no_licence", {"licence": True}, FACE, {}),
        ("no_face", {}, photo([]), {}),
        ("several_faces", {}, photo([((4, 4, 20, 24), 0), ((30, 4, 50, 24), 1)]), {}),
        ("face_share", {"min_face_share": 0.3}, FACE, {}),
        ("det_score", {"min_det_score": 0.95}, FACE, {}),
        ("eye_distance", {"min_eye_distance": 10.0}, FACE, {}),
        ("split", {}, FACE, {"split": "holdout"}),
        ("keypoints_outside", {}, FACE, {"face": KnownFace(np.array([[-3, 9], [20, 9], [8, 16], [2, 24], [18, 24.0]], np.float32), np.ones((1, 3)))}),
        ("other_face", {}, FACE, {"face": KnownFace(np.array([[50, 9], [56, 9], [53, 12], [51, 15], [55, 15.0]], np.float32), None)}),
    ],
)
def test_each_filter(code, config, image, fields):
    verdict = examine(dataclasses.replace(LOOSE, **config), image, **fields)
    assert isinstance(verdict, Refusal) and verdict.code == code and "a.png" in verdict.message
    without = {
        "small": {"min_side": 0},
        "no_caption": {"caption": False},
        "several_faces": {"max_faces": 2},
        "keypoints_outside": {"keypoints_inside": False},
    }
    if code in without:
        assert isinstance(examine(dataclasses.replace(LOOSE, **without[code]), image, **fields), Accepted)


def test_thresholds_are_inclusive():
    share = 24 * 30 / (64 * 48)
    exact = dataclasses.replace(LOOSE, min_side=48, min_face_share=share, min_det_score=0.9)
    assert isinstance(examine(exact, FACE), Accepted)
    assert isinstance(examine(dataclasses.replace(exact, min_face_share=share + 1e-6), FACE), Refusal)


class ListAnalyzer:
    """Gives the faces it was made with, in that order."""

    name, embedding_dim = "list", 1

    def __init__(self, faces):
        self.faces = faces

    def analyze(self, image, det_size=640):
        return self.faces


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 60)] * 4), min_size=1, max_size=6))
def test_the_largest_face_gives_box_keypoints_and_embedding_alike(corners):
    """By area whatever the detector's order, and the pose never comes from another face than the identity."""
    faces = []
    for number, (x0, y0, w, h) in enumerate(corners):
        box = np.array([x0, y0, x0 + w, y0 + h], np.float32) * 0.5
        kps = (np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]]) * (w, h) + (x0, y0)).astype(np.float32) * 0.5
        faces.append(Face(box, kps, 0.9, np.array([number + 1], np.float32)))
    config = FilterConfig(min_side=16, max_faces=6, min_face_share=0.0, keypoints_inside=False)
    verdict = examine(config, photo([], (128, 128)), make=lambda: ListAnalyzer(faces))
    assert isinstance(verdict, Accepted)
    chosen = faces[int(verdict.record.embeddings[0, 0]) - 1]
    assert chosen.area == max(face.area for face in faces)
    assert np.array_equal(verdict.record.keypoints, chosen.kps) and np.array_equal(verdict.record.face_box, chosen.bbox)


def test_searching_harder_finds_more():
    class Shy(ColorAnalyzer):
        def analyze(self, image, det_size=640):
            return super().analyze(image) if det_size < 500 else []

    assert examine(LOOSE, FACE, make=Shy).code == "no_face"
    harder = examine(dataclasses.replace(LOOSE, search_harder=True), FACE, make=Shy)
    assert harder.record.embeddings.tolist() == [list(FACE_COLORS[0])]


def test_known_faces_are_taken_over():
    kps = np.array([[20, 18], [34, 18], [27, 25], [22, 31], [33, 31.0]], np.float32)
    given = KnownFace(kps, np.ones((2, 5), np.float32), np.array([15, 5, 41, 40], np.float32), 0.8, "antelopev2")
    r = examine(LOOSE, photo([]), face=given, make=lambda: pytest.fail("the detector was run")).record
    assert r.embedder == "antelopev2" and r.embeddings.shape == (2, 5) and np.array_equal(r.keypoints, kps) and r.det_score == pytest.approx(0.8)
    r = examine(LOOSE, FACE, face=KnownFace(kps, None)).record
    assert r.embedder == "colors" and r.embeddings.tolist() == [list(FACE_COLORS[0])] and np.array_equal(r.keypoints, kps)
    assert r.face_box[0] < 20 < 34 < r.face_box[2]
    # A drawing whose face only the plain rendering, twice as large, shows to the detector.
    plain = np.asarray(FACE.resize((128, 96), Image.Resampling.NEAREST))
    r = examine(LOOSE, photo([]), face=KnownFace(kps, None), face_image=plain).record
    assert r.embeddings.tolist() == [list(FACE_COLORS[0])] and np.array_equal(r.keypoints, kps)


def test_a_sample_that_breaks_something_is_refused_by_name():
    class Broken(ColorAnalyzer):
        def analyze(self, image, det_size=640):
            raise RuntimeError("out of order")

    verdict = examine(LOOSE, FACE, make=Broken)
    assert verdict.code == "failed" and verdict.message == "a.png: RuntimeError: out of order"
    zero = examine(LOOSE, FACE, make=lambda: ListAnalyzer([Face(np.zeros(4), np.zeros((5, 2)), 0.9, np.zeros(1))]))
    assert zero.code == "embedding_zero"


def _pictures(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8)).resize((320, 240), Image.Resampling.BICUBIC) for _ in range(count)]


def test_duplicates_by_picture_survive_resizing_and_compression():
    images = _pictures(12)
    marks = [fingerprint(b"", image, "picture") for image in images]
    assert not any(alike(a, b, "picture") for i, a in enumerate(marks) for b in marks[:i])
    for image, mark in zip(images, marks, strict=True):
        smaller = image.resize((200, 150), Image.Resampling.BICUBIC)
        stored = Image.open(io.BytesIO(encoded(smaller, "JPEG", quality=80)))
        again = fingerprint(b"", stored, "picture")
        assert alike(mark, again, "picture") and set(bands(mark, "picture")) & set(bands(again, "picture"))
    assert fingerprint(b"x", images[0], "none") == b"" and bands(b"", "none") == []
    assert not alike(fingerprint(b"x", images[0], "bytes"), fingerprint(b"y", images[0], "bytes"), "bytes")


@given(st.binary(min_size=32, max_size=32), st.sets(st.integers(0, 255), max_size=9))
def test_alike_pictures_share_a_band(mark, flips):
    other = bytearray(mark)
    for bit in flips:
        other[bit // 8] ^= 1 << bit % 8
    assert alike(mark, bytes(other), "picture") == (len(flips) <= 7)
    if len(flips) <= 7:
        assert set(bands(mark, "picture")) & set(bands(bytes(other), "picture"))


def test_the_first_of_duplicates_passes():
    record = examine(LOOSE, FACE).record
    one, two = (fingerprint(b"", image, "picture") for image in _pictures(2))
    near = bytes([one[0] ^ 0b111, *one[1:]])
    shown = [("a", one), ("b", two), ("c", near), ("a", b"3" * 32), ("d", b"3" * 32), ("e", one)]
    first = FirstSeen("picture")
    verdicts = [first(Accepted(dataclasses.replace(record, key=key), mark)) for key, mark in shown]
    codes = [v.code if isinstance(v, Refusal) else "" for v in verdicts]
    assert codes == ["", "", "duplicate", "duplicate_key", "", "duplicate"]
    assert verdicts[2].message == "c: is the same picture as a"
    exact = FirstSeen("bytes")
    assert [isinstance(exact(Accepted(dataclasses.replace(record, key=k), m)), Accepted) for k, m in shown] == [True, True, True, False, True, False]


def test_persons_stay_in_one_split():
    people = [Candidate(f"{i}", b"", identity=f"person {i // 4}") for i in range(4000)]
    splits = [split_by_share(p, 0.2) for p in people]
    assert all(len(set(splits[i : i + 4])) == 1 for i in range(0, 4000, 4))
    assert abs(splits.count("test") / 4000 - 0.2) < 0.05
    assert split_by_share(dataclasses.replace(people[0], split="validation"), 0.2) == "validation"
    assert {split_by_share(p, 0.0) for p in people} == {"train"}


def test_an_examiner_travels_to_other_processes():
    again = pickle.loads(pickle.dumps(Examiner(LOOSE, ColorAnalyzer)))
    assert again(candidate(FACE)).record.embedder == "colors"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("max_faces", 0, "must be at least 1, got 0"),
        ("min_face_share", 1.0, "must be at least 0 and below 1, got 1.0"),
        ("min_det_score", 2.0, "must be between 0 and 1, got 2.0"),
        ("min_det_score", float("nan"), "must be between 0 and 1, got nan"),
        ("min_side", -1, "must be at least 0, got -1"),
        ("min_eye_distance", -1.0, "must be at least 0, got -1.0"),
    ],
)
def test_a_threshold_out_of_range_is_named(field, value, says):
    with pytest.raises(DataError, match=f"^FilterConfig: {field} {says}$"):
        FilterConfig(**{field: value})
