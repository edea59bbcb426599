"""The procedural world: seeded, drawn without holes, keypoints where the features are, and people whom a recogniser tells apart."""

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from instantid_jax.data import portrait_asset, portrait_styles, portraits
from instantid_jax.data.portrait_head import HairLine, load_heads
from instantid_jax.data.portraits import BACKGROUNDS, EXPRESSIONS, HAIR_COLORS, HAIR_STYLES, PortraitError, PortraitWorld, split
from instantid_jax.face import draw_kps
from instantid_jax.face.analyzer import OpenCVAnalyzer

pytest.importorskip("numba")
rasterizer = pytest.importorskip("instantid_jax.data.rasterizer")

PHOTOS = PortraitWorld(image_size=64, style_weights=(("photo", 1.0),))


def front(world, person, seed=0, **changes):
    """A view from the front, in the middle, without zoom."""
    plain = {"yaw": 0.0, "pitch": 0.0, "roll": 0.0, "zoom": 1.0, "shift": (0.0, 0.0), "style": "photo", "expression": "neutral", "glasses": False}
    return dataclasses.replace(world.view(person, seed), **(plain | changes))


def test_seeds_decide_everything():
    again = PortraitWorld(image_size=64, style_weights=(("photo", 1.0),))
    for seed in (0, 2000):
        person, other = PHOTOS.identity(seed), again.identity(seed)
        np.testing.assert_array_equal(person.vertices, other.vertices)
        assert PHOTOS.view(person, 3) == again.view(other, 3)
        np.testing.assert_array_equal(PHOTOS.render(person, PHOTOS.view(person, 3)).image, again.render(other, again.view(other, 3)).image)
    assert PHOTOS.identity(0).skin != PHOTOS.identity(1).skin
    assert PHOTOS.view(person, 0) != PHOTOS.view(person, 1)


def test_threads_draw_the_same():
    jobs = [(person, PHOTOS.view(person, seed)) for person in map(PHOTOS.identity, range(3)) for seed in range(3)]
    alone = [PHOTOS.render(*job).image for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda job: PHOTOS.render(*job).image, jobs))
    np.testing.assert_array_equal(alone, together)


def test_no_person_is_in_two_splits():
    assert [split(seed) for seed in (0, 999, 1000, 1999, 2000, 10**6)] == ["test", "test", "validation", "validation", "train", "train"]
    assert PHOTOS.split(5) == "test"


def test_pose_stays_in_its_ranges():
    person = PHOTOS.identity(0)
    views = [PHOTOS.view(person, seed) for seed in range(300)]
    for name, most in (("yaw", 15), ("pitch", 8), ("roll", 6)):
        degrees = np.degrees([getattr(view, name) for view in views])
        assert 0.9 * most < np.abs(degrees).max() <= most
        assert abs(degrees.mean()) < 0.1 * most
    zooms = [view.zoom for view in views]
    assert 0.92 <= min(zooms) < 0.93 and 1.07 < max(zooms) <= 1.08


def test_views_are_drawn_as_often_as_asked():
    world = PortraitWorld(expressions=("neutral", "surprised"), glasses_rate=0.25)
    views = [world.view(person, seed) for person in map(world.identity, range(4)) for seed in range(250)]
    share = {name: np.mean([view.style == name for view in views]) for name, _ in world.style_weights}
    for name, weight in world.style_weights:
        assert abs(share[name] - weight) < 0.05
    assert {view.expression for view in views} == {"neutral", "surprised"}
    assert abs(np.mean([view.glasses for view in views]) - 0.25) < 0.05
    assert {view.hair_style for view in views} == set(HAIR_STYLES)
    assert {view.hair_color for view in views} == set(HAIR_COLORS)
    assert {view.background for view in views} == set(BACKGROUNDS)


@pytest.mark.parametrize("size", [64, 128])
def test_eyes_are_as_far_apart_as_said_and_level(size):
    for seed in range(5):
        person = PHOTOS.identity(seed)
        portrait = PHOTOS.render(person, front(PHOTOS, person), size)
        assert portrait.image.shape == (size, size, 3) and portrait.image.dtype == np.uint8
        left, right, nose, mouth_left, mouth_right = portrait.keypoints
        assert right[0] - left[0] == pytest.approx(0.23 * size, rel=0.01)
        assert abs(left[1] - right[1]) < 0.01 * size
        assert left[0] + right[0] == pytest.approx(size, rel=0.01)
        assert max(left[1], right[1]) < nose[1] < min(mouth_left[1], mouth_right[1])
        assert left[0] < mouth_left[0] < nose[0] < mouth_right[0] < right[0]
        assert portrait.keypoints.dtype == np.float32
        draw_kps((size, size), portrait.keypoints)


