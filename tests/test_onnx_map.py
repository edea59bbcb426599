"""Maps by ONNX models, against numpy and against the resizing of diffusers' depth examples."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from instantid_jax.onnx_map import ControlMapError, OnnxMap
from tests.fake_maps import WEIGHTS, save, write_depth, write_mix

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_depth_is_the_models_number_by_number(squeezed: bool, symmetric: bool, tmp_path: Path) -> None:
    made = OnnxMap(write_depth(tmp_path / "depth.onnx", sides=(96, 64), squeezed=squeezed), symmetric=symmetric)
    picture = photo(64, 96)
    x = np.asarray(picture) / 255.0
    x = x * 2 - 1 if symmetric else (x - MEAN) / STD
    depth = x @ WEIGHTS.astype(np.float64)
    np.testing.assert_allclose(made.predict(picture), depth[None], rtol=0, atol=2e-6)
    expected = (depth - depth.min()) / (depth.max() - depth.min()) * 255
    found = np.asarray(made(picture)).astype(int)
    assert found.shape == (96, 64, 3) and (found == found[..., :1]).all()
    assert (np.abs(found[..., 0] - np.floor(expected)) <= (np.abs(expected - np.round(expected)) < 1e-3)).all()  # one level where rounding decides
    assert found.min() == 0 and found.max() == 255


def test_depth_is_resized_as_in_diffusers_examples(tmp_path: Path) -> None:
    made = OnnxMap(write_depth(tmp_path / "depth.onnx", sides=(32, 48)))
    picture = photo(120, 90)
    depth = torch.from_numpy(made.predict(picture))[None]
    large = torch.nn.functional.interpolate(depth, size=(90, 120), mode="bicubic", align_corners=False)
    expected = ((large - large.min()) / (large.max() - large.min()) * 255.0)[0, 0].numpy()
    found = np.asarray(made(picture))[..., 0]
    assert made.predict(picture).shape == (1, 32, 48) and found.shape == (90, 120)
    assert (np.abs(found - np.floor(expected)) <= (np.abs(expected - np.round(expected)) < 1e-2)).all()


def test_near_and_far_change_places(tmp_path: Path) -> None:
    path, picture = write_depth(tmp_path / "depth.onnx", sides=(64, 64)), photo(64, 64)
    near, far = (np.asarray(OnnxMap(path, invert=invert)(picture)).astype(int) for invert in (False, True))
    assert set(np.unique(near + far)) <= {254, 255}  # both are cut to whole levels


@pytest.mark.parametrize(
    ("kind", "side", "sides", "size", "expected"),
    [
        ("depth", None, ("h", "w"), (1024, 1024), (448, 448)),
        ("depth", None, (None, None), (1280, 896), (672, 448)),
        ("depth", 518, ("h", "w"), (1024, 1536), (518, 784)),
        ("depth", 384, ("h", "w"), (640, 512), (480, 384)),
        ("depth", None, (64, 96), (640, 512), (96, 64)),
        ("depth", None, ("h", 96), (1280, 896), (96, 448)),
        ("image", None, ("h", "w"), (1280, 896), (704, 512)),
        ("image", 256, ("h", "w"), (64, 128), (256, 512)),
    ],
)
def test_models_work_at_documented_sides(kind: Any, side: int | None, sides: tuple[Any, Any], size: Any, expected: Any, tmp_path: Path) -> None:
    weights = WEIGHTS[None] if kind == "depth" else np.eye(3)
    made = OnnxMap(write_mix(tmp_path / "a.onnx", weights, sides=sides, batch="n"), kind, side=side)
    picture = photo(*size)
    assert made.predict(picture).shape[:0:-1] == expected and made(picture).size == size


@pytest.mark.parametrize("invert", [False, True])
def test_pictures_are_the_models(invert: bool, tmp_path: Path) -> None:
    swap = np.eye(3)[[2, 0, 1]]
    picture = photo(64, 128)
    made = OnnxMap(write_mix(tmp_path / "a.onnx", swap, sides=(128, 64)), "image", invert=invert)
    pixels = np.asarray(picture)[..., [2, 0, 1]]
    assert (np.asarray(made(picture)) == (255 - pixels if invert else pixels)).all()
    gray = OnnxMap(write_mix(tmp_path / "b.onnx", np.float32([[0, 1, 0]]), sides=(128, 64)), "image", invert=invert)
    assert (np.asarray(gray(picture)) == (255 - pixels if invert else pixels)[..., 2:]).all()


def test_half_precision(tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["image"], ["map"])
    made = OnnxMap(save(tmp_path / "a.onnx", [node], [1, 3, 64, 64], {}, TensorProto.FLOAT16), "image")
    picture = photo(64, 64)
    assert (np.asarray(made(picture)) == np.asarray(picture)).all()


def _refused(path: Path, kind: Any = "depth", **options: Any) -> str:
    with pytest.raises(ControlMapError) as caught:
        OnnxMap(path, kind, **options)(photo(64, 64))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def test_files_that_are_no_such_models(tmp_path: Path) -> None:
    identity, gone = [helper.make_node("Identity", ["image"], ["map"])], tmp_path / "gone.onnx"
    assert "there is no such file; name an ONNX model" in _refused(gone)
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    assert "cannot be loaded as an ONNX model (" in _refused(text)
    path = tmp_path / "a.onnx"
    assert "input has the shape [1, 4, 64, 64]; needed is [1, 3, height, width]" in _refused(save(path, identity, [1, 4, 64, 64], {}))
    assert "input has the shape [2, 3, 64, 64]" in _refused(save(path, identity, [2, 3, 64, 64], {}))
    assert "input has the shape [3, h, w]" in _refused(save(path, identity, [3, "h", "w"], {}))
    assert "its input is a tensor(uint8)" in _refused(save(path, identity, [1, 3, 64, 64], {}, TensorProto.UINT8))
    assert "output has the shape [1, 3, 64, 64]; depth needs [1, height, width]" in _refused(save(path, identity, [1, 3, 64, 64], {}))
    assert "output has the shape [1, 2, 64, 64]; image needs" in _refused(write_mix(path, np.eye(3)[:2], sides=(64, 64)), "image")
    assert "output has the shape [1, 64, 64]; image needs" in _refused(write_depth(path, sides=(64, 64), squeezed=True), "image")
    assert "works at 96 x 64 pixels alone; leave out the side of 518" in _refused(write_depth(path, sides=(64, 96)), side=518)
    model = onnx.load(str(save(path, [*identity, helper.make_node("Neg", ["image"], ["rest"])], [1, 3, 64, 64], {})))
    model.graph.output.append(helper.make_tensor_value_info("rest", TensorProto.FLOAT, None))
    onnx.save(model, str(path))
    assert "has 1 inputs and 2 outputs; export it with one picture in and one map out" in _refused(path)
    with pytest.raises(ControlMapError, match="kind must be one of depth, image, not 'pose'"):
        OnnxMap(path, "pose")  # type: ignore[arg-type]


def test_values_that_are_no_map(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    root = [helper.make_node("Sqrt", ["image"], ["root"]), helper.make_node("Gather", ["root", "red"], ["map"], axis=1)]
    assert "values that are not finite" in _refused(save(path, root, [1, 3, 64, 64], {"red": np.int64([0])}))  # of negative numbers
    assert "the same depth (0) everywhere" in _refused(write_mix(path, np.zeros((1, 3)), sides=(64, 64)))
    message = _refused(write_mix(path, np.eye(3) * 255, sides=(64, 64)), "image")
    assert "gave values from 0 to 255, and a picture's are from 0 to 1" in message
    reshape = [helper.make_node("Reshape", ["image", "shape"], ["map"])]
    dynamic = save(path, reshape, [1, 3, "h", "w"], {"shape": np.int64([1, 3, 384, 384])})
    assert "fails on 512 x 512 pixels (" in (message := _refused(dynamic, "image")) and "give a side that it takes, as image:384" in message
