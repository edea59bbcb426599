import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from instantid_jax.face import PhotoError, load_photo, prepare_control_image, resize_img, to_rgb
from instantid_jax.face.photo import MAX_PIXELS, rgb_array

NOISE = np.random.default_rng(3).integers(0, 256, (48, 64, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)

# What was done to the upright picture before it was stored under each EXIF orientation.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def store(image: Image.Image, path: Path, orientation: int, **options) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    transposition = STORED[orientation]
    (image if transposition is None else image.transpose(transposition)).save(path, exif=exif, **options)
    return path


def png(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG file that claims this size; `extra` chunks precede the (short) pixel data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunk(e[:4], e[4:]) for e in extra) + chunk(b"IDAT", zlib.compress(b"\0" * 64))


def refused(path: Path, code: str, *words: str) -> None:
    with pytest.raises(PhotoError) as caught:
        load_photo(path)
    assert caught.value.code == code
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_gives_the_same_pixels(tmp_path, orientation):
    upright = load_photo(store(PICTURE, tmp_path / "photo.png", orientation))
    np.testing.assert_array_equal(np.asarray(upright), NOISE)


@pytest.mark.parametrize("orientation", STORED)
def test_keypoints_land_on_the_eyes_for_every_orientation(tmp_path, analyzer, astronaut, orientation):
    photo = load_photo(store(Image.fromarray(astronaut), tmp_path / "photo.jpg", orientation, quality=95))
    (face,) = analyzer.analyze(np.asarray(photo))
    np.testing.assert_allclose(face.kps[:2], [[201.6, 105.5], [245.3, 104.9]], atol=2.0)


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff"])
def test_lossless_formats_keep_their_pixels(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    PICTURE.save(path, lossless=True)
    loaded = load_photo(path)
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(loaded), NOISE)


def test_the_content_decides_and_not_the_file_name(tmp_path):
    path = tmp_path / "photo.jpg"
    PICTURE.save(path, format="PNG")
    np.testing.assert_array_equal(np.asarray(load_photo(path)), NOISE)


def test_cmyk_gray_and_16_bit_are_converted(tmp_path):
    PICTURE.convert("CMYK").save(tmp_path / "cmyk.tiff")
    np.testing.assert_array_equal(np.asarray(load_photo(tmp_path / "cmyk.tiff")), NOISE)
    gray = NOISE[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(np.asarray(load_photo(tmp_path / "gray.png")), np.repeat(gray[..., None], 3, 2))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(load_photo(tmp_path / "deep.png")), np.repeat(gray[..., None], 3, 2))
    PICTURE.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert load_photo(tmp_path / "cmyk.jpg").mode == "RGB"


def test_palette_and_transparency_are_laid_on_white(tmp_path):
    palette = PICTURE.quantize(16)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(np.asarray(load_photo(tmp_path / "palette.png")), np.asarray(palette.convert("RGB")))
    palette.save(tmp_path / "keyed.png", transparency=0)
    keyed = np.asarray(load_photo(tmp_path / "keyed.png"))
    assert (keyed[np.asarray(palette) == 0] == 255).all()
    layered = PICTURE.copy()
    layered.putalpha(Image.fromarray(np.where(np.arange(64) < 32, 255, 0).astype(np.uint8)[None].repeat(48, 0)))
    layered.save(tmp_path / "alpha.png")
    loaded = np.asarray(load_photo(tmp_path / "alpha.png"))
    np.testing.assert_array_equal(loaded[:, :32], NOISE[:, :32])
    assert (loaded[:, 32:] == 255).all()


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    other = Image.new("RGB", PICTURE.size, "red")
    for name in ("a.webp", "a.png", "a.tiff"):
        PICTURE.save(tmp_path / name, save_all=True, append_images=[other], lossless=True)
        np.testing.assert_array_equal(np.asarray(load_photo(tmp_path / name)), NOISE)


def test_other_formats_are_refused_by_name(tmp_path):
    PICTURE.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", PICTURE.size)])
    refused(tmp_path / "a.gif", "not_a_picture", "GIF", "PNG")
    for name, content, word in (
        ("page.jpg", b"\n<!DOCTYPE html><html>404</html>", "web page"),
        ("lfs.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        ("phone.jpg", b"\0\0\0\x18ftypheic" + b"\0" * 32, "HEIC"),
        ("sky.jpg", b"SIMPLE  =                    T", "FITS"),
        ("empty.jpg", b"", "empty"),
        ("text.jpg", b"hello", "no known picture format"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "not_a_picture", word)


def test_damaged_files_are_refused(tmp_path):
    buffer = io.BytesIO()
    PICTURE.resize((640, 480)).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    refused(tmp_path / "cut.jpg", "broken", "truncated")
    (tmp_path / "cut.png").write_bytes(png(64, 64))
    refused(tmp_path / "cut.png", "broken")
    refused(tmp_path / "none.jpg", "missing", "no such file")
    refused(tmp_path, "missing", "not a file")


@pytest.mark.parametrize("size", [(10_000, 9_000), (14_000, 14_000), (20_000, 15_000), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_before_decoding(tmp_path, size):
    assert size[0] * size[1] > MAX_PIXELS
    (tmp_path / "bomb.png").write_bytes(png(*size))
    refused(tmp_path / "bomb.png", "too_large", "shrink")


def test_a_bomb_in_the_text_of_a_png_is_refused(tmp_path):
    (tmp_path / "text.png").write_bytes(png(64, 64, b"zTXtComment\0\0" + zlib.compress(b"\0" * (64 << 20))))
    refused(tmp_path / "text.png", "broken", "too large")


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (15, 400), (640, 17)])
def test_pictures_too_small_or_narrow_for_a_face_are_refused(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "small.png")
    refused(tmp_path / "small.png", "too_small", f"{size[0]} x {size[1]}")


def test_pixels_of_unknown_range_are_refused():
    for mode, value in (("F", 0.5), ("I", 1 << 20)):
        with pytest.raises(PhotoError) as caught:
            to_rgb(Image.new(mode, (32, 32), value), "depth.tiff")
        assert caught.value.code == "bad_values"


@pytest.mark.parametrize(
    "array", [np.zeros((32, 32, 3)), np.zeros((32, 32), np.uint8), np.zeros((32, 32, 4), np.uint8), np.zeros((3, 32, 32), np.uint8)]
)
def test_arrays_that_are_no_photo_are_refused(array):
    with pytest.raises(PhotoError, match=r"\[h, w, 3\]"):
        rgb_array(array)


@pytest.mark.parametrize(
    ("size", "default", "small"),
    [
        ((1024, 1024), (1280, 1280), (1024, 1024)),
        ((1024, 1280), (1024, 1280), (768, 1024)),
        ((768, 1024), (960, 1280), (768, 1024)),
        ((1920, 1080), (1280, 704), (1024, 576)),
        ((500, 700), (896, 1280), (704, 1024)),
    ],
)
def test_resize_img_gives_the_published_sizes(size, default, small):
    image = Image.new("RGB", size)
    assert resize_img(image).size == default
    assert resize_img(image, max_side=1024).size == small


def test_resize_img_resizes_twice():
    # 500 x 700 becomes 914 x 1280 and then 896 x 1280, each bilinear.
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 500, 3), dtype=np.uint8))
    twice = image.resize((914, 1280), Image.Resampling.BILINEAR).resize((896, 1280), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.asarray(resize_img(image)), np.asarray(twice))
    assert not np.array_equal(np.asarray(resize_img(image)), np.asarray(image.resize((896, 1280), Image.Resampling.BILINEAR)))


