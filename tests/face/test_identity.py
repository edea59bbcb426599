import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from instantid_jax.face import (
    EmbeddingError,
    Face,
    FaceError,
    Identity,
    KeypointError,
    analyze_photo,
    check_embedding,
    examine_photo,
    identity_from_photos,
    largest_face,
    load_precomputed,
    save_precomputed,
)

KPS = np.array([[30, 40], [60, 41], [45, 55], [33, 70], [58, 71]], np.float32)
PHOTO = np.full((100, 120, 3), 128, np.uint8)


def a_face(x0=20.0, y0=30.0, x1=70.0, y1=80.0, score=0.9, kps=KPS, embedding=None) -> Face:
    embedding = np.arange(1, 5, dtype=np.float32) if embedding is None else np.asarray(embedding, np.float32)
    return Face(np.array([x0, y0, x1, y1], np.float32), kps, score, embedding)


class Scripted:
    """An analyzer that answers from a function of (image, det_size) and remembers what it was asked."""

    name = "scripted"
    embedding_dim = 4

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    def analyze(self, image, det_size=640):
        self.asked.append((det_size, image.shape[:2], int(image[0, 0, 0])))
        return self.answer(image, det_size)


def always(*faces: Face) -> Scripted:
    return Scripted(lambda image, det_size: list(faces))


# --- which face


@pytest.mark.parametrize("seed", range(50))
def test_the_largest_face_is_the_largest_by_area(seed):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-50, 500, (rng.integers(1, 9), 2))
    extents = rng.uniform(1, 300, corners.shape)
    faces = [a_face(*corner, *(corner + extent), score=rng.uniform()) for corner, extent in zip(corners, extents, strict=True)]
    areas = [float((f.bbox[2] - f.bbox[0]) * (f.bbox[3] - f.bbox[1])) for f in faces]
    assert largest_face(faces) == int(np.argmax(areas))
    chosen = analyze_photo(always(*faces), PHOTO, on_several="largest")
    np.testing.assert_array_equal(chosen.bbox, faces[int(np.argmax(areas))].bbox)


def test_area_is_width_times_height():
    # The precedence slip (x1 - x0) * y1 - y0 would choose the wide one at the bottom.
    low, big = a_face(0, 900, 60, 910), a_face(0, 0, 50, 100)
    assert (low.area, big.area) == (600, 5000)
    assert largest_face([low, big]) == 1
    with pytest.raises(FaceError, match="no face"):
        largest_face([])


def test_several_faces_are_an_error_that_names_the_largest():
    faces = always(a_face(70, 0, 90, 20), a_face(0, 10, 50, 60, embedding=[9, 9, 9, 9]), a_face(95, 0, 99, 9))
    with pytest.raises(FaceError) as caught:
        analyze_photo(faces, PHOTO, name="a.jpg")
    assert caught.value.code == "several_faces"
    assert str(caught.value) == (
        "a.jpg: 3 faces found; the largest spans x 0 to 50, y 10 to 60: choose it with --face-index 0, "
        "or another one with 0 to 2, counted from the left"
    )
    assert analyze_photo(faces, PHOTO, face_index=0).embedding[0] == 9
    assert analyze_photo(faces, PHOTO, face_index=2).bbox[0] == 95


def test_two_faces_are_several():
    with pytest.raises(FaceError, match=r"2 faces found; .* --face-index 1"):
        analyze_photo(always(a_face(0, 0, 10, 10), a_face(50, 0, 70, 20)), PHOTO)


def test_an_index_out_of_range_and_an_unknown_policy():
    for index in (1, -1):
        with pytest.raises(FaceError, match=rf"there is no face {index}; 1 found") as caught:
            analyze_photo(always(a_face()), PHOTO, face_index=index)
        assert caught.value.code == "bad_index"
    with pytest.raises(FaceError, match="on_several='smallest' is not known"):
        analyze_photo(always(a_face()), PHOTO, on_several="smallest")  # type: ignore[arg-type]


