"""Keypoints of ONNX models, back in the photo's pixels, and the pictures that are drawn of them."""

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from onnx import TensorProto, helper
from PIL import Image

from instantid_jax.onnx_map import ControlMapError, OnnxMap
from instantid_jax.onnx_pose import PARTS, OnnxPose, Pose, draw_pose
from tests.fake_maps import SIMCC, peaks, save, write_bright_spots, write_depth, write_simcc

MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
DWPOSE = (288, 384)
COLOURS = [
    [255, 0, 0], [255, 85, 0], [255, 170, 0], [255, 255, 0], [170, 255, 0], [85, 255, 0], [0, 255, 0], [0, 255, 85], [0, 255, 170],
    [0, 255, 255], [0, 170, 255], [0, 85, 255], [0, 0, 255], [85, 0, 255], [170, 0, 255], [255, 0, 255], [255, 0, 170], [255, 0, 85],
]  # fmt: skip


def photo(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


def frame(size: tuple[int, int], box: Any, wanted: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """mmpose's centre and scale of a box in parts of the photo: padded by 1.25, then extended to the input's proportions."""
    left, top, right, bottom = np.asarray(box or (0, 0, 1, 1)) * (*size, *size)
    scale = np.array([right - left, bottom - top]) * 1.25
    aspect = wanted[0] / wanted[1]
    scale = np.array([scale[0], scale[0] / aspect]) if scale[0] > scale[1] * aspect else np.array([scale[1] * aspect, scale[1]])
    return np.array([left + right, top + bottom]) / 2, scale


@pytest.mark.parametrize("points", [17, 133])
@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize(
    ("size", "wanted", "box"),
    [
        ((640, 480), DWPOSE, None),
        ((300, 900), DWPOSE, None),
        ((640, 480), (192, 256), (0.25, 0.1, 0.6, 0.95)),
        ((64, 64), (256, 192), (0, 0, 1, 0.5)),
    ],
)
def test_keypoints_come_back_in_the_photos_pixels(size: Any, wanted: Any, box: Any, ratio: int, points: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(points)
    centre, scale = frame(size, box, wanted)
    asked = rng.uniform(0, 1, (points, 2)) * size  # photo pixels
    bins = np.array(wanted) * ratio
    places = np.clip(np.round(((asked - centre) / scale + 0.5) * bins), 0, bins - 1).astype(int)
    scores = rng.uniform(0.1, 1, (2, points)).astype(np.float32)
    path = write_simcc(tmp_path / "a.onnx", peaks(places[:, 0], bins[0], scores[0]), peaks(places[:, 1], bins[1], scores[1]), wanted)
    found = OnnxPose(path, box=box).predict(photo(*size))
    np.testing.assert_allclose(found.points, places / ratio / wanted * scale + centre - scale / 2, rtol=0, atol=1e-9 * max(size))
    np.testing.assert_array_equal(found.scores, scores.min(axis=0))
    inside = ((places > 0) & (places < bins - 1)).all(axis=1)
    assert inside.sum() > points / 4 and (np.abs(found.points - asked)[inside] <= 0.5 * (scale / bins).max() + 1e-6).all()


def test_the_photo_is_warped_as_the_points_are(tmp_path: Path) -> None:
    model = OnnxPose(write_bright_spots(tmp_path / "a.onnx", (90, 120)))
    pixels, spots = np.zeros((192, 144, 3), np.uint8), [(60, 100), (0, 0), (142, 190)]  # where every second pixel is looked at
    for channel, (x, y) in enumerate(spots):
        pixels[y, x, channel] = 200 - channel
    found = model.predict(Image.fromarray(pixels))
    np.testing.assert_allclose(found.points[:3], spots, atol=1e-9)  # red is the first channel: RGB
    np.testing.assert_allclose(found.scores[:3], (np.array([200, 199, 198]) - MEAN) / STD, rtol=1e-6)


@pytest.mark.parametrize("box", [None, (0.2, 0.05, 0.9, 0.7)])
def test_spots_of_a_photo_are_found_to_half_a_pixel_of_the_model(box: Any, tmp_path: Path) -> None:
    model, pixels = OnnxPose(write_bright_spots(tmp_path / "a.onnx", DWPOSE), box=box), np.zeros((800, 1000, 3), np.uint8)
    spots = np.array([(301.0, 203.0), (555.0, 333.0), (720.0, 480.0)])
    rows, columns = np.mgrid[:800, :1000]
    for channel, (x, y) in enumerate(spots):
        pixels[..., channel] = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 200)
    found = model.predict(pixels)
    zoom = DWPOSE[0] / frame((1000, 800), box, DWPOSE)[1][0]
    assert (np.abs(found.points[:3] - spots) <= 0.55 / zoom).all()


def test_half_precision(tmp_path: Path) -> None:
    x, y = (peaks(np.arange(17) + 5, bins, np.full(17, 0.5)) for bins in (96, 128))
    model = OnnxPose(write_simcc(tmp_path / "a.onnx", x, y, (48, 64), TensorProto.FLOAT16))
    assert np.asarray(model(photo(60, 80))).any() and model.predict(photo(60, 80)).scores.dtype == np.float32


def published(pose: Pose, side: int) -> np.ndarray:
    """The picture as DWPose draws it at 512 pixels, its loops written out."""
    canvas = np.zeros((side, side, 3), np.uint8)
    neck = (pose.points[5] + pose.points[6]) / 2
    names = [0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
    points = [neck if name is None else pose.points[name] for name in names]
    seen = [min(pose.scores[5], pose.scores[6]) > 0.3 if name is None else pose.scores[name] > 0.3 for name in names]
    limbs = "2-3 2-6 3-4 4-5 6-7 7-8 2-9 9-10 10-11 2-12 12-13 13-14 2-1 1-15 15-17 1-16 16-18"
    for limb, colour in zip(limbs.split(), COLOURS, strict=False):
        a, b = (int(number) - 1 for number in limb.split("-"))
        if seen[a] and seen[b]:
            (x1, y1), (x2, y2) = points[a], points[b]
            axes = int(math.hypot(y1 - y2, x1 - x2) / 2), 4
            angle = int(math.degrees(math.atan2(y1 - y2, x1 - x2)))
            cv2.fillConvexPoly(canvas, cv2.ellipse2Poly((int((x1 + x2) / 2), int((y1 + y2) / 2)), axes, angle, 0, 360, 1), colour)
    canvas = (canvas * 0.6).astype(np.uint8)
    for point, one, colour in zip(points, seen, COLOURS, strict=True):
        if one:
            cv2.circle(canvas, (int(point[0]), int(point[1])), 4, colour, -1)
    if len(pose.points) == 17:
        return canvas
    fingers = [[0, 1], [1, 2], [2, 3], [3, 4], [0, 5], [5, 6], [6, 7], [7, 8], [0, 9], [9, 10], [10, 11], [11, 12], [0, 13], [13, 14], [14, 15]]
    fingers += [[15, 16], [0, 17], [17, 18], [18, 19], [19, 20]]
    for start in (91, 112):
        whole = pose.points[start : start + 21].astype(int).tolist()
        ok = pose.scores[start : start + 21] > 0.3
        for i, (a, b) in enumerate(fingers):
            if ok[a] and ok[b]:
                hue = cv2.cvtColor(np.float32([[[i / 20 * 360, 1, 1]]]), cv2.COLOR_HSV2RGB)[0, 0]
                cv2.line(canvas, whole[a], whole[b], [float(np.round(255 * level)) for level in hue], 2)
        for point, one in zip(whole, ok, strict=True):
            if one:
                cv2.circle(canvas, point, 4, (0, 0, 255), -1)
    for point, score in zip(pose.points[23:91].astype(int).tolist(), pose.scores[23:91], strict=True):
        if score > 0.3:
            cv2.circle(canvas, point, 3, (255, 255, 255), -1)
    return canvas


@pytest.mark.parametrize("points", [17, 133])
@pytest.mark.parametrize("seed", range(4))
def test_pictures_are_those_of_dwpose(points: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pose = Pose(rng.uniform(-30, 540, (points, 2)), rng.uniform(0, 1, points).astype(np.float32))
    found, expected = np.asarray(draw_pose(pose, (512, 512))).astype(int), published(pose, 512).astype(int)
    assert np.abs(found - expected).max() <= (0 if points == 17 else 1)  # hues that end in a half
    assert (found.any(axis=-1) == expected.any(axis=-1)).all() and found.any(axis=-1).mean() > 0.02


def standing() -> Pose:
    """Somebody in 512 x 512 pixels, arms down."""
    points = np.full((133, 2), -100.0)
    points[:17] = [
        (256, 60), (266, 50), (246, 50), (280, 60), (232, 60), (316, 120), (196, 120), (336, 200), (176, 200),
        (346, 280), (166, 280), (290, 290), (222, 290), (290, 390), (222, 390), (290, 490), (222, 490),
    ]  # fmt: skip
    points[91:112] = [(400 + 4 * (i % 5), 280 + 20 * (i // 5)) for i in range(21)]
    points[112:] = [(60 + 4 * (i % 5), 280 + 20 * (i // 5)) for i in range(21)]
    points[23:91] = [(430 + i % 8 * 8, 40 + i // 8 * 8) for i in range(68)]
    return Pose(points, np.full(133, 0.9, np.float32))


def test_colours_at_known_places() -> None:
    picture = np.asarray(draw_pose(standing(), (512, 512)))
    assert picture[60, 256].tolist() == [255, 0, 0] and picture[120, 256].tolist() == [255, 85, 0]  # nose, neck: between the shoulders
    assert picture[120, 196].tolist() == [255, 170, 0] and picture[120, 316].tolist() == [85, 255, 0]  # right and left shoulder
    assert picture[120, 226].tolist() == [153, 0, 0] and picture[120, 286].tolist() == [153, 51, 0]  # neck to them, in 0.6 of the colour
    assert picture[340, 222].tolist() == [0, 153, 51] and picture[440, 290].tolist() == [0, 51, 153]  # right thigh, left shin
    assert picture[280, 400].tolist() == [0, 0, 255] and picture[40, 430].tolist() == [255, 255, 255]  # a hand's point, one of the face
    assert not picture[5:30].any() and not picture[340, 256].any()
    half = np.count_nonzero(picture[340, 180:256].any(axis=-1))
    twice = Pose(standing().points * 2, standing().scores)
    assert abs(np.count_nonzero(np.asarray(draw_pose(twice, (1024, 1024)))[680, 360:512].any(axis=-1)) - 2 * half) <= 1
    small = np.asarray(draw_pose(Pose(standing().points / 8, standing().scores), (64, 64)))
    assert small[15, 32].tolist() == [255, 85, 0]


def test_parts() -> None:
    alone = {part: np.asarray(draw_pose(standing(), (512, 512), [part])) for part in PARTS}
    assert alone["body"][120, 256].any() and not alone["body"][280, 400].any() and not alone["body"][40, 430].any()
    assert alone["hands"][280, 400].any() and not alone["hands"][120, 256].any()
    assert (alone["face"].reshape(-1, 3).max(axis=0) == 255).all() and set(np.unique(alone["face"])) == {0, 255}
    assert (sum(picture.astype(int) for picture in alone.values()) == np.asarray(draw_pose(standing(), (512, 512)))).all()


@pytest.mark.parametrize("missing", [5, 6])
def test_what_is_not_seen_is_left_out(missing: int) -> None:
    pose = standing()
    pose.scores[missing] = 0.3
    picture = np.asarray(draw_pose(pose, (512, 512), ["body"]))
    assert not picture[120, 250:262].any() and not picture[90, 256].any()  # neither neck nor what hangs on it
    x = int(pose.points[missing, 0])
    other = int(pose.points[11 - missing, 0])
    assert not picture[120, x].any() and picture[120, other].any() and picture[60, 256].any()


def _model(path: Path, points: int = 17, size: tuple[Any, Any] = DWPOSE, score: float = 0.9, bins: tuple[int, int] = (576, 768)) -> Path:
    places = np.arange(points) * 2 + 200
    return write_simcc(path, *(peaks(places, one, np.full(points, score)) for one in bins), size)


def _refused(path: Path, **options: Any) -> str:
    with pytest.raises(ControlMapError) as caught:
        OnnxPose(path, **options)(photo(64, 64))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def test_models_that_give_no_keypoints(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    assert "there is no such file; name an ONNX model" in _refused(path)
    message = _refused(write_depth(path))
    assert "has 1 inputs and 1 outputs; pose needs one picture in and two out, SimCC" in message and "goes with image" in message
    assert "input has the shape [batch, 3, h, w]; export it with the height and width" in _refused(_model(path, size=("w", "h")))
    assert "gives 26 points; pose knows 17 (COCO) and 133 (COCO-WholeBody)" in _refused(_model(path, 26))
    message = _refused(_model(path, bins=(768, 576)))
    assert "shapes [1, 17, 768] and [1, 17, 576], which are not in the proportions of its input, 288 x 384 pixels; x is the first" in message
    flat = write_simcc(path, np.zeros((17, 576)), np.zeros((17, 768)), DWPOSE)
    assert "outputs have the shapes [17, 576] and [17, 768]; pose needs SimCC" in _refused(flat)
    uneven = write_simcc(path, np.zeros((1, 17, 576)), np.zeros((1, 16, 768)), DWPOSE)
    assert "[1, 17, 576] and [1, 16, 768]; pose needs SimCC" in _refused(uneven)
    assert "values that are not finite" in _refused(write_simcc(path, np.full((1, 17, 576), np.nan), np.zeros((1, 17, 768)), DWPOSE))
    nodes = [helper.make_node("Reshape", ["image", "shape"], [name]) for name in SIMCC]
    broken = save(path, nodes, [1, 3, 384, 288], {"shape": np.int64([1, 17, 5])}, outputs=SIMCC)
    assert "fails on 288 x 384 pixels (" in _refused(broken)


def test_what_a_model_cannot_draw(tmp_path: Path) -> None:
    path = _model(tmp_path / "a.onnx")
    message = "gives 17 points, the body alone; hands and face need a model of 133, as DWPose's"
    assert message in _refused(path, parts=["body", "hands"]) and message in _refused(path, parts=["face"])
    assert np.asarray(OnnxPose(path, parts=["body"])(photo(64, 64))).any()
    unsure = _model(tmp_path / "b.onnx", score=0.3)
    assert "found nobody in the photo, its best keypoint scores 0.3 of at least 0.3; take a photo that shows" in _refused(unsure)
    with pytest.raises(ControlMapError, match="has the parts body, hands, face, not 'feet'"):
        OnnxPose(path, parts=["feet"])
    for box in [(0, 0, 1), (0, 0, 1, 1.5), (0.5, 0, 0.5, 1), (0, 0, float("nan"), 1)]:
        with pytest.raises(ControlMapError, match="the person's box is four parts of the photo from 0 to 1, left, top, right, bottom, not"):
            OnnxPose(path, box=box)
    with pytest.raises(ControlMapError, match=r"has 1 inputs and 2 outputs; export it with .* keypoints goes with pose"):
        OnnxMap(path, "image")
