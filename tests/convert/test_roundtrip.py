"""Import, then export: byte-identical tensor by tensor, through every published layout."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from convert_weights.__main__ import main
from convert_weights.exporting import export_weights
from convert_weights.importing import import_snapshot
from convert_weights.manifest import read_manifest
from convert_weights.readers import read_controlnet, read_model
from convert_weights.source import ConversionError
from convert_weights.torch_pickle import open_torch
from instantid_jax.checkpoint import load_weights
from instantid_jax.config import ModelConfig, from_json
from instantid_jax.models import build_networks

SAFETENSORS = {
    "base/unet/diffusion_pytorch_model.safetensors": 428,
    "base/vae/diffusion_pytorch_model.safetensors": 244,
    "base/text_encoder/model.safetensors": 52,
    "base/text_encoder_2/model.safetensors": 53,
    "ControlNetModel/diffusion_pytorch_model.safetensors": 242,
    "ip-adapter.safetensors": 75,
}


def original(golden_snapshot: Path, name: str) -> Path:
    return golden_snapshot / name if name.startswith("base/") else golden_snapshot / "instantid" / name


@pytest.mark.parametrize("name", SAFETENSORS)
def test_tensors_come_back_byte_for_byte(name: str, golden_snapshot: Path, exported: Path) -> None:
    before, after = load_file(original(golden_snapshot, name)), load_file(exported / name)
    assert before.keys() == after.keys()
    assert len(before) == SAFETENSORS[name]
    for key, x in before.items():
        assert (x.dtype, x.shape, x.tobytes()) == (after[key].dtype, after[key].shape, after[key].tobytes()), key


def test_torch_reads_the_exported_adapter_safely(golden_snapshot: Path, exported: Path) -> None:
    before = torch.load(golden_snapshot / "instantid/ip-adapter.bin", weights_only=True)
    after = torch.load(exported / "ip-adapter.bin", weights_only=True, mmap=True)
    assert list(after) == ["image_proj", "ip_adapter"]
    for half in after:
        assert before[half].keys() == after[half].keys()
        assert all(torch.equal(before[half][name], x) for name, x in after[half].items())
    assert list(after["ip_adapter"])[:3] == ["1.to_k_ip.weight", "1.to_v_ip.weight", "3.to_k_ip.weight"]


def test_both_forms_of_the_adapter_hold_the_same(golden_snapshot: Path) -> None:
    tensors = open_torch(golden_snapshot / "instantid/ip-adapter.bin").tensors
    flat = load_file(golden_snapshot / "instantid/ip-adapter.safetensors")
    assert tensors.keys() == flat.keys()
    for name, tensor in tensors.items():
        x = tensor.array()
        assert not x.flags.owndata and not x.flags.writeable
        assert x.tobytes() == flat[name].tobytes()


def test_configurations_and_tokenizers_are_kept_word_for_word(golden_snapshot: Path, exported: Path) -> None:
    names = ["model_index.json", "scheduler/scheduler_config.json", *(f"{n}/config.json" for n in ("unet", "vae", "text_encoder", "text_encoder_2"))]
    names += [f"{t}/{f}" for t in ("tokenizer", "tokenizer_2") for f in ("vocab.json", "merges.txt", "tokenizer_config.json")]
    for name in names:
        assert (exported / "base" / name).read_bytes() == (golden_snapshot / "base" / name).read_bytes(), name
    control = "ControlNetModel/config.json"
    assert (exported / control).read_bytes() == (golden_snapshot / "instantid" / control).read_bytes()


def test_the_networks_accept_what_was_written(converted: Path) -> None:
    config = from_json(ModelConfig, (converted / "config.json").read_text())
    for name, network in build_networks(config).items():
        shapes = {path: x.shape for path, x in load_weights(converted / name).items()}
        assert shapes == network.disk_shapes(), name


def test_sizes_of_the_resampler_are_read_from_its_tensors(converted: Path) -> None:
    resampler = from_json(ModelConfig, (converted / "config.json").read_text()).resampler
    assert dataclasses.astuple(resampler) == (1280, 4, 64, 20, 16, 512, 80, 4, "perceiver", False)


def test_the_manifest_says_where_everything_is_from(converted: Path, golden_snapshot: Path) -> None:
    manifest = read_manifest(converted)
    assert manifest.kind == "model"
    assert manifest.created_by.startswith("instantid_jax ")
    record = manifest.networks["adapter"].tensors["mid_block/attentions/0/transformer_blocks/0/attn2/to_k_ip/kernel"]
    assert record.exact and record.sha256 == record.source_sha256
    assert (record.source, record.published) == ("ip_adapter.21.to_k_ip.weight", "21.to_k_ip.weight")
    content = json.loads((converted / "manifest.json").read_text())
    assert (content["format_version"], content["table_version"]) == (1, 1)
    assert str(golden_snapshot) not in (converted / "manifest.json").read_text()


def test_an_ordinary_controlnet_comes_back(converted_controlnet: Path, golden_snapshot: Path, tmp_path: Path) -> None:
    assert main(["export", "--weights", str(converted_controlnet), "--out", str(tmp_path / "out")]) == 0
    name = "diffusion_pytorch_model.safetensors"
    before, after = load_file(golden_snapshot / "controlnet_2" / name), load_file(tmp_path / "out" / name)
    assert before.keys() == after.keys()
    assert all(x.tobytes() == after[key].tobytes() for key, x in before.items())
    assert (tmp_path / "out/config.json").read_bytes() == (golden_snapshot / "controlnet_2/config.json").read_bytes()


def test_the_same_import_gives_the_same_manifest(golden_snapshot: Path, converted_controlnet: Path, tmp_path: Path) -> None:
    import_snapshot(read_controlnet(golden_snapshot / "controlnet_2"), tmp_path / "again")
    assert (tmp_path / "again/manifest.json").read_bytes() == (converted_controlnet / "manifest.json").read_bytes()


def test_a_cast_import_rounds_once_and_is_exported_only_when_asked(golden_snapshot: Path, tmp_path: Path) -> None:
    manifest = import_snapshot(read_controlnet(golden_snapshot / "controlnet_2"), tmp_path / "half", "bfloat16")
    record = next(iter(manifest.networks["controlnet"].tensors.values()))
    assert (record.dtype, record.source_dtype, record.exact) == ("bfloat16", "float32", False)
    flat = load_weights(tmp_path / "half/controlnet")
    before = load_file(golden_snapshot / "controlnet_2/diffusion_pytorch_model.safetensors")
    expected = before["conv_in.weight"].transpose(2, 3, 1, 0).astype(ml_dtypes.bfloat16)
    assert flat["conv_in/kernel"].dtype == expected.dtype
    assert flat["conv_in/kernel"].tobytes() == expected.tobytes()
    with pytest.raises(ConversionError, match="give --dtype bfloat16"):
        export_weights(tmp_path / "half", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lines = export_weights(tmp_path / "half", tmp_path / "out", dtype="bfloat16")
    assert "their type was changed" in lines[-1]
    from safetensors.torch import load_file as load_torch

    tensor = load_torch(tmp_path / "out/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert torch.equal(tensor, torch.from_numpy(before["conv_in.weight"]).to(torch.bfloat16))


def test_heads_other_than_64_survive_through_the_file_s_metadata(converted: Path, golden_snapshot: Path, tmp_path: Path) -> None:
    from convert_weights.safetensors_file import open_safetensors, write_safetensors

    (tmp_path / "ControlNetModel").symlink_to(golden_snapshot / "instantid/ControlNetModel")
    file = open_safetensors(golden_snapshot / "instantid/ip-adapter.safetensors")
    entries = {name: (t.dtype, t.shape) for name, t in file.tensors.items()}
    resampler = from_json(ModelConfig, (converted / "config.json").read_text()).resampler
    said = json.dumps(dataclasses.asdict(dataclasses.replace(resampler, dim_head=32, heads=40)))
    write_safetensors(tmp_path / "ip-adapter.safetensors", entries, lambda n: file.tensors[n].array(), {"instantid_jax.resampler": said})
    config = read_model(golden_snapshot / "base", tmp_path).config
    assert isinstance(config, ModelConfig)
    assert (config.resampler.dim_head, config.resampler.heads) == (32, 40)


def test_half_precision_files_stay_half(golden_snapshot: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    source = tmp_path / "controlnet"
    source.mkdir()
    (source / "config.json").write_bytes((golden_snapshot / "controlnet_2/config.json").read_bytes())
    before = load_file(golden_snapshot / "controlnet_2/diffusion_pytorch_model.safetensors")
    before = {name: x.astype(np.float16) for name, x in before.items()}
    save_file(before, source / "diffusion_pytorch_model.fp16.safetensors")
    import_snapshot(read_controlnet(source), tmp_path / "weights")
    export_weights(tmp_path / "weights", tmp_path / "out")
    after = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    assert all(after[name].dtype == np.float16 and after[name].tobytes() == x.tobytes() for name, x in before.items())