def test_no_face_is_an_error_or_skipped():
    none = always()
    with pytest.raises(FaceError, match=r"a\.jpg: no face found in 120 x 100 pixels") as caught:
        analyze_photo(none, PHOTO, name="a.jpg")
    assert caught.value.code == "no_face"
    assert analyze_photo(none, PHOTO, on_none="skip") is None


@pytest.mark.parametrize(
    ("face", "error", "code"),
    [
        (a_face(kps=np.full((5, 2), np.nan, np.float32)), KeypointError, "keypoints_not_finite"),
        (a_face(embedding=[0, 0, 0, 0]), EmbeddingError, "embedding_zero"),
        (a_face(embedding=[1, np.nan, 0, 0]), EmbeddingError, "embedding_not_finite"),
        (a_face(embedding=np.ones(128)), EmbeddingError, "embedding_dim"),
    ],
)
def test_an_unusable_detection_is_named(face, error, code):
    with pytest.raises(error, match=r"^a\.jpg: ") as caught:
        analyze_photo(always(face), PHOTO, name="a.jpg")
    assert caught.value.code == code


# --- looking again


def test_sizes_then_borders_are_tried_in_order():
    blind = always()
    analyze_photo(blind, PHOTO, on_none="skip")
    sizes = [(size, (100, 120), 128) for size in (640, 576, 512, 448, 384, 320, 256, 192)]
    borders = [(640, (160, 180), 255), (640, (160, 180), 0), (640, (220, 240), 255), (640, (220, 240), 0)]
    assert blind.asked == sizes + borders


def test_a_face_found_with_a_border_is_mapped_back_and_not_clamped():
    shifted = a_face(25, 32, 100, 110, kps=KPS - np.array([10, 0], np.float32))
    found = Scripted(lambda image, det_size: [shifted] if image.shape[0] > 100 else [])
    face, report = examine_photo(found, PHOTO)
    assert face is not None
    np.testing.assert_array_equal(face.bbox, [-5, 2, 70, 80])
    np.testing.assert_array_equal(face.kps, KPS - [40, 30])
    assert (report.border, report.det_size, report.faces, report.keypoints_outside) == (30, 640, 1, 2)


def test_tight_crops_of_real_photos_are_found(analyzer, astronaut, tight_crop):
    face, report = examine_photo(analyzer, tight_crop)
    assert face is not None and face.det_score > 0.8 and report.faces == 1
    (whole,) = analyzer.analyze(astronaut)
    close = Image.fromarray(astronaut).crop((190, 90, 265, 175)).resize((1024, 1200))
    assert analyzer.analyze(np.asarray(close)) == [], "missed at the usual size"
    face, report = examine_photo(analyzer, close)
    assert face is not None and report.det_size < 640
    scale = np.array([1024 / 75, 1200 / 85])
    eyes_apart = 43.7
    np.testing.assert_allclose(face.kps / scale + [190, 90], whole.kps, atol=0.15 * eyes_apart)


def test_a_photo_without_a_face_stays_without(analyzer):
    with pytest.raises(FaceError) as caught:
        analyze_photo(analyzer, np.random.default_rng(0).integers(0, 256, (160, 200, 3), dtype=np.uint8))
    assert caught.value.code == "no_face"


def test_the_largest_of_six(analyzer, six_people):
    with pytest.raises(FaceError, match=r"6 faces found; .* choose it with --face-index 2"):
        analyze_photo(analyzer, six_people)
    largest, second = (analyze_photo(analyzer, six_people, face_index=i) for i in (2, 1))
    assert largest.area > second.area
    np.testing.assert_array_equal(analyze_photo(analyzer, six_people, on_several="largest").embedding, largest.embedding)
    lefts = [float(analyze_photo(analyzer, six_people, face_index=i).bbox[0]) for i in range(6)]
    assert lefts == sorted(lefts)


# --- one identity