def test_positive_angles_turn_as_said():
    person = PHOTOS.identity(1)
    straight, turned, nodding, leaning = (
        PHOTOS.render(person, front(PHOTOS, person, **change)).keypoints for change in ({}, {"yaw": 0.2}, {"pitch": 0.1}, {"roll": 0.1})
    )
    nose, middle = 2, straight[:2].mean(0)
    assert turned[nose, 0] - turned[:2].mean(0)[0] > straight[nose, 0] - middle[0] + 1
    assert nodding[nose, 1] - nodding[:2].mean(0)[1] > straight[nose, 1] - middle[1]
    assert leaning[0, 1] > leaning[1, 1] + 1


def test_pupils_are_dark_and_lie_on_the_keypoints():
    # Two pixels around the point against the cheek below the eye.
    for seed in range(8):
        person = PHOTOS.identity(seed)
        portrait = PHOTOS.render(person, front(PHOTOS, person), 256)
        gray = portrait.image.mean(-1)
        for x, y in portrait.keypoints[:2].astype(int):
            assert gray[y - 2 : y + 3, x - 2 : x + 3].mean() < 0.6 * gray[y + 26 : y + 34, x - 4 : x + 5].mean()


def test_size_changes_only_the_resolution():
    person = PHOTOS.identity(3)
    view = PHOTOS.view(person, 0)
    small, large = PHOTOS.render(person, view, 64), PHOTOS.render(person, view, 128)
    np.testing.assert_allclose(small.keypoints * 2, large.keypoints, atol=1e-3)
    shrunk = large.image.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(shrunk - small.image).mean() < 3.0


def test_face_and_hair_have_no_holes():
    # A backdrop of pure green, which neither skin nor hair has: none of it may show within the face.
    world = PortraitWorld(image_size=96, style_weights=(("photo", 1.0),))
    for seed in range(6):
        person = world.identity(seed)
        for style in HAIR_STYLES:
            base = next(view for view in (world.view(person, number) for number in range(200)) if view.hair_style == style)
            view = dataclasses.replace(base, yaw=0.0, roll=0.0, zoom=1.0, shift=(0.0, 0.0), backdrop=(0.0, 1.0, 0.0))
            image = world.render(person, view).image.astype(int)
            green = (image[..., 1] > 200) & (image[..., 0] < 60) & (image[..., 2] < 60)
            rows = np.nonzero(~green)[0]
            assert rows.max() == 95 and 0 <= rows.min() < 25
            assert not green[rows.min() + 6 : 90, 40:57].any()
            assert green[:3, :3].all()


def test_what_belongs_to_whom():
    person = PHOTOS.identity(0)
    first, second = PHOTOS.labels(person, PHOTOS.view(person, 0)), PHOTOS.labels(person, PHOTOS.view(person, 1))
    own = ("sex", "age", "ethnicity", "beard", "eye_color")
    assert all(first[name] == second[name] for name in own)
    assert set(first) - set(own) == {"hair_style", "hair_color", "background", "expression", "glasses", "style"}
    people = [PHOTOS.identity(seed) for seed in range(200)]
    assert abs(np.mean([person.sex == "man" for person in people]) - 0.5) < 0.1
    assert {person.ethnicity_word for person in people} == set(portrait_asset.ETHNICITIES)
    assert {person.age_word for person in people} == {"young", "middle-aged", "old"}
    assert all(person.beard == "none" for person in people if person.sex == "woman")
    assert {person.beard for person in people} == {"none", "stubble", "full", "moustache"}


