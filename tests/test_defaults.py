"""The model and the people that come along."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.data.portraits import PortraitWorld
from instantid_jax.defaults import ASSETS, DEFAULT_WEIGHTS, PROMPTS, default_config, default_pipeline, framed, people
from instantid_jax.face import analyze_photo, load_analyzer, load_photo
from instantid_jax.pipeline import PipelineError


def test_framing_puts_eyes_and_mouth_where_rendered_heads_have_them() -> None:
    points = np.float32([[100, 200], [160, 200], [130, 240], [110, 262], [150, 262]])
    moved = framed(points)
    np.testing.assert_allclose(moved[:2].mean(0), 0.5, atol=1e-6)
    distances = np.linalg.norm(moved[1] - moved[0]), np.linalg.norm(moved[3:].mean(0) - moved[:2].mean(0))
    assert distances[0] == pytest.approx(0.228, abs=1e-5) and distances[1] == pytest.approx(62 / 60 * 0.228, abs=1e-5)
    np.testing.assert_allclose(framed(points * 3 + 17), moved, atol=1e-5)


def test_framing_hardly_changes_a_rendered_head() -> None:
    pytest.importorskip("numba")
    world = PortraitWorld()
    errors = []
    for seed in range(5):
        person = world.identity(seed)
        points = world.render(person, world.view(person, 0), 16).keypoints / 16
        errors.append(np.abs(framed(points) - points).max())
    assert max(errors) < 0.12


def test_the_people_who_come_along_are_test_people_and_are_found() -> None:
    analyzer, world = load_analyzer("opencv"), PortraitWorld()
    assert len(people()) >= 4
    for person in people():
        assert world.split(int(person.name.split("_")[1])) == "test"
        assert person.pose.shape == (5, 2) and person.pose.min() > 0 and person.pose.max() < 1
        assert analyze_photo(analyzer, np.asarray(load_photo(person.photo))).det_score > 0.8


def test_the_model_is_small_and_finite() -> None:
    file = DEFAULT_WEIGHTS / "weights.safetensors"
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 40e6
    assert all(np.isfinite(array).all() for array in load_file(file).values())
    config = default_config()
    assert config.face_analyzer == "opencv" and config.keypoint_scale == 0.15
    assert config.unet.sample_size * config.vae.downscale == 64


@pytest.mark.slow
def test_with_8_bit_weights_the_picture_is_nearly_the_same() -> None:
    keypoints = draw_keypoints((64, 64), people()[0].pose * 64, default_config().keypoint_scale)
    vector = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    exact, rounded = (default_pipeline(weights_dtype=kind)(PROMPTS["photo"], keypoints, vector, **options).images for kind in (None, "int8"))
    assert 0 < np.sqrt(np.square(exact - rounded).mean() / np.square(exact).mean()) < 0.03
    with pytest.raises(PipelineError, match="weights_dtype must be 'int8' or None"):
        default_pipeline(weights_dtype="int4")


def test_prompts_are_of_the_kind_that_the_model_knows() -> None:
    world = PortraitWorld()
    person = world.identity(0)
    known = {word for view in range(400) for word in world.caption(person, world.view(person, view), False).replace(",", "").split()}
    for prompt in PROMPTS.values():
        assert set(prompt.replace(",", "").split()) <= known
