"""Tiny ONNX models that map pictures or find keypoints, whose answers can be worked out by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WEIGHTS = np.array([0.5, -1.0, 2.0], np.float32)
"""Of red, green and blue in the depth of `write_depth`."""


def save(
    path: Path,
    nodes: list[Any],
    image: Sequence[Any],
    constants: dict[str, np.ndarray],
    kind: int = TensorProto.FLOAT,
    outputs: Sequence[str] = ("map",),
) -> Path:
    """A model from "image" to "map", or to other `outputs`."""
    graph = helper.make_graph(
        nodes,
        "fake",
        [helper.make_tensor_value_info("image", kind, list(image))],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
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


SIMCC = ("simcc_x", "simcc_y")


def write_simcc(path: Path, x: np.ndarray, y: np.ndarray, size: tuple[Any, Any], kind: int = TensorProto.FLOAT) -> Path:
    """A model of keypoints that always answers with `x` and `y`; `size` is the (w, h) of its input."""
    nodes = [helper.make_node("Identity", [name], [out]) for name, out in zip("xy", SIMCC, strict=True)]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    return save(path, nodes, ["batch", 3, size[1], size[0]], {"x": x.astype(dtype), "y": y.astype(dtype)}, kind, SIMCC)


def peaks(places: np.ndarray, bins: int, scores: np.ndarray) -> np.ndarray:
    """SimCC [1, k, bins] with `scores` [k] at `places` [k] and a little less than nothing elsewhere."""
    out = np.full((1, len(places), bins), -0.1, np.float32)
    out[0, np.arange(len(places)), places] = scores
    return out


def write_bright_spots(path: Path, size: tuple[int, int], points: int = 17) -> Path:
    """A model of keypoints that finds the brightest place of a channel: keypoint k in channel k modulo 3, scored with what the channel holds."""
    nodes = []
    for out, axis in zip(SIMCC, ("rows", "columns"), strict=True):
        nodes += [
            helper.make_node("ReduceMax", ["image"], [f"{out}_line"], axes=[2 if axis == "rows" else 3], keepdims=0),
            helper.make_node(
                "Resize", [f"{out}_line", "", "twice"], [f"{out}_wide"],
                mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
            ),
            helper.make_node("Gather", [f"{out}_wide", "channels"], [out], axis=1),
        ]  # fmt: skip
    constants = {"twice": np.float32([1, 1, 2]), "channels": np.arange(points) % 3}
    return save(path, nodes, [1, 3, size[1], size[0]], constants, outputs=SIMCC)
