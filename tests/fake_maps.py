"""Tiny ONNX models that map pictures, whose answers can be worked out by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WEIGHTS = np.array([0.5, -1.0, 2.0], np.float32)
"""Of red, green and blue in the depth of `write_depth`."""


def save(path: Path, nodes: list[Any], image: Sequence[Any], constants: dict[str, np.ndarray], kind: int = TensorProto.FLOAT) -> Path:
    """A model from "image" to "map"."""
    graph = helper.make_graph(
        nodes,
        "fake",
        [helper.make_tensor_value_info("image", kind, list(image))],
        [helper.make_tensor_value_info("map", kind, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def write_mix(path: Path, weights: np.ndarray, sides: Sequence[Any] = ("h", "w"), batch: Any = 1, squeezed: bool = False) -> Path:
    """A 1 x 1 convolution with `weights` [out, 3]; `squeezed` takes the first channel alone: [1, h, w]."""
    nodes = [helper.make_node("Conv", ["image", "weights"], ["mixed" if squeezed else "map"])]
    constants = {"weights": np.asarray(weights, np.float32)[:, :, None, None]}
    if squeezed:
        nodes.append(helper.make_node("Squeeze", ["mixed", "axis"], ["map"]))
        constants["axis"] = np.int64([1])
    return save(path, nodes, [batch, np.shape(weights)[1], *sides], constants)


def write_depth(path: Path, **options: Any) -> Path:
    """Depth that is a weighted sum of the channels, by `WEIGHTS`."""
    return write_mix(path, WEIGHTS[None], **options)
