"""The invisible mark."""

import io

import numpy as np
import pytest
from PIL import Image

from instantid_jax import watermark
from instantid_jax.defaults import people
from instantid_jax.face import load_photo
from instantid_jax.watermark import detect_watermark, mark_picture, strength


@pytest.fixture(scope="module")
def photo():
    return load_photo("instantid_jax/assets/astronaut.jpg")


@pytest.fixture(scope="module")
def marked(photo):
    return mark_picture(photo)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2))


def test_the_mark_is_as_far_from_the_picture_as_said(photo, marked):
    assert marked.size == photo.size and marked.mode == "RGB"
    assert abs(psnr(marked, photo) - strength(512, 512)) < 0.5
    assert [round(strength(side, side), 1) for side in (64, 512, 1024, 4096)] == [36.0, 43.5, 46.0, 46.0]
    assert mark_picture(photo).tobytes() == marked.tobytes()


def test_the_mark_is_found_after_usual_treatment(photo, marked):
    jpeg = io.BytesIO()
    marked.save(jpeg, "JPEG", quality=70)
    with Image.open(jpeg) as compressed:
        assert detect_watermark(compressed).z > 15
    assert not detect_watermark(photo).marked
    half = detect_watermark(marked.resize((256, 256), Image.Resampling.LANCZOS))
    assert half.marked and half.scale == 2
    cut = detect_watermark(marked.crop((31, 17, 480, 500)))
    assert cut.marked and cut.shift == (17, 31) and cut.z > 10


def test_a_picture_of_64_pixels_holds_it():
    heads = [load_photo(person.photo).resize((64, 64)) for person in people()]
    assert all(detect_watermark(mark_picture(head)).marked for head in heads)
    assert not any(detect_watermark(head).marked for head in heads)


def test_pictures_without_content_are_not_marked():
    for picture in (Image.new("RGB", (64, 64)), Image.new("L", (100, 30), 255), Image.fromarray(np.tile(np.uint8([[0, 255], [255, 0]]), (64, 64)))):
        assert not detect_watermark(picture).marked


def test_other_noise_is_not_taken_for_it():
    """z of (2) is a standard normal variable."""
    random = np.random.default_rng(0)
    z = [watermark._correlations(random.normal(128, 20, (48, 64)).astype(np.float32))[0, 0] for _ in range(400)]
    assert abs(np.mean(z)) < 0.2 and abs(np.std(z) - 1) < 0.12


def test_exit_statuses(photo, marked, tmp_path, capsys):
    photo.save(tmp_path / "plain.png"), marked.save(tmp_path / "marked.png")
    (tmp_path / "text.png").write_text("no picture")
    assert watermark.main([str(tmp_path / "marked.png")]) == 0
    assert watermark.main([str(tmp_path / "marked.png"), str(tmp_path / "plain.png")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "marked.png: marked (z " in lines[0] and "plain.png: not marked (z " in lines[2]
    assert watermark.main([str(tmp_path / "text.png")]) == 2
    assert watermark.main([str(tmp_path / "nowhere.png")]) == 2
    assert capsys.readouterr().err.count("cannot be read as a picture") == 2
    assert watermark.main([str(tmp_path / "text.png"), str(tmp_path / "marked.png")]) == 2
    assert "marked.png: marked (z " in capsys.readouterr().out  # one that cannot be read does not hide the others
    with pytest.raises(SystemExit) as caught:
        watermark.main([])
    assert caught.value.code == 2
