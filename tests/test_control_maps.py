"""Edges, the texts of preprocessors, and the command that makes one map."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from instantid_jax import control_maps as module
from instantid_jax.control_maps import ControlMapError, Preprocessor, canny, check_preprocessors, control_maps, fitted, main, read_preprocessor
from instantid_jax.face import load_photo, resize_img
from instantid_jax.onnx_pose import OnnxPose
from tests.fake_maps import peaks, write_depth, write_simcc

PHOTO = Path(module.__file__).parent / "assets/astronaut.jpg"


@pytest.mark.parametrize("thresholds", [(100, 200), (50, 100), (0, 0), (30.5, 400)])
def test_canny_is_opencvs_as_the_published_demo_calls_it(thresholds: tuple[float, float]) -> None:
    photo = load_photo(PHOTO)
    edges = np.asarray(canny(photo, *thresholds))
    expected = cv2.Canny(cv2.cvtColor(np.array(photo), cv2.COLOR_RGB2BGR), *thresholds)[:, :, None]
    assert (edges == np.concatenate([expected] * 3, axis=2)).all() and edges.shape == (*photo.size[::-1], 3)
    assert set(np.unique(edges)) == {0, 255} and 0.01 < (edges > 0).mean() < 0.6


def test_diffusers_examples_keep_rgb_which_changes_few_pixels() -> None:
    photo = load_photo(PHOTO)
    differ = np.asarray(canny(photo))[..., 0] != cv2.Canny(np.array(photo), 100, 200)
    assert 0 < differ.mean() < 1e-3


@pytest.mark.parametrize(
    ("step", "low", "high", "found"),
    [(51, 100, 200, True), (50, 100, 200, False), (26, 100, 104, False), (26, 100, 103, True), (2, 7, 7, True), (2, 8, 8, False)],
)
def test_an_edge_is_where_the_gradient_is_above_the_upper_threshold(step: int, low: float, high: float, found: bool) -> None:
    pixels = np.full((32, 32, 3), 100, np.uint8)
    pixels[:, 16:, 1] += step  # Sobel's 1 + 2 + 1 makes it four steps; the strongest channel counts
    edges = np.asarray(canny(pixels, low, high))
    assert (edges[8:-8, 15:17].max(axis=(1, 2)) == 255 * found).all() and not edges[:, :15].any() and not edges[:, 17:].any()


def test_an_edge_goes_on_above_the_lower_threshold() -> None:
    pixels = np.full((48, 32, 3), 100, np.uint8)
    pixels[:24, 16:] += 60
    pixels[24:, 16:] += 30  # 120: no edge of its own
    column = np.asarray(canny(pixels, 100, 200))[..., 0].max(axis=1)
    assert (column[4:-4] == 255).all()
    assert not np.asarray(canny(pixels[26:], 100, 200)).any()


@pytest.mark.parametrize("thresholds", [(200, 100), (-1, 100), (100, float("nan")), (0, float("inf"))])
def test_wrong_thresholds(thresholds: tuple[float, float]) -> None:
    with pytest.raises(ControlMapError, match="from 0 up, the lower one first"):
        canny(Image.new("RGB", (64, 64)), *thresholds)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", Preprocessor()),
        ("canny", Preprocessor("canny", (100, 200))),
        ("canny:50, 120.5", Preprocessor("canny", (50, 120.5))),
        ("depth", Preprocessor("depth")),
        ("depth:invert,518", Preprocessor("depth", side=518, invert=True)),
        ("image:symmetric", Preprocessor("image", symmetric=True)),
        ("pose", Preprocessor("pose")),
        ("pose:body", Preprocessor("pose", parts=("body",))),
        ("pose:body, hands,0.25,0,.75,1", Preprocessor("pose", parts=("body", "hands"), box=(0.25, 0, 0.75, 1))),
    ],
)
def test_texts(text: str, expected: Preprocessor) -> None:
    assert read_preprocessor(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cany", "no preprocessor 'cany'; known: none, canny, depth, image, pose; did you mean 'canny'?"),
        ("", "no preprocessor ''"),
        ("none:1", "none takes no arguments"),
        ("canny:100", "canny takes two thresholds, as canny:100,200"),
        ("canny:1,2,3", "canny takes two thresholds"),
        ("canny:200,100", "the lower one first"),
        ("canny:nan,nan", "the lower one first"),
        ("depth:midas.onnx", "the model's file has an option of its own"),
        ("depth:inverse", "not 'inverse'; did you mean 'invert'?"),
        ("depth:", "depth takes invert, symmetric, or a side in pixels, not ''"),
        ("image:8", "the side must be between 32 and 4096 pixels, not 8"),
        ("pose:bdoy", "pose takes body, hands, face, or four numbers, the person's box, not 'bdoy'; did you mean 'body'?"),
        ("pose:", "pose takes body, hands, face, or four numbers, the person's box, not ''"),
        ("pose:dw-ll_ucoco_384.onnx", "the model's file has an option of its own; here are body, hands, face, or the person's box"),
        ("pose:body,0,0,1", "the person's box is four parts of the photo from 0 to 1, left, top, right, bottom, not 0, 0, 1"),
        ("pose:10,20,200,400", "the person's box is four parts of the photo from 0 to 1"),
    ],
)
def test_wrong_texts(text: str, message: str) -> None:
    with pytest.raises(ControlMapError) as caught:
        read_preprocessor(text)
    assert message in str(caught.value)


def test_counts() -> None:
    assert [one.name for one in check_preprocessors(["none", "depth", "canny"], 1, 3)] == ["none", "depth", "canny"]
    assert check_preprocessors([], 0, 3) == []
    with pytest.raises(ControlMapError, match="--control-preprocess has 1 values for 2 --controlnet"):
        check_preprocessors(["canny"], 0, 2)
    with pytest.raises(ControlMapError, match=r"--control-model has 1 files, --control-preprocess asks for 2"):
        check_preprocessors(["depth", "image"], 1, 2)
    with pytest.raises(ControlMapError, match=r"asks for 3 \(each depth, image and pose needs one, in their order\)"):
        check_preprocessors(["pose:body", "depth", "image"], 2, 3)
    with pytest.raises(ControlMapError, match="--control-model has 1 files, --control-preprocess asks for 0"):
        check_preprocessors([], 1, 1)
    with pytest.raises(ControlMapError, match="image needs an ONNX model"):
        Preprocessor("image")(Image.new("RGB", (64, 64)))


def test_maps_are_made_at_the_outputs_size(tmp_path: Path) -> None:
    photo, model = load_photo(PHOTO), write_depth(tmp_path / "depth.onnx")
    wide = photo.crop((0, 0, 512, 100))
    kept, edges, depth = control_maps([photo, wide, photo], ["none", "canny", "depth"], [model], (260, 132))
    assert kept is photo and edges.size == depth.size == (256, 128)
    assert (np.asarray(edges) == np.asarray(canny(wide.resize((256, 128), Image.Resampling.BILINEAR)))).all()
    assert control_maps([photo], [], [], (64, 64)) == [photo]


def test_poses_are_drawn_at_the_outputs_size(tmp_path: Path) -> None:
    photo, model = load_photo(PHOTO), tmp_path / "pose.onnx"
    write_simcc(model, *(peaks(np.arange(133) * 3 + 20, bins, np.full(133, 0.9)) for bins in (576, 768)), (288, 384))
    whole, body, boxed = control_maps([photo] * 3, ["pose", "pose:body", "pose:0.5,0,1,1"], [model] * 3, (256, 128))
    seen = fitted(photo, (256, 128))
    assert whole.size == (256, 128) and (np.asarray(whole) == np.asarray(OnnxPose(model)(seen))).all()
    assert (np.asarray(body) == np.asarray(OnnxPose(model, parts=["body"])(seen))).all() and (np.asarray(body) != np.asarray(whole)).any()
    assert (np.asarray(boxed) == np.asarray(OnnxPose(model, box=(0.5, 0, 1, 1))(seen))).all() and (np.asarray(boxed) != np.asarray(whole)).any()
    assert not np.asarray(boxed)[:, :64].any()


def test_of_the_pose_photo_they_have_the_published_resizing() -> None:
    photo = load_photo(PHOTO).crop((0, 0, 500, 330))
    published = resize_img(photo)
    assert (np.asarray(fitted(photo, published.size)) == np.asarray(published)).all()
    assert (np.asarray(published) != np.asarray(photo.resize(published.size, Image.Resampling.BILINEAR))).any()
    assert fitted(Image.new("RGB", (2000, 20)), (256, 256)).size == (256, 256)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, model = tmp_path / "map.png", write_depth(tmp_path / "depth.onnx")
    assert main(["depth", str(PHOTO), "--model", str(model), "--width", "128", "--height", "64", "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert image.size == (128, 64) and image.mode == "RGB" and image.getextrema() == ((0, 255),) * 3
    assert capsys.readouterr().out == f"{out}\n"
    for arguments, status, message in [
        (["cany", str(PHOTO)], 2, "did you mean 'canny'?"),
        (["depth", str(PHOTO)], 2, "--model: depth needs an ONNX model"),
        (["canny", str(PHOTO), "--model", str(model)], 2, "--model: canny has no model; leave it out"),
        (["pose", str(PHOTO)], 2, "--model: pose needs an ONNX model"),
        (["pose", str(PHOTO), "--model", str(model)], 1, "depth.onnx: has 1 inputs and 1 outputs; pose needs one picture in and two out"),
        (["canny", str(PHOTO), "--width", "8"], 2, "--width and --height must be between 64 and 16384"),
        (["canny", str(tmp_path / "gone.png")], 1, "gone.png: there is no such file"),
        (["depth", str(PHOTO), "--model", str(PHOTO)], 1, "astronaut.jpg: cannot be loaded as an ONNX model"),
        (["canny", str(PHOTO), "--out", str(tmp_path / "gone/map.png")], 2, "there is no folder"),
        (["canny", str(PHOTO), "--out", str(tmp_path / "map.txt")], 1, "unknown file extension"),
    ]:
        assert main(["--out", str(out), *arguments]) == status
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("control_maps: ") and message in lines[0]
