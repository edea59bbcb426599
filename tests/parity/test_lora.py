"""LoRAs against diffusers and PEFT: merged weights against `fuse_lora`, and latents of whole InstantID calls against both of theirs.

The PyTorch side is the golden case's, as in `test_whole_pipeline`, with its UNet and text towers under diffusers' own loader.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from lora_files import ALL, stem, write_lora
from oracle import error, nhwc
from peft import LoraConfig, get_peft_model_state_dict
from test_whole_pipeline import GUIDANCE, NEGATIVE, PROMPT, Reference
from test_whole_pipeline import STRENGTHS as NETS

from convert_weights.__main__ import main as convert
from convert_weights.lora import read_lora, sites_of
from instantid_jax.checkpoint import load_weights, save_weights
from instantid_jax.config import ModelConfig, sdxl
from instantid_jax.lora import LORA_NETWORKS, Lora, merge_lora
from instantid_jax.models import build_networks
from instantid_jax.pipeline import InstantIDPipeline, read_config

WEIGHTS, LATENTS = 2e-6, 1e-4
STEPS = 3
PAIR = (0.8, 0.5)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def converted(golden_snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "weights"
    assert convert(["import", "--base", str(golden_snapshot / "base"), "--instantid", str(golden_snapshot / "instantid"), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def config(converted: Path) -> ModelConfig:
    return read_config(converted)


@pytest.fixture(scope="module")
def files(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same differences in every style that diffusers reads, and others beside them."""
    folder = tmp_path_factory.mktemp("files")
    out = {style: write_lora(folder / f"{style}.safetensors", config, style, seed="a") for style in ("kohya", "original", "peft", "diffusers")}
    out["other"] = write_lora(folder / "other.safetensors", config, "kohya", seed="b", rank=5, alpha=4.0)
    out["dora"] = write_lora(folder / "dora.safetensors", config, "peft", seed="c", dora=True, sites={"unet": ALL["unet"]})
    return out


def loaded(reference: Reference, files: list[Path], scales: tuple[float, ...]) -> Any:
    """The reference's networks in diffusers' pipeline, with LoRAs as diffusers loads them."""
    towers = {"text_encoder": reference.towers[0], "text_encoder_2": reference.towers[1]}
    tokenizers = {"tokenizer": None, "tokenizer_2": None}
    pipe = StableDiffusionXLPipeline(vae=None, unet=reference.unet, scheduler=reference.scheduler, **towers, **tokenizers)
    for file in files:
        pipe.load_lora_weights(str(file), adapter_name=file.stem)
    pipe.set_adapters([file.stem for file in files], list(scales))
    return pipe


