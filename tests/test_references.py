"""What is said of a photo is said in the pixels of its file, whatever it was resized to."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from instantid_jax.defaults import framed
from instantid_jax.face import Face, FaceAnalyzer, FaceError, Identity, KeypointError
from instantid_jax.references import face_box_mask, keypoint_picture, photos_table, read_identity

KPS = np.array([[300, 400], [600, 410], [450, 550], [330, 700], [580, 710]], np.float32)


class Scripted(FaceAnalyzer):
    """Finds always the same faces, in pixels of the picture that it is given."""

    name, embedding_dim = "scripted", 4

    def __init__(self, *faces: Face):
        self.faces, self.seen = list(faces), set[tuple[int, ...]]()

    def analyze(self, image: np.ndarray, det_size: int = 640) -> list[Face]:
        self.seen.add(image.shape[:2])
        return self.faces


def face(box: tuple[float, ...], kps: np.ndarray = KPS) -> Face:
    return Face(np.array(box, np.float32), kps, 0.9, np.ones(4, np.float32))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """200 x 100 pixels, which become 1280 x 640."""
    path = tmp_path / "small.png"
    Image.new("RGB", (200, 100), "gray").save(path)
    return path


def message(photo: Path, *faces: Face) -> str:
    analyzer = Scripted(*faces)
    with pytest.raises(FaceError) as caught:
        read_identity((photo,), lambda: analyzer)
    assert analyzer.seen == set() or (640, 1280) in analyzer.seen
    return str(caught.value)


def test_no_face_and_several_faces_are_told_in_the_files_pixels(photo: Path) -> None:
    assert message(photo).startswith(f"{photo}: no face found in 200 x 100 pixels")
    several = message(photo, face((640, 320, 1280, 640)), face((0, 0, 64, 64)))
    assert several.startswith(f"{photo}: 2 faces found; the largest spans x 100 to 200, y 50 to 100: choose it with --face-index 1")


def test_the_face_itself_stays_in_the_resized_pixels(photo: Path) -> None:
    identity = read_identity((photo,), lambda: Scripted(face((0, 0, 640, 640))))
    assert identity.size == (1280, 640)
    assert identity.kps is not None
    np.testing.assert_array_equal(identity.kps, KPS)


def test_keypoints_of_another_picture_are_told_in_the_files_pixels(photo: Path, tmp_path: Path) -> None:
    text = message(photo, face((0, 0, 9, 9), np.full((5, 2), -64, np.float32)))
    assert text.startswith(f"{photo}: all keypoints [[-10.0, -10.0], ")
    assert "outside the photo of 200 x 100 pixels" in text
    stored = tmp_path / "me.npz"
    np.savez(stored, embedding=np.ones(4, np.float32), kps=KPS, size=np.array([200, 100]))
    text = message(stored)
    assert text.startswith(f"{stored}: all keypoints [[300.0, 400.0], ")
    assert "outside the photo of 200 x 100 pixels" in text


def test_a_photo_too_narrow_to_resize_is_named(tmp_path: Path) -> None:
    path = tmp_path / "strip.png"
    Image.new("RGB", (640, 20)).save(path)
    assert message(path).startswith(f"{path}: resize_img: 640 x 20 would become")


def test_the_face_box_moves_with_the_keypoints() -> None:
    box = (250, 300, 660, 800)
    pose = Identity(np.ones(4, np.float32), face(box), (1280, 640), "scripted")
    mask = face_box_mask(pose, 640, None, 1280)
    assert mask.shape == (320, 640) and set(np.unique(mask)) == {0, 255}
    assert (mask > 0).sum() == (330 - 125) * (320 - 150) and mask[150, 125] == 255 and mask[-1, 329] == 255  # the lower edge is cut off
    lit = np.asarray(keypoint_picture(pose, 640, None, 1280)).any(axis=-1)
    assert lit.any() and mask[lit].mean() > 250
    small = face_box_mask(pose, None, None, 64, framed)
    corners = framed(KPS, np.float32(box).reshape(2, 2)) * 64
    (left, top), (right, bottom) = corners.astype(int).clip(0, 64)
    assert small.shape == (64, 64) and (small > 0).sum() == (right - left) * (bottom - top) > 0


def test_a_stored_face_has_no_face_box() -> None:
    with pytest.raises(KeypointError, match="a stored face has no face box: give --pose with a photo"):
        face_box_mask(Identity(np.ones(4, np.float32), face((0, 0, 9, 9)), (1280, 640), "precomputed"), None, None, 64)


def test_a_pose_from_json(tmp_path: Path) -> None:
    path = tmp_path / "pose.json"
    path.write_text(json.dumps({"keypoints": KPS.tolist(), "size": [1280, 960]}))
    pose = read_identity((path,), lambda: Scripted())
    assert pose.size == (1280, 960) and pose.kps is not None
    np.testing.assert_array_equal(pose.kps, KPS)
    assert keypoint_picture(pose, 640, None, 1280).size == (640, 480)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"keypoints": KPS.tolist()}, "needs keypoints and size"),
        ([1], "needs keypoints and size"),
        ({"keypoints": [[1, 2]], "size": [9, 9]}, r"keypoints must be five \[x, y\]"),
        ({"keypoints": "x", "size": [9, 9]}, "is no file of keypoints"),
        ({"keypoints": KPS.tolist(), "size": [9.5, 9]}, "size must be two whole numbers"),
        ({"keypoints": KPS.tolist(), "size": [9, 9]}, "all keypoints lie outside the picture of 9 x 9 pixels"),
    ],
)
def test_a_wrong_file_of_keypoints_is_told(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pose.json"
    path.write_text(json.dumps(content))
    with pytest.raises(KeypointError, match=message):
        read_identity((path,), lambda: Scripted())


def test_keypoints_nested_too_deep_are_told(tmp_path: Path) -> None:
    (tmp_path / "pose.json").write_text("[" * 100_000)
    with pytest.raises(KeypointError, match="is no file of keypoints"):
        read_identity((tmp_path / "pose.json",), lambda: Scripted())


def test_a_line_for_each_photo(photo: Path) -> None:
    identity = read_identity((photo, photo), lambda: Scripted(face((0, 0, 640, 640))), 4, None, "mean", (3, 1))
    assert photos_table(identity).splitlines() == [f"small.png: counts {w}, similarity to the others 1.00, length 2.0" for w in ("0.75", "0.25")]
    assert photos_table(read_identity((photo,), lambda: Scripted(face((0, 0, 640, 640))))) == ""
