"""Pixels and everything that is tied to them move together: orientation, resizing, cropping, drawing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.data.record import DataError, View
from instantid_jax.data.transforms import (
    aspect_buckets,
    assign_buckets,
    choose_view,
    decode_photo,
    move_box,
    move_points,
    render_view,
    time_ids,
)
from instantid_jax.face import KeypointError, PhotoError, draw_kps
from tests.data.samples import encoded, photo

_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
DOTS = np.array([[40, 30], [90, 34], [66, 60], [44, 88], [92, 84]], np.float32)


def dotted(size=(160, 120), radius=4):
    """A black photo with a white disc at each of DOTS."""
    ys, xs = np.mgrid[: size[1], : size[0]] + 0.5
    near = np.min([np.hypot(xs - x, ys - y) for x, y in DOTS], axis=0) <= radius
    return Image.fromarray(np.repeat((near * 255).astype(np.uint8)[..., None], 3, axis=2))


def centroids(pixels, points, radius=12):
    """Where the white mass around each point is."""
    found = []
    ys, xs = np.mgrid[: pixels.shape[0], : pixels.shape[1]] + 0.5
    for x, y in points:
        weight = pixels[..., 0] * (np.hypot(xs - x, ys - y) <= radius)
        found.append([(weight * xs).sum() / weight.sum(), (weight * ys).sum() / weight.sum()])
    return np.array(found)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_give_one_upright_photo(orientation):
    upright = dotted()
    stored = upright.transpose(_TURN_BACK[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG", exif=exif)
    image = decode_photo(data, "photo")
    assert image.size == upright.size and np.array_equal(np.asarray(image), np.asarray(upright))
    view = choose_view((120, 160), (60, 60))
    moved = move_points(DOTS, (120, 160), view)
    inside = (moved > 3).all(axis=1) & (moved < 57).all(axis=1)
    assert inside.sum() >= 4
    pixels = render_view(image, (120, 160), view)
    np.testing.assert_allclose(centroids(pixels, moved[inside], 5), moved[inside], atol=0.15)


@pytest.mark.parametrize(("target", "draws"), [((60, 60), None), ((90, 60), (0.9, 0.3)), ((48, 100), (0.1, 0.9)), ((240, 300), (0.5, 0.5))])
def test_keypoints_follow_the_pixels(target, draws):
    image = dotted()
    view = choose_view((120, 160), target, None, draws)
    assert (view.h, view.w) == target and view.resized_h >= target[0] and view.resized_w >= target[1]
    pixels = render_view(image, (120, 160), view)
    moved = move_points(DOTS, (120, 160), view)
    reach = 6 * view.resized_h / 120
    inside = (moved > reach).all(axis=1) & (moved < np.array(target[::-1]) - reach).all(axis=1)
    assert inside.any()
    np.testing.assert_allclose(centroids(pixels, moved[inside], reach), moved[inside], atol=0.2)


def test_the_window_equals_the_same_window_of_the_resized_photo():
    image = photo([((20, 10, 60, 70), 0)], (200, 130))
    view = View(80, 123, 7, 31, 64, 64)
    whole = np.asarray(image.resize((view.resized_w, view.resized_h), Image.Resampling.BILINEAR)).astype(int)
    window = render_view(image, (130, 200), view).astype(int)
    assert np.abs(window - whole[7:71, 31:95]).max() <= 1


def test_a_jpeg_decoded_smaller_gives_nearly_the_same_picture():
    large = dotted().resize((1600, 1200), Image.Resampling.BICUBIC)
    data = encoded(large, "JPEG", quality=95)
    view = choose_view((1200, 1600), (128, 128), np.array([300, 200, 1000, 1000]))
    shrunk = decode_photo(data, "photo", max(view.resized_h, view.resized_w))
    assert shrunk.width < 1600
    exact = render_view(decode_photo(data, "photo"), (1200, 1600), view).astype(int)
    quick = render_view(shrunk, (1200, 1600), view).astype(int)
    assert np.abs(exact - quick).mean() < 1.0
    moved = move_points(DOTS * 10, (1200, 1600), view)
    inside = (moved > 8).all(axis=1) & (moved < 120).all(axis=1)
    np.testing.assert_allclose(centroids(quick, moved[inside], 7), moved[inside], atol=0.25)


@settings(max_examples=300, deadline=None)
@given(
    st.tuples(st.integers(16, 400), st.integers(16, 400)),
    st.sampled_from([(64, 64), (96, 64), (64, 96), (32, 128)]),
    st.tuples(*[st.floats(0, 1)] * 4),
    st.none() | st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
)
def test_the_crop_keeps_the_face(size, target, corners, draws):
    height, width = size
    x0, x1 = sorted((corners[0] * width, corners[1] * width))
    y0, y1 = sorted((corners[2] * height, corners[3] * height))
    view = choose_view(size, target, np.array([x0, y0, x1, y1]), draws)
    assert 0 <= view.top <= view.resized_h - view.h and 0 <= view.left <= view.resized_w - view.w
    assert (view.h, view.w) == target and (view.resized_h == view.h or view.resized_w == view.w)
    moved = move_points(np.array([[x0, y0], [x1, y1]]), size, view)
    for axis, side in ((0, view.w), (1, view.h)):
        extent = moved[1, axis] - moved[0, axis]
        if extent <= side - 2:
            assert moved[0, axis] >= -1.01 and moved[1, axis] <= side + 1.01
        else:  # too large for the window: as much as possible of it is there
            assert min(moved[1, axis], side) - max(moved[0, axis], 0) >= min(side, extent) - 2.01


def test_random_crops_reach_every_place_that_keeps_the_face():
    lefts = {choose_view((64, 128), (64, 64), np.array([40, 20, 60, 40]), (0.5, u / 200)).left for u in range(200)}
    assert lefts == set(range(0, 38))  # the face with its margin of 3 pixels spans 37 to 63
    assert choose_view((64, 128), (64, 64), np.array([40, 20, 60, 40])).left == 32
    assert choose_view((64, 128), (64, 64), np.array([100, 20, 120, 40])).left == 59


def test_micro_conditions_are_sdxl_s():
    view = choose_view((900, 1200), (512, 640), None, (0.999, 0.999))
    assert time_ids((900, 1200), view).tolist() == [900, 1200, 0, 43, 512, 640] and time_ids((900, 1200), view).dtype == np.float32


def test_boxes_are_cut_off_at_the_edges():
    view = View(100, 100, 25, 25, 50, 50)
    assert move_box(np.array([0, 60, 120, 140.0]), (200, 200), view).tolist() == [0, 5, 35, 45]


def test_aspect_buckets_are_the_usual_ones():
    sizes = aspect_buckets(1024)
    assert {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768), (768, 1344)} <= set(sizes)
    assert all(h % 64 == 0 and w % 64 == 0 and h * w <= 1024**2 and max(h, w) <= 2 * min(h, w) for h, w in sizes)
    assert len(sizes) == len(set(sizes)) and {(w, h) for h, w in sizes} == set(sizes)
    assert (64, 64) in aspect_buckets(64, 8)
    with pytest.raises(DataError, match="multiple of step"):
        aspect_buckets(1000)


def test_photos_go_to_the_nearest_aspect():
    sizes = ((64, 64), (96, 48), (48, 96))
    assert assign_buckets(np.array([[500, 500], [1000, 500], [500, 1000], [500, 650], [500, 800]]), sizes).tolist() == [0, 1, 2, 0, 2]


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", "not_a_picture"), (b"<html>", "not_a_picture"), (encoded(dotted())[:-200], "broken"), (encoded(dotted(), "GIF"), "not_a_picture")],
)
def test_unusable_pictures_say_why(data, code):
    with pytest.raises(PhotoError, match="record 7") as caught:
        decode_photo(data, "record 7")
    assert caught.value.code == code


def test_a_picture_of_the_wrong_shape_is_refused():
    with pytest.raises(DataError, match="the record says 160 x 120"):
        render_view(dotted(), (160, 120), View(60, 60, 0, 0, 60, 60))


# --- drawing ----------------------------------------------------------------------------------------------------------------


def test_drawing_at_full_scale_is_the_published_drawing():
    kps = DOTS * 5
    assert np.array_equal(draw_keypoints((640, 512), kps), np.asarray(draw_kps((640, 512), kps)))


@pytest.mark.parametrize("side", [64, 128, 512])
def test_a_scaled_drawing_is_the_published_one_made_smaller(side):
    kps = np.array([[380, 400], [640, 410], [500, 540], [400, 700], [620, 690]], np.float32)
    large = draw_kps((1024, 1024), kps)
    small = draw_keypoints((side, side), kps * side / 1024, side / 1024)
    expected = np.asarray(large.resize((side, side), Image.Resampling.BOX)).astype(float)
    assert np.abs(small - expected).mean() < 1.2
    for channel in range(3):  # the same amount of every colour
        assert small[..., channel].sum() == pytest.approx(expected[..., channel].sum(), rel=0.2)


def test_discs_are_where_the_keypoints_are_to_a_fraction_of_a_pixel():
    kps = np.array([[16.3, 20.8], [40.6, 20.1], [28.5, 32.4], [18.2, 44.9], [39.7, 45.2]])
    pixels = draw_keypoints((64, 64), kps, 0.2).astype(float)
    ys, xs = np.mgrid[:64, :64] + 0.5
    nose = pixels[..., 2] * (pixels[..., 0] == 0) * (pixels[..., 1] == 0)  # pure blue is the nose alone
    assert abs((nose * xs).sum() / nose.sum() - 28.5) < 0.35 and abs((nose * ys).sum() / nose.sum() - 32.4) < 0.35


def test_landmarks_are_drawn_beneath():
    kps = np.array([[16, 20], [40, 20], [28, 32], [18, 45], [40, 45.0]])
    landmarks = np.concatenate([kps, [[50, 50], [10, 10]]])
    pixels = draw_keypoints((64, 64), kps, 0.25, landmarks)
    assert pixels[50, 50].min() > 80 and pixels[10, 10].min() > 80
    assert pixels[32, 28].tolist() == [0, 0, 255]


def test_keypoints_of_another_picture_are_refused():
    with pytest.raises(KeypointError, match="do not belong"):
        draw_keypoints((64, 64), DOTS + 500, 0.25)