def published(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The base weights, under their names without LoRAs and without transformers' outer level."""
    named = {name.replace(".base_layer", "").removeprefix("text_model."): x for name, x in module.state_dict().items() if "lora_" not in name}
    return {name: x.numpy().copy() for name, x in named.items()}


def ours_merged(converted: Path, network: str, loras: list[Lora], scales: tuple[float, ...]) -> dict[str, np.ndarray]:
    return merge_lora(load_weights(converted / network), network, loras, scales)


def as_published(path: str, x: np.ndarray) -> tuple[str, np.ndarray]:
    name = path.removesuffix("/kernel").replace("/", ".").replace("to_out_0", "to_out.0").replace("net_0", "net.0").replace("net_2", "net.2")
    return f"{name}.weight", x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T


@pytest.mark.parametrize("styles", [["kohya"], ["original"], ["peft"], ["diffusers"], ["kohya", "other"], ["dora"]], ids="+".join)
def test_merged_weights_are_the_fused_ones(
    styles: list[str], files: dict[str, Path], converted: Path, config: ModelConfig, golden_snapshot: Path
) -> None:
    reference = Reference(golden_snapshot)
    before = {name: published(net) for name, net in zip(LORA_NETWORKS, (reference.unet, *reference.towers), strict=True)}
    loaded(reference, [files[style] for style in styles], PAIR[: len(styles)]).fuse_lora()
    loras = [read_lora(files[style], config) for style in styles]
    changed = 0
    for network, module in zip(LORA_NETWORKS, (reference.unet, *reference.towers), strict=True):
        theirs = published(module)
        for path, x in ours_merged(converted, network, loras, PAIR[: len(styles)]).items():
            if not path.endswith("/kernel"):
                continue
            name, mine = as_published(path, x)
            touched = any(path in lora.networks.get(network, {}) for lora in loras)
            assert error(mine, theirs[name]) <= (WEIGHTS if touched else 0), name
            if touched:
                assert error(before[network][name], theirs[name]) > 1e-2, name
                changed += 1
    assert changed == sum(len(ALL[network]) for network in (LORA_NETWORKS if styles != ["dora"] else ["unet"]))


def latents(pipe: InstantIDPipeline, golden: Any) -> np.ndarray:
    return pipe(
        PROMPT,
        golden["kps_image"],
        golden["emb"].astype(np.float32),
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        controlnet_conditioning_scale=NETS[0],
        ip_adapter_scale=0.8,
        latents=golden["latents"].transpose(0, 2, 3, 1),
        output_type="latent",
    ).images


@pytest.mark.parametrize("styles", [["original", "other"], pytest.param(["dora", "other"], marks=pytest.mark.slow)], ids="+".join)
def test_latents_of_whole_calls(styles: list[str], files: dict[str, Path], converted: Path, config: ModelConfig, golden_snapshot: Path) -> None:
    """Merged and kept apart are both diffusers' unfused LoRAs, and, without DoRA, its fused ones."""
    chosen = [files[style] for style in styles]
    loras = [read_lora(file, config) for file in chosen]
    with np.load(Path(__file__).parents[1] / "golden/dev/golden.npz") as archive:
        golden = dict(archive)
    start = torch.from_numpy(golden["latents"].astype(np.float32))
    inputs = torch.from_numpy(golden["emb"].astype(np.float32)).reshape(-1), [golden["kps_image"]], start, None
    reference = Reference(golden_snapshot)
    plain = nhwc(reference(*inputs))
    theirs = loaded(reference, chosen, PAIR)
    unfused = nhwc(reference(*inputs))
    assert error(plain, unfused) > 100 * LATENTS

    merged = latents(InstantIDPipeline.from_pretrained(converted, loras=loras, lora_scales=PAIR), golden)
    assert error(merged, unfused) <= LATENTS
    pipe = InstantIDPipeline.from_pretrained(converted)
    pipe.set_loras(loras, PAIR)
    assert error(latents(pipe, golden), unfused) <= LATENTS
    assert error(latents(pipe, golden), merged) <= LATENTS / 10
    if "dora" not in styles:  # diffusers' fused DoRA depends on what was fused before it
        theirs.fuse_lora()
        assert error(merged, nhwc(reference(*inputs))) <= LATENTS
    pipe.set_loras([])
    assert error(latents(pipe, golden), plain) <= LATENTS


def test_every_kernel_of_sdxl_is_known_in_every_style() -> None:
    networks = build_networks(sdxl())
    spellings = sites_of(sdxl())
    for network in LORA_NETWORKS:
        kernels = [path for path in networks[network].disk_shapes() if path.endswith("/kernel")]
        assert len(kernels) > 50
        for path in kernels:
            blocks = network != "unet" or path.startswith(("down", "mid", "up"))
            for style in ("kohya", "peft", "diffusers", "original") if blocks else ("kohya", "peft", "diffusers"):
                site = spellings[stem(network, path, style)]
                assert (site.network, site.path) == (network, path)


def test_an_extracted_lora_is_the_difference_in_diffusers_too(
    converted: Path, config: ModelConfig, files: dict[str, Path], golden_snapshot: Path, tmp_path: Path
) -> None:
    lora, tuned, out = read_lora(files["kohya"], config), tmp_path / "tuned", tmp_path / "extracted.safetensors"
    tuned.mkdir()
    shutil.copy(converted / "config.json", tuned)
    for network in LORA_NETWORKS:
        save_weights(tuned / network, ours_merged(converted, network, [lora], ()))
    assert convert(["extract-lora", "--base", str(converted), "--tuned", str(tuned), "--out", str(out), "--rank", "8"]) == 0
    reference = Reference(golden_snapshot)
    loaded(reference, [out], (1.0,)).fuse_lora()
    extracted, changed = read_lora(out, config), 0
    for network, module in zip(LORA_NETWORKS, (reference.unet, *reference.towers), strict=True):
        theirs, expected = published(module), load_weights(tuned / network)
        for path, x in ours_merged(converted, network, [extracted], ()).items():
            if path.endswith("/kernel"):
                name, mine = as_published(path, x)
                assert error(mine, theirs[name]) <= WEIGHTS and error(x, expected[path]) <= WEIGHTS, name
                changed += path in extracted.networks.get(network, {})
    assert changed == sum(map(len, ALL.values()))


def test_alphas_in_what_diffusers_saves(converted: Path, config: ModelConfig, golden_snapshot: Path, tmp_path: Path) -> None:
    """A LoRA as diffusers' training scripts write it, with its alphas in the metadata."""
    unet = Reference(golden_snapshot).unet
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"attn2.to_v": 3}, "init_lora_weights": False}
    unet.add_adapter(LoraConfig(target_modules=["to_q", "to_v", "to_out.0", "conv1", "ff.net.0.proj"], **options))  # type: ignore[arg-type]
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    said = _collate_lora_metadata({"unet": unet})
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **said)
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors", config)
    unet.fuse_lora()
    theirs = published(unet)
    scales = set()
    for path, x in ours_merged(converted, "unet", [lora], ()).items():
        if path in lora.networks["unet"]:
            name, mine = as_published(path, x)
            assert error(mine, theirs[name]) <= WEIGHTS, name
            scales.add(lora.networks["unet"][path].scale)
    assert scales == {3.0, 1.5} and len(lora.networks["unet"]) > 40
