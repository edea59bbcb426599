"""LoRAs from two sets of weights: added to the first they give the second, as far as their rank goes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert_weights.__main__ import main
from convert_weights.lora import read_lora
from convert_weights.lora_extraction import extract_lora
from instantid_jax.checkpoint import load_weights
from instantid_jax.config import tiny, to_json
from instantid_jax.defaults import DEFAULT_WEIGHTS, default_config
from instantid_jax.lora import LORA_NETWORKS, merge_lora

QUERY = "unet/down_blocks/1/attentions/0/transformer_blocks/0/attn1/to_q/kernel"
CHANGED = (
    QUERY,
    "unet/mid_block/attentions/0/transformer_blocks/1/ff/net_0/proj/kernel",
    "unet/up_blocks/0/attentions/1/proj_in/kernel",
    "unet/conv_in/kernel",
    "unet/down_blocks/1/resnets/0/conv_shortcut/kernel",
    "unet/mid_block/resnets/1/conv2/kernel",
    "text_encoder/encoder/layers/0/self_attn/q_proj/kernel",
    "text_encoder_2/encoder/layers/1/mlp/fc2/kernel",
)
Arrays = dict[str, np.ndarray]


def normal(name: str, *shape: int) -> np.ndarray:
    return np.random.default_rng([len(name), *map(ord, name)]).standard_normal(shape, np.float32)


def noise(name: str, x: np.ndarray) -> np.ndarray:
    return x + 0.1 * np.abs(x).mean() * normal(name, *x.shape)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in float32."""
    folder = tmp_path_factory.mktemp("extraction") / "base"
    shutil.copytree(DEFAULT_WEIGHTS, folder)
    file = folder / "weights.safetensors"
    save_file({name: x.astype(np.float32) for name, x in load_file(file).items() if name.split("/")[0] in LORA_NETWORKS}, file)
    return folder


def tuned(base: Path, out: Path, change: Callable[[str, np.ndarray], np.ndarray], names: Any = CHANGED) -> Path:
    """A copy with some weights changed."""
    shutil.copytree(base, out)
    arrays = load_file(out / "weights.safetensors")
    save_file(arrays | {name: change(name, arrays[name]) for name in names}, out / "weights.safetensors")
    return out


def merged(base: Path, lora: Path, network: str, scale: float = 1.0) -> Arrays:
    return merge_lora(load_weights(base / network), network, [read_lora(lora, default_config())], [scale])


def test_at_full_rank_the_base_becomes_the_tuned(base: Path, tmp_path: Path) -> None:
    other, out = tuned(base, tmp_path / "tuned", noise), tmp_path / "a.safetensors"
    found = extract_lora(base, other, out, rank=10_000)
    assert [(one.network, one.changed) for one in found] == [("unet", 6), ("text_encoder", 1), ("text_encoder_2", 1)]
    assert all(abs(one.carried / one.squared - 1) < 1e-9 and not one.others for one in found)
    for network in LORA_NETWORKS:
        weights, expected, plain = merged(base, out, network), load_weights(other / network), load_weights(base / network)
        for path, x in weights.items():
            if f"{network}/{path}" in CHANGED:
                assert np.abs(x - expected[path]).max() <= 1e-6 * np.abs(expected[path]).max(), path
            else:
                assert np.array_equal(x, plain[path]), path


def matrix(x: np.ndarray) -> np.ndarray:
    """A kernel as [o, the rest]."""
    return x.reshape(-1, x.shape[-1]).T.astype(np.float64)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_nothing_of_that_rank_is_nearer(rank: int, base: Path, tmp_path: Path) -> None:
    other, out = tuned(base, tmp_path / "tuned", noise), tmp_path / "a.safetensors"
    found = extract_lora(base, other, out, rank=rank, networks=("unet",))
    plain, expected, weights = load_weights(base / "unet"), load_weights(other / "unet"), merged(base, out, "unet")
    whole, missed = 0.0, 0.0
    for name in CHANGED[:6]:
        path = name.removeprefix("unet/")
        values = np.linalg.svd(matrix(expected[path] - plain[path]), compute_uv=False)
        left = np.linalg.norm(matrix(weights[path] - expected[path]))
        assert abs(left - np.linalg.norm(values[rank:])) <= 1e-4 * np.linalg.norm(values), name
        whole, missed = whole + (values**2).sum(), missed + (values[rank:] ** 2).sum()
    (unet,) = found
    assert unet.rank == rank and abs(unet.carried / unet.squared - (1 - missed / whole)) < 1e-5
    assert all(name.startswith("unet.") for name in load_file(out))


