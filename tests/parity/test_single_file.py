"""Single-file SDXL checkpoints: converted tensors are those of the original folder, and diffusers' own loader agrees."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from convert_weights import readers
from convert_weights.importing import import_snapshot
from convert_weights.inspection import verify_folder
from convert_weights.readers import read_model
from convert_weights.rules import join, plan
from convert_weights.source import SourceError
from convert_weights.tables import diffusers, single_file
from instantid_jax.checkpoint import load_weights
from instantid_jax.config import ModelConfig
from instantid_jax.models import build_networks
from instantid_jax.text import Tokenizer

Arrays = dict[str, np.ndarray]
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}
EXTRA: Arrays = {
    "model_ema.decay": np.ones((), np.float32),
    "model_ema.diffusion_modelinput_blocks00weight": np.ones(4, np.float32),
    "denoiser.sigmas": np.ones(1000, np.float32),
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": np.arange(77)[None],
    "conditioner.embedders.1.model.logit_scale": np.ones((), np.float32),
    "conditioner.embedders.1.model.attn_mask": np.ones((77, 77), np.float32),
}


@pytest.fixture(scope="module")
def config(golden_snapshot: Path) -> ModelConfig:
    found = read_model(golden_snapshot / "base", golden_snapshot / "instantid").config
    assert isinstance(found, ModelConfig)
    return found


@pytest.fixture(scope="module")
def originals(golden_snapshot: Path) -> dict[str, Arrays]:
    return {name: load_file(golden_snapshot / "base" / path) for name, path in FILES.items()}


@pytest.fixture(scope="module")
def parts(config: ModelConfig, originals: dict[str, Arrays]) -> dict[str, Arrays]:
    """The golden base under the original release's names: our tables, backwards."""
    tables = {
        "unet": (diffusers.DIFFUSERS, single_file.unet(config.unet)),
        "vae": (diffusers.DIFFUSERS, single_file.vae(config.vae)),
        "text_encoder": (diffusers.CLIP, single_file.TEXT_ENCODER),
        "text_encoder_2": (diffusers.CLIP, single_file.TEXT_ENCODER_2),
    }
    out = {}
    for name, (table, renames) in tables.items():
        assignments = plan(table, build_networks(config)[name].disk_shapes(), renames)
        arrays = {a.target: a.layout.forward(originals[name][a.published]) for a in assignments}
        out[name] = {key: np.ascontiguousarray(x) for key, x in join(assignments, arrays).items()}
    return out


@pytest.fixture(scope="module")
def checkpoint(parts: dict[str, Arrays], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "sd_xl.safetensors"
    save_file(EXTRA | {key: x for part in parts.values() for key, x in part.items()}, path)
    return path


def equal(theirs: dict[str, torch.Tensor], originals: Arrays) -> None:
    assert theirs.keys() == originals.keys()
    for key, x in theirs.items():
        assert np.array_equal(x.detach().numpy(), originals[key]), key


def test_diffusers_reads_our_names_of_the_unet(checkpoint: Path, golden_snapshot: Path, originals: dict[str, Arrays]) -> None:
    network = UNet2DConditionModel.from_single_file(str(checkpoint), config=str(golden_snapshot / "base"), subfolder="unet", local_files_only=True)
    equal(network.state_dict(), originals["unet"])


def test_diffusers_reads_our_names_of_the_vae(checkpoint: Path, golden_snapshot: Path, originals: dict[str, Arrays]) -> None:
    network = AutoencoderKL.from_single_file(str(checkpoint), config=str(golden_snapshot / "base"), subfolder="vae", local_files_only=True)
    equal(network.state_dict(), originals["vae"])


def test_diffusers_reads_our_names_of_the_text_towers(parts: dict[str, Arrays], golden_snapshot: Path, originals: dict[str, Arrays]) -> None:
    whole = {key: torch.from_numpy(x) for part in parts.values() for key, x in part.items()}
    first = convert_ldm_clip_checkpoint(dict(whole))
    equal({diffusers.CLIP.spelling(key): x for key, x in first.items()}, originals["text_encoder"])
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(golden_snapshot / "base/text_encoder_2"))
    second = convert_open_clip_checkpoint(model, dict(whole), prefix=single_file.TEXT_2)
    equal({diffusers.CLIP.spelling(key): x for key, x in second.items() if "position_ids" not in key}, originals["text_encoder_2"])


