"""LoRA files as they come: types, shapes and metadata that are read, and what is refused with its name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from lora_files import ALL, lora_arrays
from safetensors.numpy import save_file

from convert_weights.lora import read_lora, read_loras
from convert_weights.source import ConversionError, SourceError
from instantid_jax.config import tiny
from instantid_jax.lora import Lora, merge_lora

CONFIG = tiny()
QUERY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
QUERY_PATH = "down_blocks/1/attentions/0/transformer_blocks/0/attn1/to_q/kernel"
CONTEXT = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
CONV, CONV_PATH = "lora_unet_mid_block_resnets_1_conv2", "mid_block/resnets/1/conv2/kernel"
Arrays = dict[str, np.ndarray]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng([9, *shape]).standard_normal(shape).astype(np.float32)


def query(**changes: Any) -> Arrays:
    """One layer's LoRA; a part set to None is left out."""
    parts = {"lora_down.weight": normal(2, 64), "lora_up.weight": normal(64, 2), "alpha": np.float32(1)} | {
        name.replace("__", "."): x for name, x in changes.items()
    }
    return {f"{QUERY}.{name}": np.asarray(x) for name, x in parts.items() if x is not None}


def read(folder: Path, arrays: Arrays, metadata: dict[str, str] | None = None, **options: Any) -> Lora:
    path = folder / "some.safetensors"
    save_file({name: np.asarray(x) for name, x in arrays.items()}, path, metadata)
    return read_lora(path, CONFIG, **options)


def difference(lora: Lora, path: str, shape: tuple[int, ...]) -> np.ndarray:
    zero = np.zeros(shape, np.float32)
    return merge_lora({path: zero}, "unet", [lora])[path]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_types(dtype: Any, tmp_path: Path) -> None:
    arrays = {name: x.astype(dtype) for name, x in query().items()}
    lora = read(tmp_path, arrays)
    assert lora.name == "some.safetensors" and len(lora.digest) == 64 and lora.left_out == ()
    up, down = (arrays[f"{QUERY}.lora_{part}.weight"].astype(np.float32) for part in ("up", "down"))
    np.testing.assert_allclose(difference(lora, QUERY_PATH, (64, 64)), 0.5 * (up @ down).T, atol=1e-6)


def test_alpha_as_an_integer_in_a_list_or_absent(tmp_path: Path) -> None:
    product = (query()[f"{QUERY}.lora_up.weight"] @ query()[f"{QUERY}.lora_down.weight"]).T
    for alpha, scale in ((np.int64(3), 1.5), (np.float32([3]), 1.5), (np.float32(-1), -0.5), (None, 1.0)):
        np.testing.assert_allclose(difference(read(tmp_path, query(alpha=alpha)), QUERY_PATH, (64, 64)), scale * product, atol=1e-5)


def test_linear_layers_written_as_convolutions(tmp_path: Path) -> None:
    flat = read(tmp_path, query())
    arrays = {name: x[..., None, None] if x.ndim == 2 else x for name, x in query().items()}
    np.testing.assert_array_equal(difference(flat, QUERY_PATH, (64, 64)), difference(read(tmp_path, arrays), QUERY_PATH, (64, 64)))


def test_a_convolution_with_a_middle_part(tmp_path: Path) -> None:
    down, mid, up = normal(4, 96, 1, 1), normal(3, 4, 3, 3), normal(96, 3, 1, 1)
    arrays = {f"{CONV}.lora_down.weight": down, f"{CONV}.lora_mid.weight": mid, f"{CONV}.lora_up.weight": up, f"{CONV}.alpha": np.float32(6)}
    expected = np.einsum("oa,abhw,bi->hwio", up[..., 0, 0], mid, down[..., 0, 0]) * 2
    np.testing.assert_allclose(difference(read(tmp_path, arrays), CONV_PATH, (3, 3, 96, 96)), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("said", "scale"),
    [
        ({"unet.lora_alpha": 4}, 2),
        ({"unet.lora_alpha": 4, "unet.use_rslora": True}, 4 / 2**0.5),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"attn2.to_q": 9, "attn1.to_q": 6, "to_q": 1}}, 3),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"^to_q": 9}}, 2),
        ({"text_encoder.lora_alpha": 4}, 1),
        ({"lora_alpha": 4}, 2),
    ],
)
def test_alphas_in_the_metadata(said: dict[str, Any], scale: float, tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps(said)}
    lora = read(tmp_path, query(alpha=None), metadata)
    assert lora.networks["unet"][QUERY_PATH].scale == pytest.approx(scale)
    assert read(tmp_path, query(), metadata).networks["unet"][QUERY_PATH].scale == 0.5  # what the tensors say counts first


