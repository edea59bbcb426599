"""Weights of something else, or of nothing: the error says what they are."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert_weights.importing import import_snapshot
from convert_weights.readers import read_model
from convert_weights.recognise import numbers_wrong, refuse_foreign_adapter
from convert_weights.safetensors_file import open_safetensors
from convert_weights.source import FLOATS, SourceError


def zeros(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name.replace("__", "."): np.zeros(shape, np.float16) for name, shape in shapes.items()}


ADAPTERS = {
    "Stable Diffusion 1.5": zeros(image_proj__latents=(1, 16, 8), ip_adapter__1__to_k_ip__weight=(320, 768)),
    "plain IP-Adapter": zeros(image_proj__proj__weight=(8, 4), image_proj__norm__weight=(4,), ip_adapter__1__to_k_ip__weight=(640, 2048)),
    "IP-Adapter-plus": zeros(image_proj__latents=(1, 16, 8), image_proj__proj_in__weight=(8, 1280), ip_adapter__1__to_k_ip__weight=(640, 2048)),
    "IP-Adapter-FaceID": zeros(image_proj__proj__0__weight=(8, 4), ip_adapter__1__to_k_ip__weight=(640, 2048)),
    "PuLID": zeros(pulid_encoder__latents=(1, 32, 8), pulid_ca__0__to_q__weight=(8, 8)),
    "a PuLID file": zeros(id_adapter__latents=(1, 32, 8), id_adapter_attn_layers__1__id_to_k__weight=(8, 8)),
    "LoRA": zeros(unet__down_blocks__0__to_q__lora_A__weight=(4, 8)),
    "it has no image_proj": zeros(ip_adapter__1__to_k_ip__weight=(640, 2048)),
    "it has no ip_adapter": zeros(image_proj__latents=(1, 16, 8)),
    "it has no image_proj and ip_adapter": zeros(something=(1,)),
    "4 identity tokens where InstantID has 16": zeros(image_proj__latents=(1, 4, 8), ip_adapter__1__to_k_ip__weight=(640, 2048)),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_named(kind: str, tmp_path: Path) -> None:
    save_file(ADAPTERS[kind], tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=kind):
        refuse_foreign_adapter(open_safetensors(tmp_path / "x.safetensors"), 2048, 16)


SINGLE = {
    "Stable Diffusion 1 checkpoint": zeros(cond_stage_model__transformer__text_model__x=(1,)),
    "Stable Diffusion 2 checkpoint": zeros(cond_stage_model__model__x=(1,)),
    "the SDXL refiner": zeros(conditioner__embedders__0__model__transformer__x=(1,)),
    "Stable Diffusion 3": zeros(model__diffusion_model__joint_blocks__0__x=(1,)),
    "Flux": zeros(model__diffusion_model__double_blocks__0__x=(1,)),
    "ControlNet": zeros(control_model__x=(1,)),
    "LoRA": zeros(lora_unet_x=(1,)),
    "an inpainting model, whose UNet takes 9 channels": zeros(model__diffusion_model__input_blocks__0__0__weight=(320, 9, 3, 3)),
    "no checkpoint with the names of the original SDXL release": zeros(x=(1,)),
}


@pytest.mark.parametrize("kind", SINGLE)
def test_single_files_are_named(kind: str, golden_snapshot: Path, tmp_path: Path) -> None:
    save_file(SINGLE[kind], tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=kind):
        read_model(tmp_path / "x.safetensors", golden_snapshot / "instantid", fallback=golden_snapshot / "base")


def with_adapter(golden_snapshot: Path, folder: Path, **changes: np.ndarray | None) -> Path:
    """The golden InstantID folder with some tensors of the adapter changed or removed."""
    (folder / "ControlNetModel").symlink_to(golden_snapshot / "instantid/ControlNetModel")
    tensors = load_file(golden_snapshot / "instantid/ip-adapter.safetensors")
    for name, value in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if value is not None:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, folder / "ip-adapter.safetensors")
    return folder


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("ip_adapter__1__to_k_ip__weight", np.zeros((64, 80), np.float32), r"1.to_k_ip.weight is all zeros \(an adapter that was never trained\)"),
        ("ip_adapter__3__to_v_ip__weight", np.full((64, 80), np.nan, np.float32), "3.to_v_ip.weight has NaN or infinity"),
    ],
)
def test_values_that_no_training_gives(tensor: str, value: np.ndarray, message: str, golden_snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "instantid").mkdir()
    snapshot = read_model(golden_snapshot / "base", with_adapter(golden_snapshot, tmp_path / "instantid", **{tensor: value}))
    alone = dataclasses.replace(snapshot, parts=[part for part in snapshot.parts if part.name == "adapter"])
    with pytest.raises(SourceError, match=message):
        import_snapshot(alone, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["instantid"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ip_adapter__1__to_k_ip__weight": np.zeros((64, 81), np.float32)}, r"to_k_ip.weight is \[64, 81\] where \[64, 80\] is needed"),
        ({"ip_adapter__23__to_k_ip__weight": None}, r"missing \(1\): 23.to_k_ip.weight"),
        ({"ip_adapter__24__to_k_ip__weight": np.zeros((64, 80), np.float32)}, r"unused \(1\): 24.to_k_ip.weight"),
        ({"extra": np.zeros(1, np.float32)}, r"unused \(1\): extra; an adapter has image_proj and ip_adapter alone"),
        (
            {"image_proj__latents": np.zeros((1, 15, 1280), np.float32)},
            "15 identity tokens where InstantID has 16; if that is meant, give --tokens 15",
        ),
        ({"image_proj__proj_in__weight": None}, "the resampler's 'proj_in.weight' is missing or mis-shaped"),
        ({"image_proj__layers__0__0__to_q__weight": np.zeros((1290, 1280), np.float32)}, "1290 wide, which is not a number of heads of 64"),
    ],
)
def test_adapters_that_do_not_fit(changes: dict[str, np.ndarray | None], message: str, golden_snapshot: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_model(golden_snapshot / "base", with_adapter(golden_snapshot, tmp_path, **changes))


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_nan_and_infinity_are_found_in_every_type(dtype: np.dtype) -> None:
    x = np.array([0, -0.0, 1, -3, 6e4, 1e-7] * 60_000).astype(dtype)
    assert numbers_wrong(x) is None
    for bad in (np.nan, np.inf, -np.inf):
        x[-2] = bad
        assert numbers_wrong(x) == "NaN or infinity"
    assert numbers_wrong(np.zeros((0,), dtype)) is None


def test_integers_are_not_weights(golden_snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "instantid").mkdir()
    whole = np.ones((64, 80), np.int32)
    snapshot = read_model(golden_snapshot / "base", with_adapter(golden_snapshot, tmp_path / "instantid", ip_adapter__1__to_k_ip__weight=whole))
    alone = dataclasses.replace(snapshot, parts=[part for part in snapshot.parts if part.name == "adapter"])
    with pytest.raises(SourceError, match="has type int32; only float16, float32, float64, bfloat16 are converted"):
        import_snapshot(alone, tmp_path / "out")


def test_values_that_the_new_type_cannot_hold(golden_snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "instantid").mkdir()
    large = np.full((64, 80), 3.4e38, np.float32)
    snapshot = read_model(golden_snapshot / "base", with_adapter(golden_snapshot, tmp_path / "instantid", ip_adapter__1__to_k_ip__weight=large))
    alone = dataclasses.replace(snapshot, parts=[part for part in snapshot.parts if part.name == "adapter"])
    with pytest.raises(SourceError, match="has values too large for bfloat16"):
        import_snapshot(alone, tmp_path / "out", "bfloat16")
