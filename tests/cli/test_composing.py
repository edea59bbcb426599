"""The commands of docs/composing.md, on the small model that comes along."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from instantid_jax.output import read_settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/composing.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.strip().splitlines()]
SAMPLE = [line.removeprefix("python sample.py ") for line in COMMANDS if line.startswith("python sample.py ")]
DRAWN = [SAMPLE[0], *(pytest.param(command, marks=pytest.mark.slow) for command in SAMPLE[1:])]


@pytest.mark.parametrize("command", DRAWN, ids=lambda command: " ".join(re.findall(r"--\S+", command)))
def test_commands_draw(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert sample.main([*shlex.split(command), "--steps", "2", "--out", str(tmp_path)]) == 0
    first = min(path for path in tmp_path.iterdir() if path.name != "sheet.png")
    with Image.open(first) as image:
        assert np.asarray(image).std() > 5
    settings = read_settings(first)
    if "--view" in command or "--blend" in command:
        pictures = sorted(path for path in tmp_path.iterdir() if path.name != "sheet.png")
        assert len(pictures) == 5 and len({path.read_bytes() for path in pictures}) == 5
        assert settings["variant"] == ("yaw=-30" if "--view" in command else "0.00")
    if "--face-combine" in command:
        lines = capsys.readouterr().out.splitlines()[:3]
        assert [line.split(":")[0] for line in lines] == ["person_1.png", "person_15.png", "person_17.png"]
        assert "counts 0.50, similarity to the others" in lines[0] and settings["face_weight"] == [2.0, 1.0, 1.0]
    if "--people" in command:
        assert settings["size"] == "128x64" and len(settings["face_sha256"]) == 2 and len(settings["people_sha256"]) == 1
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.width > 600


@pytest.mark.parametrize(
    ("text", "options", "status", "message"),
    [
        ("[[person]]\nface = 'nowhere.jpg'\nbox = [0, 0, 1, 1]", "", 1, "nowhere.jpg: there is no such file"),
        ("[[person]]\nbox = [0, 0, 1, 1]", "", 1, "person 1: has no face"),
        ("[[person]]\nface = 'gray.png'\nbox = [0, 0, 1, 1]", "", 1, "person 1: "),
        ("", "--face gray.png", 2, "leave out --face"),
        ("", "--control-mask gray.png", 2, "leave out --control-mask"),
        ("", "--jobs jobs.jsonl", 2, "--people is not for --jobs"),
        ("pose = 'gray.png'\n[[person]]\nface = 'gray.png'", "", 1, "gray.png: no face found"),
    ],
)
def test_wrong_people_get_one_sentence(
    text: str, options: str, status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "gray").save("gray.png")
    Path("people.toml").write_text(text)
    assert sample.main(["--people", "people.toml", "--out", str(tmp_path / "out"), *options.split()]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sample.py: ") and message in lines[0]
