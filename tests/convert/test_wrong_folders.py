"""A folder of another kind is named as what it is, and a refused configuration by its file; neither is called damaged."""

import json
from pathlib import Path

import pytest

from convert_weights.__main__ import main
from convert_weights.readers import read_controlnet, read_model
from convert_weights.source import SourceError
from instantid_jax.config import ConfigError
from instantid_jax.pipeline import PipelineError, read_config, read_controlnet_config


def test_a_converted_controlnet_is_no_model_and_the_reverse(converted: Path, converted_controlnet: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        read_config(converted_controlnet)
    assert str(caught.value) == (
        f"{converted_controlnet} is a converted ControlNet, not a folder of converted weights; give it as controlnets (--controlnet), "
        "and here what is made with: python -m convert_weights import"
    )
    with pytest.raises(PipelineError) as caught:
        read_controlnet_config(converted)
    assert str(caught.value).startswith(f"{converted} is a folder of converted weights, not a converted ControlNet; give it as the model (--weights)")


def test_a_published_folder_is_told_to_be_converted(golden_snapshot: Path) -> None:
    for read in (read_config, read_controlnet_config):
        with pytest.raises(PipelineError, match="is a published ControlNetModel, which is not converted yet; do so with: python -m convert_weights"):
            read(golden_snapshot / "controlnet_2")


def test_only_a_controlnet_is_imported_as_one(golden_snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = golden_snapshot / "base/unet"
    with pytest.raises(SourceError, match=r"unet/config.json describes a UNet2DConditionModel where a ControlNetModel is wanted"):
        read_controlnet(unet)
    file = unet / "config.json"
    assert main(["import", "--controlnet", str(file), "--out", str(tmp_path / "w")]) == 1
    error = capsys.readouterr().err
    assert error == f"convert_weights: {file} is a file; --controlnet takes a folder in diffusers' layout, with config.json beside the weights\n"


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "text_encoder_2", "scheduler"])
def test_a_refused_configuration_is_named_by_its_file(name: str, golden_snapshot: Path, tmp_path: Path) -> None:
    for path in (golden_snapshot / "base").rglob("*"):
        if path.is_file():
            there = tmp_path / path.relative_to(golden_snapshot / "base")
            there.parent.mkdir(parents=True, exist_ok=True)
            there.symlink_to(path)
    path = tmp_path / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
    content = json.loads(path.read_text()) | {"made_up": 1}
    path.unlink()
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="made_up") as caught:
        read_model(tmp_path, golden_snapshot / "instantid")
    assert str(caught.value).startswith(f"{path}: ")


def test_a_refused_controlnet_configuration_is_named_by_its_file(golden_snapshot: Path, tmp_path: Path) -> None:
    content = json.loads((golden_snapshot / "controlnet_2/config.json").read_text()) | {"global_pool_conditions": True}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="global_pool_conditions=True is not supported") as caught:
        read_controlnet(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