_DAMAGED = ("{", "[]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": [1]}', '{"unet.alpha_pattern": {"(a+)+$": 1}}', "[" * 9999)


@pytest.mark.parametrize("said", _DAMAGED)
def test_damaged_metadata_is_refused(said: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"some\.safetensors: .*its metadata"):
        read(tmp_path, query(alpha=None), {"lora_adapter_metadata": said})


def test_unknown_names_are_listed_or_left_out(tmp_path: Path) -> None:
    strange = {
        f"{QUERY}s.lora_down.weight": normal(1),
        "bundle_emb.x.string_to_param.*": normal(1),
        "lora_unet_conv_in.hada_w1_a": normal(1),
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.lora_A.weight": normal(1),
    }
    with pytest.raises(SourceError) as caught:
        read(tmp_path, query() | strange)
    message = str(caught.value)
    assert "some.safetensors: names that are not understood (4): " in message and "--allow-unknown-lora-keys" in message
    for name, what in zip(strange, (f"nearest: {QUERY}", "a textual inversion", "LoHa, which is no LoRA", "part of an image adapter"), strict=True):
        assert f"{name} ({what})" in message
    with pytest.warns(UserWarning, match=r"names that are not understood \(4\): .*; they are left out"):
        lora = read(tmp_path, query() | strange, allow_unknown=True)
    assert sorted(lora.left_out) == sorted(strange) and list(lora.networks) == ["unet"] and list(lora.networks["unet"]) == [QUERY_PATH]


def test_nothing_of_an_identity_network_can_be_named(tmp_path: Path) -> None:
    for name in ("controlnet.mid_block.resnets.0.conv1", "unet.ip_adapter.1.to_k_ip", "lora_unet_controlnet_down_blocks_0", "image_proj.proj_in"):
        with pytest.raises(SourceError, match=r"names that are not understood \(1\)"):
            read(tmp_path, query() | {f"{name}.lora_down.weight": normal(2, 8)})


