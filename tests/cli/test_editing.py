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
DRAWN = [COMMANDS[0], *(pytest.param(command, marks=pytest.mark.slow) for command in COMMANDS[1:])]
PERSON = "instantid_jax/assets/portraits/people/person_1.png"


def arrays(path: Path, size: tuple[int, int]) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))


@pytest.mark.parametrize("command", DRAWN, ids=lambda command: " ".join(re.findall(r"--\S+", command)))
def test_commands_draw(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command.removeprefix("python sample.py "))
    assert sample.main([*arguments, "--steps", "4", "--no-watermark", "--out", str(tmp_path)]) == 0
    (first,) = (path for path in tmp_path.iterdir() if path.name != "sheet.png")
    settings = read_settings(first)
    assert len(settings["init_sha256"]) == 1 and "init_image" not in settings
    with Image.open(first) as image:
        size = image.size
    initial = arrays(ROOT / arguments[arguments.index("--init-image") + 1], size)
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
        (f"--face {PERSON} --refine-face --ip-adapter-scale inside:1;outside:0", 2, "--refine-face draws a face alone, which has no outside"),
        (
            f"--face {PERSON} --refine-face --steps 2 --ip-adapter-scale [1,2]",
            2,
            "the second pass of --refine-face: --ip-adapter-scale the list has 2",
        ),
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


def test_changed_pictures_are_made_again_byte_for_byte_from_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(COMMANDS[1].removeprefix("python sample.py "))
    more = ["--ip-adapter-scale", "linear(1, 0.3)", "--num-images", "2", "--refine-face", "--steps", "4"]
    assert sample.main([*arguments, *more, "--out", str(tmp_path / "a")]) == 0
    first, mask = tmp_path / "a" / "000001.png", str(ROOT / "docs/images/face_mask.png")
    capsys.readouterr()
    assert sample.main(["--replay", str(first), "--out", str(tmp_path / "b")]) == 1
    assert "was made with 1 file(s) of --mask-image; name them (SHA-256 " in capsys.readouterr().err
    assert sample.main(["--replay", str(first), "--mask-image", PERSON, "--out", str(tmp_path / "b")]) == 1
    assert f"{PERSON} is not the --mask-image of 000001.png: SHA-256 " in capsys.readouterr().err
    assert sample.main(["--replay", str(first), "--mask-image", mask, "--init-image", PERSON, "--out", str(tmp_path / "b")]) == 1
    assert f"{PERSON} is not the --init-image of 000001.png: SHA-256 " in capsys.readouterr().err
    assert sample.main(["--replay", str(first), "--mask-image", mask, "--out", str(tmp_path / "b")]) == 0
    assert [path.read_bytes() for path in (tmp_path / "b").iterdir()] == [first.read_bytes()]


def test_compared_strengths_hold_in_the_second_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(COMMANDS[2].removeprefix("python sample.py "))
    values = ["ip_adapter_scale=0", "ip_adapter_scale=linear(2, 0)"]
    assert sample.main([*arguments, "--compare", *values, "--steps", "4", "--out", str(tmp_path / "a")]) == 0
    first, second = (tmp_path / "a" / f"compare_0{i}_000000.png" for i in range(2))
    assert (arrays(first, (64, 64)) != arrays(second, (64, 64))).any()
    assert sample.main(["--replay", str(second), "--init-image", "docs/images/small_face.png", "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / second.name).read_bytes() == second.read_bytes()