def test_resize_img_pads_and_takes_a_size():
    padded = np.asarray(resize_img(PICTURE, size=(40, 20), pad_to_max_side=True, max_side=64))
    assert padded.shape == (64, 64, 3)
    np.testing.assert_array_equal(padded[22:42, 12:52], np.asarray(PICTURE.resize((40, 20), Image.Resampling.BILINEAR)))
    assert (padded[:22] == 255).all() and (padded[:, 52:] == 255).all()
    with pytest.raises(PhotoError, match="does not fit"):
        resize_img(PICTURE, size=(80, 20), pad_to_max_side=True, max_side=64)
    with pytest.raises(PhotoError, match="less narrow"):
        resize_img(Image.new("RGB", (1, 20_000)))


@pytest.mark.parametrize(("width", "height"), [(None, None), (40, 33), (131, 77), (64, 48)])
def test_control_image_equals_diffusers(width, height):
    expected = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True, do_normalize=False).preprocess(PICTURE, height=height, width=width)
    ours = prepare_control_image(PICTURE, width, height)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, expected[0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(ours, prepare_control_image(NOISE, width, height))
    assert ours.min() >= 0 and ours.max() <= 1


def test_control_images_that_cannot_be_used_are_refused():
    with pytest.raises(PhotoError, match="below 8 x 8"):
        prepare_control_image(PICTURE, 7, 64)
    with pytest.raises(PhotoError, match="uint8"):
        prepare_control_image(NOISE.astype(np.int32))
    with pytest.raises(PhotoError, match=r"must lie in \[0, 1\]"):
        prepare_control_image(NOISE / 1.0)


def test_float_control_images_are_not_rounded():
    fine = np.float32(0.3) + np.random.default_rng(1).random((48, 64, 3), dtype=np.float32) * np.float32(0.4)
    np.testing.assert_array_equal(prepare_control_image(fine), fine)
    half = prepare_control_image(fine, 32, 24)
    rounded = prepare_control_image(np.round(fine * 255).astype(np.uint8), 32, 24)
    assert half.shape == (24, 32, 3)
    assert 0 < np.abs(half - rounded).max() < 1.5 / 255
