"""UNets in the place of the base's, and what is said about their training at import."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert_weights.__main__ import main
from convert_weights.importing import import_snapshot
from convert_weights.readers import read_model
from convert_weights.rules import MappingError, join, plan
from convert_weights.source import ConversionError, SourceError
from convert_weights.tables import diffusers, single_file
from instantid_jax.checkpoint import load_weights
from instantid_jax.config import ModelConfig
from instantid_jax.diffusion import PRESETS, make_sampler
from instantid_jax.models import build_networks

Arrays = dict[str, np.ndarray]
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(golden_snapshot: Path) -> Path:
    return golden_snapshot / "base"


@pytest.fixture(scope="module")
def distilled(base: Path) -> Arrays:
    """Another UNet's tensors in diffusers' names."""
    return {name: x * np.float32(0.5) for name, x in load_file(base / UNET_FILE).items()}


def model(snapshot: object) -> ModelConfig:
    config = snapshot.config  # type: ignore[attr-defined]
    assert isinstance(config, ModelConfig)
    return config


@pytest.mark.parametrize("names", ["diffusers", "a folder", "original", "original without a prefix"])
def test_a_unet_takes_the_place_of_the_base_s(names: str, base: Path, distilled: Arrays, golden_snapshot: Path, tmp_path: Path) -> None:
    path = tmp_path / "sdxl_lightning_4step_unet.safetensors"
    arrays = distilled
    if names.startswith("original"):
        config = model(read_model(base, golden_snapshot / "instantid"))
        assignments = plan(diffusers.DIFFUSERS, build_networks(config)["unet"].disk_shapes(), single_file.unet(config.unet))
        arrays = join(assignments, {a.target: a.layout.forward(distilled[a.published]) for a in assignments})
        cut = len(single_file.UNET) if names != "original" else 0
        arrays = {name[cut:]: np.ascontiguousarray(x) for name, x in arrays.items()}
    if names == "a folder":
        path = tmp_path / "unet"
        path.mkdir()
        shutil.copy(base / "unet/config.json", path / "config.json")
        save_file(arrays, path / "diffusion_pytorch_model.safetensors")
    else:
        save_file(arrays, path)
    snapshot = read_model(base, golden_snapshot / "instantid", unet=path)
    assert any(f"the UNet is {path.name}'s" in note for note in snapshot.notes)
    unet = next(part for part in snapshot.parts if part.name == "unet")
    import_snapshot(dataclasses.replace(snapshot, parts=[unet]), tmp_path / "out")
    stored = load_weights(tmp_path / "out/unet")
    for a in plan(diffusers.DIFFUSERS, {path: x.shape for path, x in stored.items()}):
        assert np.array_equal(a.layout.inverse(stored[a.target]), distilled[a.published]), a
    others = {part.name: part.file.files[0].path for part in snapshot.parts if part.name in ("vae", "text_encoder", "text_encoder_2")}
    assert all(file.is_relative_to(base) for file in others.values())


def test_unets_that_do_not_fit(base: Path, distilled: Arrays, golden_snapshot: Path, tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"

    def read(arrays: Arrays, file: Path = path) -> None:
        if arrays:
            save_file(arrays, file)
        read_model(base, golden_snapshot / "instantid", unet=file)

    with pytest.raises(SourceError, match=r"unet\.safetensors: this is a LoRA, not a UNet; sample\.py takes it as --lora"):
        read({"unet.conv_in.lora_A.weight": np.ones((2, 4), np.float32)})
    with pytest.raises(SourceError, match="this is a whole checkpoint, not a UNet alone; give it as --base"):
        read({"model.diffusion_model.out.2.bias": np.ones(4, np.float32), "first_stage_model.x": np.ones(4, np.float32)})
    with pytest.raises(MappingError, match=r"missing \(1\): conv_in.bias"):
        read({name: x for name, x in distilled.items() if name != "conv_in.bias"})
    with pytest.raises(MappingError, match=r"mis-shaped \(1\): conv_in.bias is \[5\]"):
        read(distilled | {"conv_in.bias": np.ones(5, np.float32)})
    with pytest.raises(SourceError, match="this is an inpainting model, whose UNet takes 9 channels"):
        read(distilled | {"conv_in.weight": np.ones((32, 9, 3, 3), np.float32)})
    with pytest.raises(SourceError, match="absent: there is no such file or folder"):
        read({}, tmp_path / "absent")
    folder = tmp_path / "other"
    folder.mkdir()
    published = json.loads((base / "unet/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(published | {"norm_eps": 1e-3}))
    with pytest.raises(SourceError, match=r"config\.json: this UNet is not built as the base's"):
        read({}, folder)


def test_what_is_said_about_the_training_counts(base: Path, golden_snapshot: Path) -> None:
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    snapshot = read_model(base, golden_snapshot / "instantid", scheduler=said)
    scheduler = model(snapshot).scheduler
    assert scheduler == dataclasses.replace(model(read_model(base, golden_snapshot / "instantid")).scheduler, **said)
    assert any("the scheduler is set as asked: prediction_type v_prediction, rescale_betas_zero_snr True" in note for note in snapshot.notes)
    first = make_sampler("euler", scheduler, **PRESETS["lightning-4"]["sampler_options"]).plan(4).rows
    assert first["timestep"][0] == 999 and first["level"][0] == pytest.approx(4096, rel=1e-4)
    with pytest.raises(ConversionError, match="--zero-snr goes with --prediction v_prediction"):
        read_model(base, golden_snapshot / "instantid", scheduler={"rescale_betas_zero_snr": True})


def test_the_options_reach_the_reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    called: dict[str, object] = {}

    def read(*positional: object, **named: object) -> None:
        called.update(named)
        raise ConversionError("enough")

    monkeypatch.setattr("convert_weights.__main__.read_model", read)
    arguments = "import --base b --instantid i --out o --unet u --prediction v_prediction --zero-snr"
    assert main(arguments.split()) == 1 and "enough" in capsys.readouterr().err
    assert called == {"unet": Path("u"), "scheduler": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}}
    assert main(["import", "--controlnet", "c", "--unet", "u", "--out", "o"]) == 2 and "give either --controlnet" in capsys.readouterr().err