def test_ranks_are_as_small_as_the_difference_is(base: Path, tmp_path: Path) -> None:
    def low(name: str, x: np.ndarray) -> np.ndarray:
        return x + 0.01 * (normal(name + "a", *x.shape[:-1], 3) @ normal(name + "b", 3, x.shape[-1]))

    other, out = tuned(base, tmp_path / "tuned", low), tmp_path / "a.safetensors"
    found = extract_lora(base, other, out, rank=16)
    factors = load_file(out)
    assert len(factors) == 2 * len(CHANGED) and all(one.carried > (1 - 1e-6) * one.squared for one in found)
    linear = f"unet.{QUERY.removeprefix('unet/').removesuffix('/kernel').replace('/', '.')}"
    convolution = "unet.mid_block.resnets.1.conv2"
    assert 3 <= factors[f"{linear}.lora_A.weight"].shape[0] < 16  # the sum was rounded to float32
    inputs, outputs = load_weights(base / "unet")["mid_block/resnets/1/conv2/kernel"].shape[-2:]
    rank = factors[f"{convolution}.lora_A.weight"].shape[0]
    assert factors[f"{convolution}.lora_A.weight"].shape == (rank, inputs, 3, 3) and factors[f"{convolution}.lora_B.weight"].shape == (
        outputs,
        rank,
        1,
        1,
    )


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_types(dtype: str, bound: float, base: Path, tmp_path: Path) -> None:
    other, out = tuned(base, tmp_path / "tuned", noise, [QUERY]), tmp_path / "a.safetensors"
    extract_lora(base, other, out, rank=10_000, dtype=dtype)
    path = QUERY.removeprefix("unet/")
    expected, plain = load_weights(other / "unet")[path], load_weights(base / "unet")[path]
    assert np.abs(merged(base, out, "unet")[path] - expected).max() <= bound * np.abs(expected - plain).max()


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tuned(base, tmp_path / "tuned", noise, [*CHANGED[:3], "unet/conv_in/bias"])
    out = tmp_path / "a.safetensors"
    command = ["extract-lora", "--base", str(base), "--tuned", str(other), "--out", str(out)]
    assert main([*command, "--rank", "4"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[2].split()[:4] == ["unet", "3", "of", str(_kernels())] and told[2].split()[4] == "4" and told[2].endswith(" %")
    assert told[-2] == "note: 1 weights of unet differ that no LoRA can carry, such as conv_in/bias"
    assert told[-1].startswith(f"written to {out} (") and sorted(tmp_path.iterdir()) == [out, other]
    before = out.read_bytes()
    assert main(command) == 1 and "exists; choose another --out, or give --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before and main([*command, "--overwrite"]) == 0 and out.read_bytes() != before


def _kernels() -> int:
    return sum(path.endswith("/kernel") for path in load_weights(DEFAULT_WEIGHTS / "unet"))


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        (["--rank", "0"], 2, "--rank must be at least 1, not 0"),
        (["--out", "a.bin"], 1, "--out a.bin: a LoRA is written as a safetensors file; name it a.safetensors"),
        (["--out", "gone/a.safetensors"], 1, "there is no folder gone; make it first"),
        (["--tuned", "nowhere"], 1, "nowhere is not a folder of converted weights (no config.json)"),
        (["--tuned", "SAME"], 1, "the kernels of unet, text_encoder, text_encoder_2 are the same in"),
        (["--tuned", "BIAS"], 1, "there is nothing to write a LoRA of; what differs (1, such as unet/conv_in/bias) no LoRA can carry"),
        (["--tuned", "BIAS", "--networks", "text_encoder"], 1, "the kernels of text_encoder are the same in"),
        (["--tuned", "OTHER"], 1, "are of different models (their config.json differ)"),
        (["--tuned", "SHAPE"], 1, f"are of different models: {QUERY} is [96, 96] and [96, 95]"),
        (["--tuned", "MORE"], 1, "are of different models: only one of them has unet/more/kernel"),
        (["--tuned", "NAN"], 1, f"{QUERY} has NaN or infinity; these are no trained weights"),
        (["--tuned", "CUT"], 1, "weights.safetensors is damaged ("),
    ],
)
def test_refusals(
    changes: list[str], status: int, message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kinds: dict[str, Any] = {
        "SAME": ((), lambda name, x: x),
        "OTHER": ((), lambda name, x: x),
        "CUT": ((), lambda name, x: x),
        "MORE": ((), lambda name, x: x),
        "BIAS": (["unet/conv_in/bias"], noise),
        "SHAPE": ([QUERY], lambda name, x: x[:, 1:]),
        "NAN": ([QUERY], lambda name, x: x * np.float32(np.nan)),
    }
    for kind, (names, change) in kinds.items():
        if kind in changes:
            file = tuned(base, tmp_path / kind, change, names) / "weights.safetensors"
            if kind == "OTHER":
                (file.parent / "config.json").write_text(to_json(tiny()))
            if kind == "MORE":
                save_file(load_file(file) | {"unet/more/kernel": np.ones((2, 2), np.float32)}, file)
            if kind == "CUT":
                file.write_bytes(file.read_bytes()[:-100])
    arguments = {"--base": str(base), "--tuned": str(base), "--out": "a.safetensors"} | dict(zip(changes[::2], changes[1::2], strict=True))
    assert main(["extract-lora", *(text for pair in arguments.items() for text in pair)]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("convert_weights: ") and message in lines[0]
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))
