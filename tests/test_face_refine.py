"""The second pass over a face against its definition: what is cut out, what the model is asked for, and what is pasted back."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from instantid_jax import Person
from instantid_jax.config import tiny
from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.face import Face, FaceError
from instantid_jax.face_refine import crop_box, feathered, paste, refine_face, refine_people
from instantid_jax.pipeline import PipelineError
from instantid_jax.strengths import read_strength

CONFIG = tiny()
SIDE = CONFIG.unet.sample_size * CONFIG.vae.downscale
SIZE = (200, 150)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8))
EMBEDDING = np.ones(128, np.float32)


def a_face(left: float, top: float, width: float, height: float) -> Face:
    kps = np.float32([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]]) * np.float32([width, height]) + np.float32([left, top])
    return Face(np.float32([left, top, left + width, top + height]), kps, 0.9, EMBEDDING)


class Finder:
    name, embedding_dim = "finder", 128

    def __init__(self, *faces: Face) -> None:
        self.faces = list(faces)

    def analyze(self, image: np.ndarray, det_size: int = 640) -> list[Face]:
        return self.faces


class Painter:
    """In the place of a pipeline: notes what it is asked for and paints it in one colour."""

    config, controlnets, ip_adapter_scale = CONFIG, (), 0.5

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, prompt: str, image: list[Any], image_embeds: Any, **call: Any) -> Any:
        self.calls.append(call | {"prompt": prompt, "image": image, "image_embeds": image_embeds})
        return type("Output", (), {"images": [Image.new("RGB", (call["width"], call["height"]), (10, 20, 30))]})


@pytest.mark.parametrize(
    ("bbox", "margin", "expected"),
    [
        ((80, 60, 100, 84), 0.5, (66, 48, 114, 96)),
        ((80, 60, 100, 84), 0.0, (78, 60, 102, 84)),
        ((0, 0, 20, 20), 0.5, (0, 0, 40, 40)),  # moved into the picture
        ((185, 140, 205, 160), 1.0, (140, 90, 200, 150)),
        ((20, 20, 140, 130), 0.5, (5, 0, 155, 150)),  # as large as the picture allows
    ],
)
def test_the_square(bbox: tuple[float, ...], margin: float, expected: tuple[int, ...]) -> None:
    assert crop_box(np.float32(bbox), SIZE, margin) == expected


def test_the_feather() -> None:
    weight = feathered((50, 50, 90, 90), SIZE, 0.25)
    np.testing.assert_allclose(weight[20, :12], np.minimum(1, (np.arange(12) + 0.5) / 10))
    np.testing.assert_array_equal(weight, weight[::-1, ::-1])
    np.testing.assert_array_equal(weight, weight.T)
    assert weight[15:25, 15:25].min() == 1 and weight[0].max() <= 0.05
    assert feathered((0, 50, 40, 90), SIZE, 0.25)[20, 0] == 1  # the picture's own edge is no seam
    assert (feathered((50, 50, 90, 90), SIZE, 0.0) == 1).all()


def test_the_paste() -> None:
    box = (66, 48, 114, 96)
    out, before = np.asarray(paste(PICTURE, Image.new("RGB", (64, 64), (10, 20, 30)), box, 0.25)), np.asarray(PICTURE)
    outside = np.ones(before.shape[:2], bool)
    outside[48:96, 66:114] = False
    np.testing.assert_array_equal(out[outside], before[outside])
    assert (out[60:84, 78:102] == (10, 20, 30)).all()
    weight = feathered(box, SIZE, 0.25)[..., None]
    np.testing.assert_array_equal(out[48:96, 66:114], np.round(weight * np.float32([10, 20, 30]) + (1 - weight) * before[48:96, 66:114]))


def test_what_the_model_is_asked_for() -> None:
    pipe, face = Painter(), a_face(80, 60, 20, 24)
    refined = refine_face(pipe, PICTURE, Finder(face), "a person", EMBEDDING, strength=0.4, seed=3, num_inference_steps=7)
    assert refined.box == (66, 48, 114, 96) and refined.face is not None
    (call,) = pipe.calls
    assert (call["strength"], call["seed"], call["num_inference_steps"], call["width"], call["height"]) == (0.4, 3, 7, SIDE, SIDE)
    expected = PICTURE.crop(refined.box).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(call["init_image"]), np.asarray(expected))
    points = (face.kps - np.float32([66, 48])) * np.float32(SIDE / 48)
    np.testing.assert_array_equal(call["image"][0], draw_keypoints((SIDE, SIDE), points, CONFIG.keypoint_scale))
    different = (np.asarray(refined.picture) != np.asarray(PICTURE)).any(axis=-1)
    assert different[60:84, 78:102].all() and different.sum() <= 48 * 48


def test_the_largest_face_unless_another_is_named() -> None:
    faces = a_face(20, 20, 10, 12), a_face(100, 60, 20, 24)
    pipe = Painter()
    assert refine_face(pipe, PICTURE, Finder(*faces), "x", EMBEDDING).face.kps[0, 0] > 100
    assert refine_face(pipe, PICTURE, Finder(*faces), "x", EMBEDDING, face_index=0).face.kps[0, 0] < 30


def test_everybody_with_their_own_identity_and_strengths() -> None:
    faces = a_face(20, 20, 14, 16), a_face(140, 60, 20, 24)
    people = [
        Person(EMBEDDING, None, (100, 0, 200, 150), ip_adapter_scale=0.5),
        Person(2 * EMBEDDING, None, (0, 0, 100, 150), identitynet_scale=0.25),
        Person(3 * EMBEDDING, None, np.pad(np.ones((10, 4), np.float32), ((20, 0), (18, 18)))),  # of another size: it is resized
    ]
    pipe = Painter()
    options = {"controlnet_conditioning_scale": [0.8], "ip_adapter_scale": 0.6}
    first, second, nobody = refine_people(pipe, PICTURE, Finder(*faces), "x", people, **options)
    assert not isinstance(first, FaceError) and not isinstance(second, FaceError)
    assert first.face.kps[0, 0] > 140 and second.face.kps[0, 0] < 40
    assert isinstance(nobody, FaceError) and "region of person 2" in str(nobody)
    assert [c["image_embeds"][0] for c in pipe.calls] == [1.0, 2.0]
    given = [[*c["controlnet_conditioning_scale"], c["ip_adapter_scale"]] for c in pipe.calls]
    strengths = [[float(read_strength(strength).table([0], ["mid"]).item()) for strength in one] for one in given]
    np.testing.assert_allclose(strengths, [[0.8, 0.3], [0.2, 0.6]])
    both = (np.asarray(second.picture) != np.asarray(PICTURE)).any(axis=-1)
    assert both[28, 27] and both[72, 150]


@pytest.mark.parametrize(
    ("faces", "change", "error", "message"),
    [
        ((), {}, FaceError, "the picture to refine: no face found"),
        ((a_face(80, 60, 20, 24),), {"face_index": 1}, FaceError, "there is no face 1 in the picture to refine; 1 found"),
        ((a_face(50, 30, 80, 80),), {}, FaceError, "pixels wide, and the model draws"),
        ((a_face(80, 60, 20, 24),), {"height": 64}, PipelineError, "height follows from the face that is refined"),
        ((a_face(80, 60, 20, 24),), {"margin": -1}, PipelineError, "margin must be between 0 and 4, not -1"),
        ((a_face(80, 60, 20, 24),), {"feather": 0.7}, PipelineError, "feather must be between 0 and 0.5, not 0.7"),
    ],
)
def test_what_is_wrong_gets_one_sentence(faces: Any, change: dict[str, Any], error: type[ValueError], message: str) -> None:
    with pytest.raises(error, match=message):
        refine_face(Painter(), PICTURE, Finder(*faces), "x", EMBEDDING, **change)
