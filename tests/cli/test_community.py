"""The commands of docs/community.md, on the model that comes along and LoRAs made for it."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from lora_files import write_lora
from PIL import Image

import sample
from convert_weights.__main__ import Command
from convert_weights.__main__ import main as convert
from instantid_jax import sampling
from instantid_jax.defaults import DEFAULT_WEIGHTS, default_config, people
from instantid_jax.diffusion import PRESETS
from instantid_jax.pipeline import InstantIDPipeline, PipelineOutput

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/community.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", TEXT, re.S)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.strip().splitlines()]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
DRAWN = [line for line in COMMANDS if " red.safetensors" in line]
"""The LoRA that the page makes, and its pictures."""
SAMPLE = [line.removeprefix("python sample.py ") for line in COMMANDS if line.startswith("python sample.py ") and line not in DRAWN]
IMPORT = [line.removeprefix("python -m convert_weights ") for line in COMMANDS if line.startswith("python -m convert_weights import")]
LORAS = ("style.safetensors", "detail.safetensors", "lcm-lora-sdxl.safetensors", "Hyper-SDXL-8steps-lora.safetensors")
SITES = {
    "unet": (
        "down_blocks/1/attentions/0/transformer_blocks/0/attn1/to_q/kernel",
        "down_blocks/1/attentions/0/transformer_blocks/0/attn2/to_out_0/kernel",
        "mid_block/attentions/0/transformer_blocks/1/ff/net_0/proj/kernel",
        "mid_block/resnets/1/conv2/kernel",
    ),
    "text_encoder": ("encoder/layers/0/self_attn/q_proj/kernel",),
    "text_encoder_2": ("encoder/layers/0/mlp/fc1/kernel",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LoRAs that the page names."""
    out = tmp_path_factory.mktemp("community")
    for name in LORAS:
        write_lora(out / name, default_config(), sites=SITES, seed=name, size=2.0)
    return out


def in_place(command: str, out: Path) -> list[str]:
    """A command with the small model in the place of converted weights, and one of its people as the face."""
    arguments = shlex.split(command)
    for name in ("--weights", "--analyzer-root", "--face"):
        if name in arguments:
            at = arguments.index(name)
            del arguments[at : at + 2]
    return [*arguments, "--face", str(people()[0].photo), "--out", str(out)]


def test_the_page_has_all_commands() -> None:
    assert (len(SAMPLE), len(IMPORT), len(DRAWN), len(COMMANDS), len(PYTHON)) == (5, 3, 4, 13, 3)
    assert all(f"`{name}`" in TEXT or f"`-{name.split('-')[1]}`" in TEXT for name in PRESETS)


def test_a_lora_changes_the_small_model_s_picture(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    pictures = []
    for options in ("", "--lora-scale 0"):
        command = SAMPLE[0].replace("--lora-scale 0.8", options) if options else SAMPLE[0]
        assert sample.main([*in_place(command, tmp_path), "--steps", "2", "--prompt", "photo of a person"]) == 0
    for path in sorted(tmp_path.glob("0000*.png")):
        with Image.open(path) as image:
            pictures.append(np.asarray(image, np.float32))
    assert len(pictures) == 2 and np.abs(pictures[0] - pictures[1]).mean() > 1


@pytest.mark.parametrize("command", SAMPLE[1:])
def test_commands_that_draw(command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, Any] = {}

    def load(**options: Any) -> Any:
        called["loaded"] = options

        def call(**arguments: Any) -> PipelineOutput:
            called.update(arguments)
            return PipelineOutput([Image.new("RGB", (64, 64), "gray")])

        return call

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sampling, "default_pipeline", load)
    assert sample.main(in_place(command, tmp_path)) == 0
    arguments = shlex.split(command)
    assert [lora.name for lora in called["loaded"]["loras"]] == [name for name in arguments if name in LORAS]
    if "--preset" in arguments:
        preset = PRESETS[arguments[arguments.index("--preset") + 1]]
        assert {name: called[name] for name in preset} == preset


@pytest.mark.parametrize("command", IMPORT)
def test_commands_that_import(command: str) -> None:
    chosen = tyro.cli(Command, args=shlex.split(command))  # type: ignore[call-overload]
    assert chosen.base and chosen.instantid and chosen.out


@pytest.mark.parametrize("steps", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_lora_extracted_as_documented(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With all steps it is the page's own picture, but for JPEG and the last bits of other machines."""
    (tmp_path / "instantid_jax").symlink_to(ROOT / "instantid_jax")
    monkeypatch.chdir(tmp_path)
    exec(PYTHON[1], {})
    extract, *draw = DRAWN
    assert convert(shlex.split(extract)[3:]) == 0
    assert "unet                      22 of 175             8                     82.5 %" in capsys.readouterr().out
    for command in draw:
        assert sample.main([*shlex.split(command)[2:], "--steps", str(steps)]) == 0
    exec(PYTHON[2], {})
    pictures = []
    for scale in ("0", "0.5", "1"):
        with Image.open(f"lora_{scale}/000000.png") as image:
            pictures.append(np.asarray(image, np.float32))
    plain, half, whole = pictures
    assert np.abs(whole - plain).mean() > 1.5 * np.abs(half - plain).mean() > 0.5
    if steps < 20:
        return
    with Image.open("lora.png") as made, Image.open(ROOT / "docs/images/lora.jpg") as shown:
        assert made.size == shown.size and np.abs(np.asarray(made, np.float32) - np.asarray(shown, np.float32)).mean() < 3
    redness = [(picture[..., 0] - picture[..., 1:].mean(axis=-1))[4:16, 20:44].mean() for picture in pictures]
    assert redness[0] + 5 < redness[1] < redness[2] - 20  # of the hair over the face


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("python -m convert_weights extract-lora")])
def test_commands_that_extract(command: str) -> None:
    chosen = tyro.cli(Command, args=shlex.split(command)[3:])  # type: ignore[call-overload]
    assert chosen.base and chosen.tuned and chosen.rank in (8, 32)


def test_the_python_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    code = PYTHON[0]
    names: dict[str, Any] = {}
    exec(code.replace('"weights"', repr(str(DEFAULT_WEIGHTS))), names)
    assert isinstance(names["merged"], InstantIDPipeline) and names["pipe"].lora_scales == []