def test_one_photo_keeps_its_raw_embedding(analyzer, astronaut):
    identity = identity_from_photos(analyzer, [astronaut])
    (face,) = analyzer.analyze(astronaut)
    np.testing.assert_array_equal(identity.embedding, face.embedding)
    np.testing.assert_array_equal(identity.kps, face.kps)
    assert (identity.size, identity.analyzer) == ((512, 512), "opencv")
    (report,) = identity.reports
    assert (report.faces, report.border, report.det_size, report.similarity) == (1, 0, 640, None)
    assert abs(report.embedding_norm - np.linalg.norm(face.embedding)) < 1e-4


def test_several_photos_are_averaged_raw_and_keep_the_first_face():
    vectors = {10: [4, 0, 0, 2], 20: [0, 8, 0, 2], 30: [2, 1, 0, 2]}
    by_brightness = Scripted(lambda image, det_size: [a_face(embedding=vectors[int(image[0, 0, 0])], score=image[0, 0, 0] / 100)])
    photos = [np.full((100, 120 + i, 3), value, np.uint8) for i, value in enumerate(vectors)]
    identity = identity_from_photos(by_brightness, photos, names=["a", "b", "c"])
    np.testing.assert_allclose(identity.embedding, [2, 3, 0, 2])
    assert identity.face is not None and identity.face.det_score == 0.1
    assert identity.size == (120, 100)
    assert [report.name for report in identity.reports] == ["a", "b", "c"]
    mean = np.array([2, 3, 0, 2])
    expected = [np.dot(v, mean) / np.linalg.norm(v) / np.linalg.norm(mean) for v in vectors.values()]
    assert [report.similarity for report in identity.reports] == pytest.approx(expected, rel=1e-5)
    assert [report.weight for report in identity.reports] == pytest.approx([1 / len(expected)] * len(expected))
    assert all(report.rest is not None and -1 <= report.rest <= 1 for report in identity.reports)