def test_captions():
    looks = {"skin": (0.9, 0.8, 0.7), "eye_color": "green", "brow_width": 0.12, "brow_color": "black", "shape_words": ("long nose", "wide jaw")}
    person = dataclasses.replace(PHOTOS.identity(0), sex="man", age=0.9, ethnicity=np.array([0.1, 0.6, 0.3]), beard="full", **looks)
    view = front(PHOTOS, person, hair_style="short", hair_color="brown", background="blue", expression="smiling")
    assert PHOTOS.caption(person, view, True) == (
        "photo of an old asian man with a beard and short brown hair, fair skin, green eyes, thick black brows, long nose, wide jaw, smiling, "
        "blue background"
    )
    assert PHOTOS.caption(person, view, False) == "photo of a person with short brown hair, smiling, blue background"
    bald = dataclasses.replace(view, hair_style="bald", expression="neutral", glasses=True, style="watercolor")
    assert PHOTOS.caption(person, bald, False) == "watercolor painting of a bald person with glasses, neutral expression, blue background"
    # Paper and black and white film do not show the background's colour, so the caption does not speak of it.
    assert PHOTOS.caption(person, dataclasses.replace(view, style="sketch"), False) == "pencil sketch of a person with short brown hair, smiling"
    assert PHOTOS.caption(person, dataclasses.replace(view, style="noir"), False).startswith("film noir photo of a person")
    assert PHOTOS.caption(person, dataclasses.replace(view, style="pixel art"), False).startswith("pixel art of a person")


def test_words_for_shapes_belong_to_the_axes_that_move_them():
    heads = load_heads()
    nouns = {"head": "face", "eyebrows": "brows", "eyes": "eyes", "nose": "nose", "cheek": "cheeks", "mouth": "mouth", "chin": ("chin", "jaw")}
    for number, *words in portraits._SHAPE_WORDS:
        part = heads.axis_names[number].split("/")[0]
        assert all(word.endswith(nouns[part]) for word in words), (part, words)
    # What is said can be measured.
    said = {word: [] for word in ("wide mouth", "small mouth")}
    for person in map(PHOTOS.identity, range(120)):
        left, right = person.vertices[heads.corners[1:], 0]
        for word in said:
            if word in person.shape_words:
                said[word].append(right - left)
    assert np.mean(said["wide mouth"]) > 1.1 * np.mean(said["small mouth"])


def test_view_changes_the_picture_as_its_words_say():
    person = PHOTOS.identity(2)
    view = front(PHOTOS, person, hair_style="bald")
    image = PHOTOS.render(person, view).image.astype(float)
    blue = PHOTOS.render(person, dataclasses.replace(view, backdrop=(0.2, 0.35, 0.75))).image[2, 2]
    assert blue[2] > blue[0] + 80
    glasses = PHOTOS.render(person, dataclasses.replace(view, glasses=True)).image.astype(float)
    changed = np.abs(glasses - image).max(-1) > 40
    assert 40 < changed.sum() < 600 and changed[24:42].sum() > 0.9 * changed.sum()
    left, right = (PHOTOS.render(person, dataclasses.replace(view, expression=name)).keypoints[3:] for name in ("frowning", "smiling"))
    assert (left[:, 1] - right[:, 1] > 0.8).all()  # corners of the mouth go up, in pixels of 64
    for name in EXPRESSIONS:
        assert PHOTOS.render(person, dataclasses.replace(view, expression=name)).image.std() > 10


def test_styles_are_distinct():
    person = PHOTOS.identity(4)
    images = {name: PHOTOS.render(person, front(PHOTOS, person, style=name), 128).image.astype(float) for name in portrait_styles.STYLES}
    names = list(images)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert np.abs(images[first] - images[second]).mean() > 8, (first, second)
    assert np.ptp(images["noir"], axis=-1).max() == 0
    assert np.ptp(images["sketch"], axis=-1).max() < 16
    blocks = images["pixel art"].reshape(32, 4, 32, 4, 3)
    assert np.ptp(blocks, axis=(1, 3)).max() == 0
    assert images["watercolor"][0].min() > 235  # the border is paper


