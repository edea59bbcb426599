"""The commands of docs/editing.md, on the small model that comes along, and what is wrong with others."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from instantid_jax.output import read_settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/editing.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.strip().splitlines()]
PERSON = "instantid_jax/assets/portraits/people/person_1.png"


def arrays(path: Path, size: tuple[int, int]) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(re.findall(r"--\S+", command)))
def test_commands_draw(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command.removeprefix("python sample.py "))
    assert sample.main([*arguments, "--steps", "4", "--out", str(tmp_path)]) == 0
    (first,) = (path for path in tmp_path.iterdir() if path.name != "sheet.png")
    settings = read_settings(first)
    assert len(settings["init_sha256"]) == 1 and "init_image" not in settings
    initial = arrays(ROOT / arguments[arguments.index("--init-image") + 1], size := Image.open(first).size)
    made = arrays(first, size)
    different = (made != initial).any(axis=-1)
    assert different.any()
    if "--mask-image" in arguments:
        mask = arrays(ROOT / arguments[arguments.index("--mask-image") + 1], size)[..., 0]
        assert len(settings["redrawn_sha256"]) == 1 and not different[:4].any() and different[mask > 200].mean() > 0.9
    elif "--refine-face" in arguments:
        assert "left as it is" not in capsys.readouterr().err
        rows, columns = np.flatnonzero(different.any(axis=1)), np.flatnonzero(different.any(axis=0))
        assert max(np.ptp(rows), np.ptp(columns)) < 64 < min(size)
    else:
        assert settings["strength"] == 0.6 and different.mean() > 0.9


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ("--strength 0.5", 2, "--strength goes with --init-image"),
        (f"--face {PERSON} --mask-image gray.png", 2, "--mask-image goes with --init-image"),
        (f"--face {PERSON} --init-image gray.png --mask-blur 2", 2, "--mask-blur goes with --mask-image"),
        (f"--face {PERSON} --refine-margin 1", 2, "--refine-margin goes with --refine-face"),
        (f"--face {PERSON} --refine-face --refine-feather 2", 2, "--refine-feather must be between 0 and 0.5, not 2"),
        (f"--face {PERSON} --init-image gray.png --strength 0", 2, "--strength must be at least 0.05 with 20 steps"),
        (f"--face {PERSON} --init-image gray.png --strength 0 --refine-face --view yaw=3", 2, "--view has no meaning at --strength 0"),
        ("--refine-face", 2, "--refine-face needs a person to draw"),
        ("--jobs jobs.jsonl --init-image gray.png", 2, "--init-image is not for --jobs"),
        (f"--face {PERSON} --init-image nowhere.png", 1, "nowhere.png: there is no such file"),
        (f"--face {PERSON} --init-image gray.png", 1, "gray.png: no face found"),
    ],
)
def test_wrong_options_get_one_sentence(
    options: str, status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "gray").save("gray.png")
    Path("jobs.jsonl").write_text('{"face": "gray.png"}')
    given = options.replace(PERSON, str(ROOT / PERSON))
    assert sample.main([*given.split(), "--out", str(tmp_path / "out")]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sample.py: ") and message in lines[0]
