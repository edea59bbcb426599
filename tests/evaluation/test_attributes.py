"""The judge of backgrounds, hair and styles: on drawings whose answer is known, and on renders of people it was not fitted on."""

import dataclasses

import numpy as np
import pytest

from instantid_jax.evaluation.attributes import KernelClassifier, NearestMean, background_color, hair_profile


def drawing(background, hair, skin=(200, 160, 130), top=12):
    image = np.empty((1, 64, 64, 3), np.uint8)
    image[:] = background
    image[0, top:, 16:48] = hair
    image[0, top + 12 :, 16:48] = skin
    return image


def test_colours_are_read_where_they_are():
    image = drawing((58, 150, 70), (176, 66, 26))
    np.testing.assert_allclose(background_color(image)[0], np.array([58, 150, 70]) / 255)
    profile = hair_profile(image)[0]
    assert profile.shape == (22,)
    np.testing.assert_allclose(profile[:18].reshape(6, 3), np.tile(np.array([176, 66, 26]) / 255, (6, 1)))
    assert profile[-1] == pytest.approx(12 / 64)


def test_the_profile_follows_the_head():
    np.testing.assert_allclose(
        hair_profile(drawing((240,) * 3, (26, 22, 22), top=5))[0, :18], hair_profile(drawing((240,) * 3, (26, 22, 22), top=20))[0, :18]
    )


def test_a_picture_of_one_colour_gives_numbers():
    assert np.isfinite(hair_profile(np.full((1, 64, 64, 3), 128, np.uint8))).all()


@pytest.mark.parametrize("classifier", [NearestMean, KernelClassifier])
def test_classifiers_separate_what_is_apart(classifier):
    random = np.random.default_rng(0)
    labels = [("a", "b", "c")[i % 3] for i in range(90)]
    features = random.normal(size=(90, 4)) * 0.3 + np.array([ord(label) for label in labels])[:, None]
    assert (classifier(features[:60], labels[:60]).predict(features[60:]) == np.array(labels[60:])).all()


def test_a_ring_needs_the_kernel():
    random = np.random.default_rng(0)
    points = random.uniform(-1, 1, (400, 2))
    labels = np.where(np.linalg.norm(points, axis=1) < 0.6, "in", "out").tolist()
    right = KernelClassifier(points[:300], labels[:300]).predict(points[300:]) == np.array(labels[300:])
    assert right.mean() > 0.9


def test_real_renders_are_read_right(world, text_judge):
    """40 validation people beyond the fitted ones."""
    from instantid_jax.data.portrait_styles import STYLES

    photos, styled, views = [], [], []
    for number, seed in enumerate(range(1500, 1540)):
        person = world.identity(seed)
        view = dataclasses.replace(world.view(person, 2), style="photo")
        photos.append(world.render(person, view).image)
        views.append(dataclasses.replace(view, style=STYLES[number % len(STYLES)]))
        styled.append(world.render(person, views[-1]).image)
    hair = np.array(["" if view.hair_style == "bald" else view.hair_color for view in views])
    assert (text_judge.background(np.stack(photos)) == [view.background for view in views]).all()
    assert (text_judge.style(np.stack(styled)) == [view.style for view in views]).mean() >= 0.95
    assert (text_judge.hair(np.stack(photos)) == hair)[hair != ""].mean() >= 0.9