@pytest.mark.parametrize("size", [64, 128])
def test_a_recogniser_finds_and_tells_apart(size):
    analyzer = OpenCVAnalyzer()
    embeddings, errors = [], []
    for seed in range(12):
        person = PHOTOS.identity(seed)
        for number in range(2):
            portrait = PHOTOS.render(person, PHOTOS.view(person, number), size)
            (face,) = analyzer.analyze(portrait.image, 320)
            embeddings.append(face.embedding / np.linalg.norm(face.embedding))
            distance = np.linalg.norm(portrait.keypoints[1] - portrait.keypoints[0])
            errors.append(np.linalg.norm(face.kps - portrait.keypoints, axis=1).mean() / distance)
    assert np.mean(errors) < 0.15  # of the eyes' distance
    first, second = np.array(embeddings[::2]), np.array(embeddings[1::2])
    cosines = first @ second.T
    assert (cosines.argmax(1) == np.arange(12)).all()
    assert np.diag(cosines).mean() - cosines[~np.eye(12, dtype=bool)].mean() > 0.25


# --- shape -------------------------------------------------------------------------------------------------------------


def test_heads_are_symmetric_and_the_mean_head_is_the_unit():
    heads = load_heads()
    assert heads.rest[heads.corners[0], 0] == pytest.approx(0.0, abs=1e-3)
    np.testing.assert_allclose(heads.rest[heads.corners[1]] * [-1, 1, 1], heads.rest[heads.corners[2]], atol=1e-3)
    person = PHOTOS.identity(7)
    left, right = heads.eye_centers(person.vertices)
    assert left[0] < 0 < right[0]
    np.testing.assert_allclose(left * [-1, 1, 1], right, atol=2e-3)
    assert np.linalg.norm(heads.rest[heads.eyes.ravel()], axis=1).max() < 1.1


def test_coefficients_mix_what_they_name():
    heads = load_heads()
    axes = np.zeros(len(heads.axis_names), np.float32)
    axes[0] = -0.5
    mixed = heads.coefficients(axes, np.array([0.2, 0.3, 0.5]), 1.0, 0.25, -0.4)
    assert mixed[heads.axis_rows[0, 0]] == 0.5 and mixed[heads.axis_rows[0, 1]] == 0
    start = heads.macro_offset
    assert mixed[:start].sum() == 0.5
    np.testing.assert_allclose(mixed[start : start + 12].reshape(3, 2, 2).sum((1, 2)), [0.2, 0.3, 0.5], rtol=1e-6)
    bodies = mixed[start + 12 : start + 24].reshape(2, 2, 3)
    np.testing.assert_allclose(bodies[1], [[0.3, 0.45, 0], [0.1, 0.15, 0]], rtol=1e-6)
    assert not bodies[0].any() and not mixed[start + 24 :].any()


def test_hair_ends_where_its_line_says():
    line = HairLine(forehead=0.6, tips=1.9, opening=1.2, parting=0.0, fray=0.0, phase=0.0)
    edges = line.edges()
    angle = np.linspace(-np.pi, np.pi, len(edges))
    assert edges[np.abs(angle).argmin()] == pytest.approx(0.6, abs=1e-4)
    np.testing.assert_allclose(edges[np.abs(angle) > 1.2], 1.9, rtol=1e-6)
    np.testing.assert_allclose(edges, edges[::-1], atol=1e-6)


# --- rasterizer --------------------------------------------------------------------------------------------------------

NOWHERE = np.full(9, 99.0, np.float32)


def _visible(points, depth, materials, uvw=None, edges=NOWHERE, side=8):
    triangles = np.arange(3 * len(materials), dtype=np.int32).reshape(-1, 3)
    uvw = np.zeros((len(points), 3), np.float32) if uvw is None else uvw
    return rasterizer.visible(
        np.asarray(points, np.float32), np.asarray(depth, np.float32), uvw, triangles, np.asarray(materials, np.uint8), edges, side
    )


def test_samples_are_looked_up_at_their_centres():
    # Corners (0, 0), (0, 4), (4, 0): sample (i, j) lies inside where its centre's coordinates sum to less than 4.
    owner, weights = _visible([(0, 0), (0, 4), (4, 0)], [0, 0, 0], [rasterizer.SKIN], side=4)
    rows, columns = np.mgrid[:4, :4] + 0.5
    np.testing.assert_array_equal(owner == 0, rows + columns <= 4)
    np.testing.assert_allclose(weights[1, 0], [1.5 / 4, 0.5 / 4], rtol=1e-6)


