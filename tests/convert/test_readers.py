"""Finding the files: variants, shards, older formats, and what is said where something is missing."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from convert_weights.readers import open_component, open_tensors, read_controlnet, read_model
from convert_weights.safetensors_file import open_safetensors, write_safetensors
from convert_weights.source import SourceError
from convert_weights.torch_pickle import open_torch
from convert_weights.torch_writer import write_torch

PARTS = [{"a.weight": np.ones((2, 3), np.float32)}, {"b.weight": np.zeros(4, np.float32)}]
WHOLE = PARTS[0] | PARTS[1]


def shards(folder: Path, variant: str = "") -> None:
    tag = f".{variant}" if variant else ""
    names = [f"diffusion_pytorch_model{tag}-{i + 1:05}-of-00002.safetensors" for i in range(2)]
    for name, part in zip(names, PARTS, strict=True):
        save_file(part, folder / name)
    index = {"metadata": {"total_size": 40}, "weight_map": {tensor: name for name, part in zip(names, PARTS, strict=True) for tensor in part}}
    (folder / f"diffusion_pytorch_model.safetensors.index{tag}.json").write_text(json.dumps(index))


def same(file: object, expected: dict[str, np.ndarray] = WHOLE) -> bool:
    tensors = file.tensors  # type: ignore[attr-defined]
    return tensors.keys() == expected.keys() and all(np.array_equal(tensors[name].array(), x) for name, x in expected.items())


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "model.safetensors", "model.fp16.safetensors"])
def test_one_file(name: str, tmp_path: Path) -> None:
    save_file(WHOLE, tmp_path / name)
    assert same(open_component(tmp_path))


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards(variant: str, tmp_path: Path) -> None:
    shards(tmp_path, variant)
    file = open_component(tmp_path, variant or None)
    assert same(file) and len(file.files) == 2


def test_plain_weights_come_before_variants_and_safetensors_before_torch_files(tmp_path: Path) -> None:
    torch.save({"old": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.bin")
    assert list(open_component(tmp_path).tensors) == ["old"]
    save_file(PARTS[0], tmp_path / "diffusion_pytorch_model.safetensors")
    shards(tmp_path, "fp16")
    assert same(open_component(tmp_path), PARTS[0])
    assert same(open_component(tmp_path, "fp16"))


def test_several_variants_are_not_guessed(tmp_path: Path) -> None:
    for variant in ("fp16", "non_ema"):
        save_file(WHOLE, tmp_path / f"diffusion_pytorch_model.{variant}.safetensors")
    with pytest.raises(SourceError, match="no plain weights; variants that are there: fp16, non_ema"):
        open_component(tmp_path)
    with pytest.raises(SourceError, match="no weights of the variant 'bf16'"):
        open_component(tmp_path, "bf16")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model_index.json", None, "model_index.json is missing; is the download complete"),
        ("model_index.json", '{"_class_name": "StableDiffusionPipeline"}', "describes a StableDiffusionPipeline, not Stable Diffusion XL"),
        ("unet/config.json", "{", "is not JSON"),
        ("unet/config.json", '{"in_channels": 9}', "an inpainting model, whose UNet takes 9 channels"),
        ("unet/config.json", '{"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560}', "the SDXL refiner"),
        ("vae/diffusion_pytorch_model.safetensors", None, "vae has no plain weights; variants that are there: none"),
    ],
)
def test_incomplete_or_foreign_folders(name: str, content: str | None, message: str, golden_snapshot: Path, tmp_path: Path) -> None:
    base = copy_of(golden_snapshot / "base", tmp_path / "base")
    (base / name).unlink()
    if content is not None:
        (base / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        read_model(base, golden_snapshot / "instantid")


def copy_of(source: Path, target: Path) -> Path:
    """The same folders with links to the same files."""
    for path in source.rglob("*"):
        if path.is_file():
            there = target / path.relative_to(source)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.symlink_to(path)
    return target


def test_an_instantid_folder_without_adapter(golden_snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "ControlNetModel").symlink_to(golden_snapshot / "instantid/ControlNetModel")
    with pytest.raises(SourceError, match=r"no ip-adapter.safetensors: the adapter file is looked for as ip-adapter.safetensors, ip-adapter.bin"):
        read_model(golden_snapshot / "base", tmp_path)


def test_the_torch_form_of_the_adapter_is_read_too(golden_snapshot: Path, tmp_path: Path) -> None:
    for name in ("ControlNetModel", "ip-adapter.bin"):
        (tmp_path / name).symlink_to(golden_snapshot / "instantid" / name)
    snapshot = read_model(golden_snapshot / "base", tmp_path)
    assert {part.name: len(part.assignments) for part in snapshot.parts} == {
        "unet": 428,
        "identitynet": 242,
        "adapter": 24,
        "resampler": 51,
        "vae": 244,
        "text_encoder": 52,
        "text_encoder_2": 53,
    }


def test_trainers_layout_is_understood(golden_snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "controlnet").symlink_to(golden_snapshot / "instantid/ControlNetModel")
    (tmp_path / "pytorch_model.bin").symlink_to(golden_snapshot / "instantid/ip-adapter.bin")
    assert len(read_model(golden_snapshot / "base", tmp_path).parts) == 7


def test_all_wrong_networks_are_in_one_error(golden_snapshot: Path, tmp_path: Path) -> None:
    base = copy_of(golden_snapshot / "base", tmp_path / "base")
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        path = base / f"{name}.safetensors"
        path.unlink()
        save_file({"conv_in.weight": np.zeros((32, 4, 3, 3), np.float32)}, path)
    with pytest.raises(ValueError, match=r"(?s)unet .*missing \(427\).* and 387 more.*vae .*missing \(244\).*unused \(1\): conv_in.weight"):
        read_model(base, golden_snapshot / "instantid")


def test_a_controlnet_of_the_original_release_is_named(golden_snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(golden_snapshot / "controlnet_2/config.json")
    save_file({"control_model.input_blocks.0.0.weight": np.zeros((4, 4, 3, 3), np.float32)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"unused \(1\): control_model"):
        read_controlnet(tmp_path)


def test_torch_files_of_many_kinds(tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()  # with _metadata, and an integer
    base = torch.arange(12, dtype=torch.float32)
    tensors = {
        "state": state,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "transposed": base[:6].view(2, 3).T,
        "slice": base[6:].view(2, 3)[:, 1:],
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "bf16": torch.randn(2, 2).bfloat16(),
        "half": torch.randn(5).half(),
        "double": torch.randn(5).double(),
        "step": 7,
        "name": "x",
        "none": None,
        "lr": 0.1,
    }
    torch.save(tensors, tmp_path / "x.bin")
    found = open_torch(tmp_path / "x.bin").tensors
    flat = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)} | {f"state.{k}": v for k, v in state.items()}
    assert found.keys() == flat.keys()
    for name, x in flat.items():
        got = found[name].array()
        assert got.shape == tuple(x.shape), name
        if x.dtype == torch.bfloat16:
            assert got.dtype == ml_dtypes.bfloat16
            got, x = got.astype(np.float32), x.float()
        assert np.array_equal(got, x.detach().numpy()), name
    assert found["transposed"].strides == (1, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_both_writers_are_read_by_the_reference_libraries(dtype: type, tmp_path: Path) -> None:
    from safetensors.torch import load_file as load_torch

    rng = np.random.default_rng(0)
    arrays = {
        "m": rng.standard_normal((3, 4)).astype(dtype),
        "v": rng.standard_normal(5).astype(dtype),
        "s": np.ones((), dtype),
        "e": np.zeros((0, 2), dtype),
    }
    entries = {name: (x.dtype, x.shape) for name, x in arrays.items()}
    write_safetensors(tmp_path / "x.safetensors", entries, arrays.__getitem__, {"format": "pt"})
    write_torch(tmp_path / "x.bin", {"part": entries}, lambda _, name: arrays[name])
    for read in (load_torch(tmp_path / "x.safetensors"), torch.load(tmp_path / "x.bin", weights_only=True)["part"]):
        for name, x in arrays.items():
            assert tuple(read[name].shape) == x.shape
            assert read[name].contiguous().flatten().view(torch.uint8).numpy().tobytes() == x.tobytes()
    assert open_safetensors(tmp_path / "x.safetensors").metadata == {"format": "pt"}
    assert same(open_tensors(tmp_path / "x.bin").under("part."), arrays)
    assert all(t.start % 64 == 0 for t in open_tensors(tmp_path / "x.bin").tensors.values())


def test_our_safetensors_are_the_reference_library_s_byte_for_byte(tmp_path: Path) -> None:
    arrays = {"b": np.ones(3, np.float32), "a": np.ones(2, np.float32), "c": np.ones(5, np.float16), "d": np.ones(2, np.float64)}
    save_file(arrays, tmp_path / "theirs", metadata={"format": "pt"})
    write_safetensors(tmp_path / "ours", {n: (x.dtype, x.shape) for n, x in arrays.items()}, arrays.__getitem__, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_writer_notices_a_tensor_that_is_not_what_was_announced(tmp_path: Path) -> None:
    entries = {"a": (np.dtype(np.float32), (2,))}
    writers: list[Callable[[], None]] = [
        lambda: write_safetensors(tmp_path / "x", entries, lambda _: np.zeros(3, np.float32)),
        lambda: write_torch(tmp_path / "y", {"p": entries}, lambda *_: np.zeros(2, np.float16)),
    ]
    for write in writers:
        with pytest.raises(ValueError, match="was announced"):
            write()


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "model"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 5135149760\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html>404</html>", "a web page"),
        (b"\xef\xbb\xbf\n<html>{}</html>", "a web page"),
        (b"\x80\x02}q\x00" + b"X" * 300, "a bare pickle"),
        (b"model.pt" + b"0" * 249 + b"ustar" + b"0" * 300, "a tar file"),
    ],
)
def test_what_is_no_weights_file_is_named_whatever_its_suffix(content: bytes, kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceError, match=kind) as caught:
        open_tensors(path)
    assert str(caught.value).startswith(f"{path}: this is ")


def test_a_header_whose_length_reads_like_a_page_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = b"{}".ljust(ord("<"))
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert not open_tensors(path).tensors