def test_many_unknown_names_are_cut_short(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="names that are not understood") as caught:
        read(tmp_path, query() | {f"strange_{i}.lora_down.weight": normal(1) for i in range(5000)})
    assert "(5000)" in str(caught.value) and "and 4980 more" in str(caught.value) and len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (lambda: query(lora_down__weight=normal(2, 65)), r"attn1_to_q.lora_down.weight is \[2, 65\] where \[2, 64\] is needed: .*to_q is \[64, 64\]"),
        (lambda: query(lora_up__weight=normal(63, 2)), r"lora_up.weight is \[63, 2\] where \[64, 2\] is needed"),
        (lambda: query(lora_up__weight=normal(64, 3)), r"lora_down.weight is \[2, 64\] where \[3, 64\] is needed"),
        (lambda: query(lora_up__weight=normal(64)), r"lora_up.weight is \[64\] where none is possible"),
        (lambda: query(lora_up__weight=normal(64, 0), lora_down__weight=normal(0, 64)), "where none is possible"),
        (lambda: query(lora_mid__weight=normal(2, 2, 3, 3)), r"lora_mid.weight is \[2, 2, 3, 3\] where none is possible"),
        (lambda: query(lora_up__weight=None), "lora_down.weight has no up beside it; the file is incomplete"),
        (lambda: query(dora_scale=normal(1, 64)[:, :63]), r"dora_scale is \[1, 63\] where \[64\] is needed"),
        (lambda: query(alpha=normal(2)), r"alpha is \[2\] where \[\] is needed"),
        (lambda: query(alpha=np.float32(np.inf)), "alpha has NaN or infinity; this is no trained LoRA"),
        (lambda: query(lora_down__weight=np.full((2, 64), np.nan, np.float32)), "lora_down.weight has NaN or infinity"),
        (lambda: query(lora_up__weight=np.ones((64, 2), np.int8)), "has type int8; only float16, float32, float64, bfloat16 are read"),
        (lambda: query() | {f"{QUERY.replace('down_blocks_1_attentions_0', 'input_blocks_4_1')}.alpha": np.float32(1)}, "are the same weight"),
        (lambda: {f"{CONV}.alpha": np.float32(1), **query()}, "has neither up nor down beside it; the file is incomplete"),
        (lambda: query() | {f"{CONTEXT}.lora_down.weight": normal(2, 768)}, "Stable Diffusion 1, whose contexts are 768 wide; this model's are 80"),
        (lambda: {f"{QUERY}.hada_w1_a": normal(2, 2)}, "this is no LoRA for SDXL: .* it holds LoHa, which is no LoRA"),
        (lambda: {"down_blocks.0.resnets.0.conv1.weight": normal(2)}, "this is no LoRA for SDXL: .* it holds a whole UNet"),
        (lambda: {"transformer.double_blocks.0.lora_A.weight": normal(2, 2)}, "it holds part of a LoRA for Stable Diffusion 3 or Flux"),
    ],
)  # fmt: skip
def test_files_that_are_refused(arrays: Callable[[], Arrays], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        read(tmp_path, arrays())


def test_hostile_files_are_refused_before_they_are_used(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file(query(), path)
    sound = path.read_bytes()
    length = int.from_bytes(sound[:8], "little")
    header = json.loads(sound[8 : 8 + length])
    name = f"{QUERY}.lora_up.weight"
    overlap = json.dumps(header | {name: header[name] | {"data_offsets": [0, 512]}}).encode()
    huge = json.dumps(header | {name: header[name] | {"shape": [2**40, 2**30]}}).encode()
    cases = {
        "empty": b"",
        "header of": (2**40).to_bytes(8, "little") + sound[8:],
        "cut": sound[: len(sound) // 2],
        "longer": sound + b"x",
        "overlap": len(overlap).to_bytes(8, "little") + overlap + sound[8 + length :],
        "huge": len(huge).to_bytes(8, "little") + huge + sound[8 + length :],
        "page": b"<!DOCTYPE html><html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "pickle": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00exit\x85R.",
    }
    for content in cases.values():
        path.write_bytes(content)
        with pytest.raises(ConversionError, match=r"some\.safetensors"):
            read_lora(path, CONFIG)
    with pytest.raises(SourceError, match="is a folder; name the LoRA's file in it"):
        read_lora(tmp_path, CONFIG)
    with pytest.raises(SourceError, match="there is no such file"):
        read_lora(tmp_path / "absent", CONFIG)


def test_a_file_in_every_style_gives_the_same_factors(tmp_path: Path) -> None:
    paths = []
    for style in ("kohya", "original", "peft"):
        paths.append(tmp_path / f"{style}.safetensors")
        save_file(lora_arrays(CONFIG, style, alpha=None), paths[-1])
    first, *others = read_loras(paths, CONFIG)
    assert {network: len(factors) for network, factors in first.networks.items()} == {network: len(sites) for network, sites in ALL.items()}
    for other in others:
        for network, factors in first.networks.items():
            assert factors.keys() == other.networks[network].keys()
            for path, one in factors.items():
                assert np.array_equal(one.down, other.networks[network][path].down) and np.array_equal(one.up, other.networks[network][path].up)
