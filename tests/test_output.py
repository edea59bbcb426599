"""Pictures on disk."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from instantid_jax.output import contact_sheet, parameters_text, read_settings, save_picture, save_run

SETTINGS = {
    "prompt": "a (cat:1.2)\nin snow, ünï",
    "negative_prompt": "dog",
    "steps": 30,
    "sampler": "euler",
    "guidance_scale": 5.0,
    "seed": 4,
    "model": "m",
}


def test_settings_come_back(tmp_path: Path) -> None:
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.png", SETTINGS)
    assert read_settings(tmp_path / "a.png") == SETTINGS
    with Image.open(tmp_path / "a.png") as image:
        text = getattr(image, "text", {})["parameters"]
    assert text == "a (cat:1.2)\nin snow, ünï\nNegative prompt: dog\nSteps: 30, Sampler: euler, CFG scale: 5.0, Seed: 4, Model: m"
    assert parameters_text({"prompt": "x", "steps": 1}) == "x\nSteps: 1"


def test_equal_pictures_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_picture(Image.new("RGB", (8, 8), "red"), tmp_path / name, SETTINGS)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_broken_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_picture(Image.new("RGB", (8, 8), "red"), tmp_path / "a.png", SETTINGS)
    before = (tmp_path / "a.png").read_bytes()

    def fail(self: Image.Image, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.png", SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_a_foreign_png_has_no_settings(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="holds no instantid_jax settings"):
        read_settings(tmp_path / "x.png")


def test_a_run_names_pictures_by_seed_and_hides_folders(tmp_path: Path) -> None:
    photo, pose, vector = (tmp_path / "secret_folder" / name for name in ("me.jpg", "pose.png", "me.npz"))
    photo.parent.mkdir()
    Image.new("RGB", (40, 20), "blue").save(photo)
    Image.new("RGB", (40, 20), "green").save(pose)
    vector.write_bytes(b"vector")
    images = [Image.new("RGB", (8, 8)) for _ in range(2)]
    settings = SETTINGS | {"weights": tmp_path / "secret_folder" / "w", "controlnet": (tmp_path / "secret_folder" / "c",)}
    paths = save_run(tmp_path / "out", images, images[0], {"face": [photo, vector], "pose": [pose], "control": []}, settings)
    assert [p.name for p in paths] == ["000004.png", "000005.png", "sheet.png"]
    stored = read_settings(paths[1])
    assert stored["seed"] == 5
    assert stored["face_sha256"] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in (photo, vector)]
    assert stored["pose_sha256"] == [hashlib.sha256(pose.read_bytes()).hexdigest()]
    assert (stored["weights"], stored["controlnet"]) == ("w", ["c"])
    assert "control_sha256" not in stored and "secret_folder" not in str(stored)
    with Image.open(paths[2]) as sheet:  # photo, pose, keypoints, two pictures: two rows of three
        assert sheet.size == (3 * 396 + 12, 2 * 418 + 12)
        assert sheet.getpixel((12 + 192, 12 + 192)) == (0, 0, 254) and sheet.getpixel((12 + 396 + 192, 12 + 192)) == (0, 128, 0)


def test_contact_sheet_holds_every_picture() -> None:
    sheet = contact_sheet([(str(i), Image.new("RGB", (10, 5), "red")) for i in range(5)], side=50)
    assert sheet.size == (3 * 62 + 12, 2 * 84 + 12)
    assert sheet.getpixel((12 + 25, 12 + 25)) == (255, 0, 0)


def test_pictures_with_other_settings_are_not_written_over(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))

    def names(settings: dict) -> list[str]:
        return [path.name for path in save_run(tmp_path, [picture], picture, {}, settings)]

    assert names(SETTINGS) == ["000004.png", "sheet.png"]
    assert names(SETTINGS) == ["000004.png", "sheet.png"]
    assert names(SETTINGS | {"prompt": "another"}) == ["000004-2.png", "sheet-2.png"]
    (tmp_path / "000004-3.png").write_text("no picture")
    assert names(SETTINGS | {"prompt": "a third"}) == ["000004-4.png", "sheet-3.png"]


def test_seeds_wrap_as_the_pipelines_do(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    paths = save_run(tmp_path, [picture, picture], picture, {}, SETTINGS | {"seed": 2**32 - 1})
    assert [path.name for path in paths] == ["4294967295.png", "000000.png", "sheet.png"]
    assert read_settings(paths[1])["seed"] == 0
