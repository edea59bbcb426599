"""The commands of docs/strengths.md, on the small model that comes along."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from instantid_jax.output import read_settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/strengths.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.strip().splitlines()]
SAMPLE = [line.removeprefix("python sample.py ") for line in COMMANDS if line.startswith("python sample.py ")]
DRAWN = [SAMPLE[0], *(pytest.param(command, marks=pytest.mark.slow) for command in SAMPLE[1:])]
FACE = ["--face", "instantid_jax/assets/portraits/people/person_1.png"]


def test_the_page_has_commands() -> None:
    assert len(SAMPLE) == len(COMMANDS) == 7


@pytest.mark.parametrize("command", DRAWN, ids=lambda command: " ".join(re.findall(r"--\S+", command)))
def test_commands_draw(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert sample.main([*shlex.split(command), "--steps", "3", "--out", str(tmp_path)]) == 0
    pictures = sorted(path for path in tmp_path.iterdir() if path.name != "sheet.png")
    for path in pictures:
        with Image.open(path) as image:
            assert np.asarray(image).std() > 5
    settings = read_settings(pictures[0])
    if "--ip-adapter-scale" in command and "linear(1, 0.3)" in command:
        assert settings["ip_adapter_scale"] == "linear(1, 0.3)" and settings["identitynet_scale"] == "1 until 0.5 then 0.7"
        with Image.open(pictures[0]) as image:
            assert 'IdentityNet strength: 1 until 0.5 then 0.7, Adapter strength: "linear(1, 0.3)"' in getattr(image, "text", {})["parameters"]
    if "--compare" in command:
        assert len(pictures) == 6 and len({path.read_bytes() for path in pictures}) == 6
        assert settings["identitynet_scale"] == 1.0 and settings["compare"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ip-adapter-scale", "linear(1 0)"], "--ip-adapter-scale 'linear(1 0)': ',' is needed (at '0', character 10)"),
        (["--ip-adapter-scale", "inside: 1; outside: 0"], "a strength outside needs --control-mask or --enhance-non-face-region, which says"),
        (["--ip-adapter-scale", "[1, 2]"], "--ip-adapter-scale the list has 2 values for 20 steps; give one for each step"),
        (["--identitynet-scale", "up=1, down=1, mid=1"], "--identitynet-scale or --control-scale there is no layer 'up' here"),
        (["--compare", "ip_adapter_scal=1"], "did you mean '--ip-adapter-scale'?"),
        (["--compare", "guidance_scale=linear(1, 0)"], "'linear(1, 0)' is no number"),
        (["--compare", "identitynet_scale=linear(1, 0"], "')' is needed (at the end)"),
        (["--compare", "control_end=0.5", "--view", "yaw=1"], "leave out --view and --blend"),
        (["--identity-guidance-scale", "-1"], "--identity-guidance-scale must be between 0 and 100, not -1"),
        (["--negative-identity-noise", "-1"], "--negative-identity-noise must be between 0 and 10, not -1"),
    ],
    ids=str,
)
def test_wrong_strengths_get_one_sentence(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert sample.main([*FACE, *options, "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sample.py: ") and message in lines[0]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (
            ["--ip-adapter-scale", "linear(1, 0.3)", "--identity-guidance-scale", "2", "--negative-identity-noise", "0.35", "--num-images", "2"],
            "000001",
        ),
        (["--compare", "identitynet_scale=1", "identitynet_scale=1, mid=0.5", "negative_identity_seed=7", "--seed", "3"], "compare_01_000003"),
    ],
    ids=["a schedule", "a comparison"],
)
def test_pictures_are_made_again_byte_for_byte(options: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert sample.main([*FACE, *options, "--steps", "3", "--out", str(tmp_path / "a")]) == 0
    first = tmp_path / "a" / f"{name}.png"
    assert sample.main(["--replay", str(first), "--out", str(tmp_path / "b")]) == 0
    assert [path.read_bytes() for path in (tmp_path / "b").iterdir()] == [first.read_bytes()]
