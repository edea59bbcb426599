"""The commands of docs/pictures.md, on the small model that comes along; and pictures made again."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sample
from instantid_jax import watermark
from instantid_jax.defaults import people
from instantid_jax.output import read_settings, save_picture

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/pictures.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.strip().splitlines()]
SAMPLE = [line.removeprefix("python sample.py ") for line in COMMANDS if line.startswith("python sample.py ") and "--replay" not in line]
FACE = str(people()[0].photo)
SHORT = ["--face", FACE, "--steps", "2"]


@pytest.mark.parametrize("command", SAMPLE, ids=lambda command: " ".join(re.findall(r"--\S+", command)))
def test_commands_draw(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert sample.main([*shlex.split(command), "--steps", "2", "--out", str(tmp_path)]) == 0
    pictures = sorted(path for path in tmp_path.iterdir() if path.name != "sheet.png")
    settings = [read_settings(path) for path in pictures]
    if "--prompt-file" in command:
        assert [one["seed"] for one in settings] == [0, 0, 7] and settings[2]["style"] == ["Pixel art"]
    elif "--style" in command:
        assert [one["style"] for one in settings] == [["Photo"], ["Pencil sketch"], ["Watercolor"], ["Pixel art"]] * 2
        assert len({path.read_bytes() for path in pictures}) == 8
    if "--format" in command:
        assert [path.suffix for path in pictures] == [".webp"]


def test_all_prompts_share_one_compilation(tmp_path: Path, compilations: Any) -> None:
    def draw(prompt: str) -> int:
        with compilations() as compiled:
            assert sample.main([*SHORT, "--prompt", prompt, "--style", "Photo", "--out", str(tmp_path)]) == 0
        return len(compiled)

    draw("first")
    assert draw("{one|two|a third} person") <= draw("one more person")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_picture_is_made_again_byte_for_byte(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", r"a person with {red|blond} hair, \{x\|y\}", "--style", "Pixel art", "--num-images", "2", "--seed", "5"]
    assert sample.main([*SHORT, *options, "--format", kind, "--out", str(tmp_path / "a")]) == 0
    first = sorted((tmp_path / "a").glob("prompt_01_000006*"))[0]
    assert watermark.main([str(first)]) == 0
    capsys.readouterr()
    moved = tmp_path / f"moved{first.suffix}"
    shutil.copy(first, moved)
    assert sample.main(["--replay", str(moved), "--out", str(tmp_path / "b")]) == 0
    assert [path.read_bytes() for path in (tmp_path / "b").iterdir()] == [first.read_bytes()]
    assert "in place of" not in capsys.readouterr().out
    assert sample.main(["--replay", str(moved), "--seed", "9", "--no-watermark", "--out", str(tmp_path / "c")]) == 0
    told = capsys.readouterr().out
    assert "--seed 9 in place of 6" in told and "--watermark False in place of True" in told
    (other,) = (tmp_path / "c").iterdir()
    assert read_settings(other) == read_settings(first) | {"seed": 9, "watermark": False} and watermark.main([str(other)]) == 1


@pytest.mark.slow
def test_the_default_sheets_pictures_are_made_again(tmp_path: Path) -> None:
    assert sample.main(["--steps", "1", "--out", str(tmp_path / "a")]) == 0
    path = tmp_path / "a" / f"{people()[1].name}_03.png"
    assert sample.main(["--replay", str(path), "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
    assert sample.main(["--replay", str(tmp_path / "a" / "sheet.png"), "--out", str(tmp_path / "b")]) == 1


def test_a_view_is_made_again_and_a_kept_face_needs_no_photo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "me.png"
    with Image.open(FACE) as image:
        image.resize((200, 200)).save(photo)
    options = ["--face", str(photo), "--steps", "2", "--view", "yaw=-20", "--view", "yaw=20"]
    assert sample.main([*options, "--keep-face-vector", "--out", str(tmp_path / "a")]) == 0
    assert sample.main([*options, "--out", str(tmp_path / "plain")]) == 0
    kept, plain = (tmp_path / name / "view_01_000000.png" for name in ("a", "plain"))
    assert len(read_settings(kept)["face_vector"]) == 128 and not [key for key in read_settings(plain) if key.startswith("face_v")]
    other = ["--face", str(people()[1].photo), "--allow-changed-files", "--out", str(tmp_path / "other")]
    assert sample.main(["--replay", str(kept), *other]) == 0
    assert "its vector is not stored" in capsys.readouterr().out
    assert not {"face_vector", "face_keypoints"} & set(read_settings(tmp_path / "other" / kept.name))
    photo.rename(tmp_path / "away.png")
    assert sample.main(["--replay", str(kept), "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / kept.name).read_bytes() == kept.read_bytes()
    capsys.readouterr()
    assert sample.main(["--replay", str(plain), "--out", str(tmp_path / "b")]) == 1
    assert "was made with 1 file(s) of --face; name them (SHA-256 " in capsys.readouterr().err
    assert sample.main(["--replay", str(plain), "--face", str(tmp_path / "away.png"), "--out", str(tmp_path / "c")]) == 0
    assert (tmp_path / "c" / plain.name).read_bytes() == plain.read_bytes()


def test_other_files_are_refused_unless_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main([*SHORT, "--out", str(tmp_path / "a")]) == 0
    path, other = tmp_path / "a" / "000000.png", str(people()[1].photo)
    changed = tmp_path / "weights.png"
    save_picture(Image.new("RGB", (64, 64)), changed, read_settings(path) | {"weights_sha256": "0" * 64})
    named = tmp_path / "named.png"
    save_picture(Image.new("RGB", (64, 64)), named, read_settings(path) | {"weights": "w"})
    nobody, batch = tmp_path / "nobody.png", {"count": 1, "index": 0, "prompts": ["x"], "negative_prompts": [None]}
    save_picture(Image.new("RGB", (64, 64)), nobody, read_settings(path) | {"face": "nobody", "batch": batch})
    capsys.readouterr()
    for arguments, message in (
        (["--replay", str(path), "--face", other], f"{other} is not the --face of 000000.png: SHA-256 "),
        (["--replay", str(changed)], "holds not the weights that weights.png was made with: SHA-256 "),
        (["--replay", str(named)], "was made with weights called 'w'; name their folder with --weights"),
        (["--replay", str(tmp_path / "nowhere.png")], "nowhere.png: there is no such file"),
        (["--replay", FACE], "holds no settings of sample.py"),
        (["--replay", str(nobody)], "shows nobody, who is none of the people who come along (person_"),
    ):
        assert sample.main([*arguments, "--out", str(tmp_path / "b")]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("sample.py: ") and message in lines[0]
    assert sample.main(["--replay", str(path), "--face", other, "--allow-changed-files", "--out", str(tmp_path / "b")]) == 0
    told = capsys.readouterr().out
    assert "is not the --face of 000000.png" in told
    settings = read_settings(tmp_path / "b" / "000000.png")
    assert settings["face_sha256"] != read_settings(path)["face_sha256"] and settings["seed"] == 0


def test_the_arrays_of_python_are_not_marked(tmp_path: Path) -> None:
    assert sample.main([*SHORT, "--no-watermark", "--out", str(tmp_path)]) == 0
    assert watermark.main([str(tmp_path / "000000.png")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--people", str(ROOT / "docs/people.toml")),
        ("--face", FACE, "--blend", str(people()[1].photo), "--blend-steps", "2"),
        ("--face", FACE, "--prompt-file", str(ROOT / "docs/prompts.csv"), "--format", "webp"),
    ],
    ids=["people", "blend", "file of prompts"],
)
def test_groups_blends_and_files_of_prompts_are_made_again(options: tuple[str, ...], tmp_path: Path) -> None:
    assert sample.main([*options, "--steps", "2", "--out", str(tmp_path / "a")]) == 0
    pictures = [path for path in sorted((tmp_path / "a").iterdir()) if path.stem != "sheet"]
    files = options if options[0] == "--people" else ()
    for path in pictures[:: max(len(pictures) - 1, 1)]:
        assert sample.main(["--replay", str(path), *files, "--out", str(tmp_path / "b")]) == 0
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