def test_import_gives_the_folder_s_tensors(checkpoint: Path, golden_snapshot: Path, originals: dict[str, Arrays], tmp_path: Path) -> None:
    snapshot = read_model(checkpoint, golden_snapshot / "instantid", fallback=golden_snapshot / "base")
    base = [part for part in snapshot.parts if part.name in FILES]
    assert {part.name: part.file.files[0].path for part in base} == dict.fromkeys(FILES, checkpoint)
    assert any(note.startswith("3 tensors beside the networks are left out") for note in snapshot.notes)
    for part in base:
        for a in part.assignments:
            tensor = part.file.tensors[part.account.names[a.source]].array()
            ours = a.layout.inverse(a.forward(tensor))
            assert np.array_equal(ours, originals[part.name][a.published]), a
    import dataclasses

    towers = dataclasses.replace(snapshot, parts=[part for part in base if part.name == "text_encoder_2"])
    manifest = import_snapshot(towers, tmp_path / "out")
    record = manifest.networks["text_encoder_2"]
    assert len(record.ignored) == 2
    kernel = record.tensors["encoder/layers/0/self_attn/k_proj/kernel"]
    assert kernel.source.endswith("resblocks.0.attn.in_proj_weight") and kernel.exact
    assert kernel.sha256 != kernel.source_sha256
    found = load_weights(tmp_path / "out/text_encoder_2")["encoder/layers/0/self_attn/k_proj/kernel"]
    assert np.array_equal(found.T, originals["text_encoder_2"]["text_model.encoder.layers.0.self_attn.k_proj.weight"])


def test_without_a_fallback_the_tokenizers_are_the_packaged_ones(
    checkpoint: Path, golden_snapshot: Path, config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {name: getattr(config, name) for name in (*FILES, "scheduler")}
    monkeypatch.setattr(readers, "_default_configs", lambda: dict(small))
    manifest = import_snapshot(read_model(checkpoint, golden_snapshot / "instantid"), tmp_path / "out")
    assert any("sd_xl.safetensors has no tokenizers" in note for note in manifest.notes)
    assert sum(name.startswith("tokenizer") for name in manifest.files) == 8
    verify_folder(tmp_path / "out")
    first, second = (Tokenizer.from_directory(tmp_path / "out" / name) for name in ("tokenizer", "tokenizer_2"))
    assert first.encode(["a cat"])[0, :5].tolist() == [49406, 320, 2368, 49407, 49407]
    assert second.encode(["a cat"])[0, :5].tolist() == [49406, 320, 2368, 49407, 0]


@pytest.mark.parametrize("missing", ["vae", "text_encoder", "text_encoder_2"])
def test_what_a_file_lacks_comes_from_the_fallback(missing: str, parts: dict[str, Arrays], golden_snapshot: Path, tmp_path: Path) -> None:
    path = tmp_path / "part.safetensors"
    save_file({key: x for name, part in parts.items() if name != missing for key, x in part.items()}, path)
    with pytest.raises(SourceError, match="--base-fallback DIR"):
        read_model(path, golden_snapshot / "instantid")
    snapshot = read_model(path, golden_snapshot / "instantid", fallback=golden_snapshot / "base")
    origin = {part.name: part.file.files[0].path.parent.name for part in snapshot.parts}
    assert origin[missing] == missing and origin["unet"] == tmp_path.name
    assert f"the file has no {missing}; it is taken from base" in snapshot.notes
    without = tmp_path / "base"
    shutil.copytree(golden_snapshot / "base", without)
    shutil.rmtree(without / missing)
    with pytest.raises(SourceError, match=f"{missing}"):
        read_model(path, golden_snapshot / "instantid", fallback=without)


def test_quirks_of_files_in_the_wild(parts: dict[str, Arrays], golden_snapshot: Path, tmp_path: Path) -> None:
    """The short VAE prefix, linear VAE attention, marks of v-prediction; and what is too odd is listed."""
    odd = {key.replace(single_file.VAE, "vae."): x for part in parts.values() for key, x in part.items()}
    odd = {key: x[..., 0, 0] if "attn_1" in key and x.ndim == 4 else x for key, x in odd.items()}
    odd |= {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)}
    save_file(odd, tmp_path / "x.safetensors")
    snapshot = read_model(tmp_path / "x.safetensors", golden_snapshot / "instantid", fallback=golden_snapshot / "base")
    assert isinstance(snapshot.config, ModelConfig)
    assert snapshot.config.scheduler.prediction_type == "v_prediction" and snapshot.config.scheduler.rescale_betas_zero_snr
    save_file(odd | {"strange": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=r"unused \(1\): strange"):
        read_model(tmp_path / "x.safetensors", golden_snapshot / "instantid", fallback=golden_snapshot / "base")