def test_the_nearest_wins_and_skin_has_no_inside():
    square = [(-9, -9), (-9, 30), (30, -9)]
    owner, _ = _visible(square * 2, [0, 0, 0, 1, 1, 1], [rasterizer.SKIN] * 2)
    assert (owner == 1).all()
    owner, _ = _visible(square * 2, [2, 2, 2, 1, 1, 1], [rasterizer.SKIN] * 2)
    assert (owner == 0).all()
    back = square[::-1]
    assert (_visible(back, [0, 0, 0], [rasterizer.SKIN])[0] == -1).all()
    assert (_visible(back, [0, 0, 0], [rasterizer.GLASSES])[0] == 0).all()


def test_hair_is_cut_at_its_edge():
    # Fall grows with y, one unit a sample; the edge is at 4 everywhere.
    points = np.array([(0, 0), (0, 16), (16, 0)], np.float32)
    uvw = np.zeros((3, 3), np.float32)
    uvw[:, 1] = points[:, 1]
    owner, _ = _visible(points, [0, 0, 0], [rasterizer.HAIR], uvw, np.full(9, 4.0, np.float32))
    assert (owner[:4] == 0).all() and (owner[4:] == -1).all()


def test_normals():
    places = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)], np.float32)
    normals = rasterizer.vertex_normals(places, np.array([(0, 1, 2), (0, 3, 1)], np.int32))
    np.testing.assert_allclose(normals[2], [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(normals[0], np.array([0, 1, 1]) / np.sqrt(2), atol=1e-6)


# --- asset and errors --------------------------------------------------------------------------------------------------


def test_the_asset_is_small_and_names_its_makers():
    path = portrait_asset.__file__.replace("data/portrait_asset.py", "assets/portraits/heads.npz")
    with np.load(path) as data:
        assert str(data["attribution"]) == portrait_asset.ATTRIBUTION
        assert "CC0" in portrait_asset.ATTRIBUTION and "MakeHuman" in portrait_asset.ATTRIBUTION
        assert len(data["axis_names"]) == 104 and data["targets"].shape[1:] == (3, len(data["vertices"]))
        assert all(array.dtype != object for array in data.values())
        size = sum(array.nbytes for array in data.values())
    assert size < 16 * 2**20


def test_axes_join_both_ways_and_both_halves():
    names = ["nose-hump-decr", "nose-hump-incr", "l-eye-bag-in", "r-eye-bag-in", "l-eye-bag-out", "r-eye-bag-out", "head-oval", "nose-trans-in"]
    assert portrait_asset._axes(names) == [
        ("eye-bag", "eye-bag-in", "eye-bag-out"),
        ("head-oval", "", "head-oval"),
        ("nose-hump", "nose-hump-decr", "nose-hump-incr"),
    ]


def test_quantising_keeps_targets_to_a_two_thousandth():
    moved = np.random.default_rng(0).normal(0, 0.1, (3, 50, 3))
    stored, steps = portrait_asset._quantize(moved)
    assert stored.dtype == np.int16 and stored.shape == (3, 3, 50)
    restored = stored.transpose(0, 2, 1) * steps[:, None, None]
    assert np.abs(restored - moved).max() <= np.abs(moved).max() / 2047 * 0.51


def test_errors_say_what_to_do(monkeypatch):
    with pytest.raises(PortraitError, match="seeds are 0 or more, got -1"):
        PHOTOS.identity(-1)
    with pytest.raises(PortraitError, match="0 or more, got -3"):
        split(-3)
    with pytest.raises(PortraitError, match=r"unknown expression \['happy'\]; known: neutral, smiling"):
        PortraitWorld(expressions=("happy",))
    with pytest.raises(PortraitError, match=r"unknown style \['oil'\]; known: photo, sketch"):
        PortraitWorld(style_weights=(("oil", 1.0),))
    with pytest.raises(PortraitError, match="image_size must be 8 or more"):
        PortraitWorld(image_size=4)
    person = PHOTOS.identity(0)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "instantid_jax.data.rasterizer")
    with pytest.raises(PortraitError, match=r'needs numba, which is not installed; pip install "instantid_jax\[train\]"'):
        PHOTOS.render(person, PHOTOS.view(person, 0))


def test_people_captions_and_the_package_need_no_numba():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import instantid_jax\n"
        "from instantid_jax.data.portraits import PortraitWorld\n"
        "world = PortraitWorld(); person = world.identity(0); print(world.caption(person, world.view(person, 0), True))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert " of a" in done.stdout
