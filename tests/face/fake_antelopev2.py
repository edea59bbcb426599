"""Tiny ONNX files with antelopev2's names, inputs and outputs, whose answers can be worked out by hand.

The detector's score at a cell of stride 8 is the mean of the cell's red channel after normalisation, so a cell of pure red on
a dark picture is one face; its box and keypoints are fixed offsets in units of the stride. The recogniser is a linear map of
the crop's mean colour after normalisation.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BOX = np.array([2.0, 2.5, 3.0, 3.5], np.float32)
"""Left, top, right, bottom from the cell's anchor, in strides."""

KPS = np.array([[-1, -1], [1, -1.1], [0.1, 0], [-0.8, 1], [0.9, 1.2]], np.float32)
"""The keypoints from the cell's anchor, in strides."""


def color_map(width: int = 512) -> np.ndarray:
    """(3, width): the recogniser's matrix."""
    return np.random.default_rng(7).normal(size=(3, width)).astype(np.float32)


def _save(path: Path, nodes: Sequence[onnx.NodeProto], image: list, outputs: list, constants: dict[str, np.ndarray]) -> None:
    graph = helper.make_graph(
        list(nodes),
        "fake",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def write_detector(path: Path, with_keypoints: bool = True) -> None:
    """A detector of 9 outputs (6 without keypoints): scores, boxes, keypoints at strides 8, 16, 32, two anchors a cell."""
    strides = (8, 16, 32)
    constants = {
        "red": np.array([0], np.int64),
        "zero": np.zeros((), np.float32),
        "column": np.array([-1, 1], np.int64),
        "box": BOX[None],
        "kps": KPS.reshape(1, 10),
    }
    nodes = [helper.make_node("Gather", ["image", "red"], ["red_channel"], axis=1)]
    outputs: dict[str, list] = {"score": [], "box": [], "kps": []}
    for s in strides:
        nodes += [
            helper.make_node("AveragePool", ["red_channel"], [f"pooled{s}"], kernel_shape=[s, s], strides=[s, s]),
            helper.make_node("Reshape", [f"pooled{s}", "column"], [f"cells{s}"]),
            helper.make_node("Mul", [f"cells{s}", "zero"], [f"none{s}"], name=f"times{s}"),
            helper.make_node("Concat", [f"cells{s}" if s == 8 else f"none{s}", f"none{s}"], [f"pairs{s}"], axis=1),
            helper.make_node("Reshape", [f"pairs{s}", "column"], [f"score{s}"]),
            helper.make_node("Mul", [f"score{s}", "zero"], [f"blank{s}"]),
            helper.make_node("Add", [f"blank{s}", "box"], [f"box{s}"]),
        ]
        outputs["score"].append((f"score{s}", ["n", 1]))
        outputs["box"].append((f"box{s}", ["n", 4]))
        if with_keypoints:
            nodes.append(helper.make_node("Add", [f"blank{s}", "kps"], [f"kps{s}"]))
            outputs["kps"].append((f"kps{s}", ["n", 10]))
    _save(path, nodes, [1, 3, "height", "width"], outputs["score"] + outputs["box"] + outputs["kps"], constants)


def write_recognizer(path: Path, width: int = 512, convolutions: int = 0, side: int = 112) -> None:
    """A recogniser; `convolutions` identity convolutions come first."""
    identity = np.eye(3, dtype=np.float32)[:, :, None, None]
    names = ["image", *(f"conv{i}" for i in range(convolutions))]
    nodes = [helper.make_node("Conv", [names[i], "identity"], [names[i + 1]]) for i in range(convolutions)]
    nodes += [
        helper.make_node("GlobalAveragePool", [names[-1]], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["color"]),
        helper.make_node("MatMul", ["color", "map"], ["embedding"]),
    ]
    constants = {"map": color_map(width)} | ({"identity": identity} if convolutions else {})
    _save(path, nodes, ["n", 3, side, side], [("embedding", ["n", width])], constants)


def write_antelopev2(folder: Path) -> Path:
    """Both files, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_detector(folder / "scrfd_10g_bnkps.onnx")
    write_recognizer(folder / "glintr100.onnx")
    return folder