def test_photos_without_a_face_can_be_left_out():
    sees_bright = Scripted(lambda image, det_size: [a_face()] if image[image.shape[0] // 2, image.shape[1] // 2, 0] > 100 else [])
    dark = np.zeros((50, 60, 3), np.uint8)
    identity = identity_from_photos(sees_bright, [dark, PHOTO], on_none="skip")
    assert identity.size == (120, 100)
    assert [report.faces for report in identity.reports] == [0, 1]
    with pytest.raises(FaceError, match="photo 1: no face"):
        identity_from_photos(sees_bright, [dark, PHOTO])
    with pytest.raises(FaceError, match="in any of 2 photos"):
        identity_from_photos(sees_bright, [dark, dark], on_none="skip")


def test_face_index_for_all_photos_or_for_each():
    two = always(a_face(0, 0, 10, 10, embedding=[1, 0, 0, 0]), a_face(50, 0, 60, 10, embedding=[0, 1, 0, 0]))
    np.testing.assert_array_equal(identity_from_photos(two, [PHOTO, PHOTO], face_index=1).embedding, [0, 1, 0, 0])
    np.testing.assert_array_equal(identity_from_photos(two, [PHOTO, PHOTO], face_index=[1, 0]).embedding, [0.5, 0.5, 0, 0])
    with pytest.raises(FaceError, match="2 photos, 2 names, 2 sizes and 1 face indices"):
        identity_from_photos(two, [PHOTO, PHOTO], face_index=[1])
    with pytest.raises(FaceError, match="at least one"):
        identity_from_photos(two, [])


def test_embeddings_that_cancel_are_refused():
    opposite = Scripted(lambda image, det_size: [a_face(embedding=np.ones(4) * (1 if image[0, 0, 0] else -1))])
    with pytest.raises(EmbeddingError, match="mean of the photos' embeddings"):
        identity_from_photos(opposite, [np.zeros_like(PHOTO), PHOTO])


@pytest.mark.parametrize(
    ("embedding", "dim", "code"),
    [
        (np.zeros(512), 512, "embedding_zero"),
        (np.ones(128), 512, "embedding_dim"),
        (np.ones(1024), 512, "embedding_dim"),
        (np.ones((2, 512)), 512, "embedding_shape"),
        (np.ones(()), None, "embedding_shape"),
        (np.empty(0), None, "embedding_shape"),
        (np.array(["a"] * 512), 512, "embedding_shape"),
        (np.where(np.arange(512) == 3, np.nan, 1), 512, "embedding_not_finite"),
        (np.full(512, 1e300), 512, "embedding_not_finite"),
    ],
)
def test_unusable_embeddings_are_named(embedding, dim, code):
    with pytest.raises(EmbeddingError, match=r"^where: ") as caught:
        check_embedding(embedding, dim, "where")
    assert caught.value.code == code


def test_a_row_is_an_embedding():
    assert check_embedding(np.ones((1, 512)), 512).shape == (512,)


# --- stored identities


def test_a_stored_identity_comes_back(tmp_path):
    identity = Identity(np.arange(1, 5, dtype=np.float32), a_face(), (120, 100), "scripted")
    save_precomputed(tmp_path / "face.npz", identity)
    loaded = load_precomputed(tmp_path / "face.npz", embedding_dim=4)
    np.testing.assert_array_equal(loaded.embedding, identity.embedding)
    np.testing.assert_array_equal(loaded.kps, KPS)
    assert (loaded.size, loaded.analyzer) == ((120, 100), "precomputed")
    assert loaded.face is not None
    np.testing.assert_array_equal(loaded.face.bbox, [30, 40, 60, 71])


def test_an_embedding_alone_has_no_face(tmp_path):
    np.save(tmp_path / "face.npy", np.ones((1, 512)))
    np.savez(tmp_path / "face.npz", embedding=np.ones(512))
    for name in ("face.npy", "face.npz"):
        identity = load_precomputed(tmp_path / name)
        assert identity.embedding.shape == (512,)
        assert (identity.face, identity.kps, identity.size) == (None, None, None)
    save_precomputed(tmp_path / "again.npz", replace(identity))
    assert load_precomputed(tmp_path / "again.npz").kps is None


@pytest.mark.parametrize(
    ("arrays", "code"),
    [
        ({"kps": KPS}, "embedding_file"),
        ({"embedding": np.ones(128)}, "embedding_dim"),
        ({"embedding": np.full(512, np.nan)}, "embedding_not_finite"),
        ({"embedding": np.zeros(512)}, "embedding_zero"),
        ({"embedding": np.ones(512), "kps": KPS[:4]}, "keypoints_shape"),
        ({"embedding": np.ones(512), "kps": KPS * np.nan}, "keypoints_not_finite"),
        ({"embedding": np.ones(512), "kps": KPS, "size": np.array([640])}, "embedding_file"),
        ({"embedding": np.ones(512), "kps": KPS, "size": np.array([0, 640])}, "embedding_file"),
        ({"embedding": np.ones(512), "kps": KPS, "size": np.array([64.5, 640])}, "embedding_file"),
        ({"embedding": np.array([{"a": 1}], dtype=object)}, "embedding_file"),
        ({"embedding": np.ones(200_000)}, "embedding_file"),
    ],
)
def test_unusable_stored_identities_are_named(tmp_path, arrays, code):
    path = tmp_path / "face.npz"
    np.savez(path, **arrays)
    with pytest.raises(FaceError) as caught:
        load_precomputed(path, embedding_dim=512)
    assert caught.value.code == code
    assert str(path) in str(caught.value)


def test_files_that_are_no_arrays_are_named(tmp_path):
    for name, content in (("a.npy", b"<html>"), ("a.npz", b"<html>"), ("empty.npy", b""), ("a.txt", b"1 2 3")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EmbeddingError, match=name) as caught:
            load_precomputed(tmp_path / name)
        assert caught.value.code == "embedding_file"
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("embedding.npy", b"not an array")
    with pytest.raises(EmbeddingError, match=r"b\.npz"):
        load_precomputed(tmp_path / "b.npz")
    with pytest.raises(EmbeddingError, match="no such file"):
        load_precomputed(tmp_path / "none.npz")
