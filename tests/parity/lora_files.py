"""LoRA files for the tests, in the ways that trainers write them, with seed-determined numbers.

Names are made here from our on-disk paths, apart from `convert_weights`.
"""

import re
from pathlib import Path

import numpy as np
from oracle import random
from safetensors.numpy import save_file

from instantid_jax.config import ModelConfig
from instantid_jax.models import build_networks

UNET = (
    "down_blocks/1/attentions/0/transformer_blocks/0/attn1/to_q/kernel",
    "down_blocks/1/attentions/0/transformer_blocks/0/attn2/to_k/kernel",
    "down_blocks/1/attentions/1/transformer_blocks/1/attn2/to_v/kernel",
    "down_blocks/1/attentions/1/transformer_blocks/1/attn1/to_out_0/kernel",
    "mid_block/attentions/0/transformer_blocks/0/ff/net_0/proj/kernel",
    "mid_block/attentions/0/transformer_blocks/1/ff/net_2/kernel",
    "up_blocks/0/attentions/2/proj_in/kernel",
    "up_blocks/0/attentions/0/proj_out/kernel",
)
"""Linear layers; the stacks they are in change in part."""
CONVS = (
    "down_blocks/0/resnets/1/conv1/kernel",
    "down_blocks/1/resnets/0/conv_shortcut/kernel",
    "down_blocks/1/resnets/0/time_emb_proj/kernel",
    "down_blocks/0/downsamplers/0/conv/kernel",
    "mid_block/resnets/1/conv2/kernel",
    "up_blocks/0/upsamplers/0/conv/kernel",
    "up_blocks/1/resnets/2/conv_shortcut/kernel",
)
TEXT = (
    "encoder/layers/0/self_attn/q_proj/kernel",
    "encoder/layers/0/self_attn/v_proj/kernel",
    "encoder/layers/1/self_attn/out_proj/kernel",
    "encoder/layers/1/mlp/fc1/kernel",
    "encoder/layers/0/mlp/fc2/kernel",
)
_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_ORIGINAL_RESNET = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection"}

Sites = dict[str, tuple[str, ...]]
ALL: Sites = {"unet": UNET + CONVS, "text_encoder": TEXT, "text_encoder_2": TEXT}


def module(network: str, path: str) -> str:
    """The published name of a kernel's module."""
    name = re.sub(r"\b(to_out|net)_(\d+)", r"\1.\2", path.removesuffix("/kernel").replace("/", "."))
    return name if network == "unet" or name == "text_projection" else f"text_model.{name}"


def original(name: str, layers: int = 2) -> str:
    """A diffusers module of the UNet in the original release's names."""
    side, block, kind, index, *rest = name.split(".")
    if side == "mid_block":
        kind, index, *rest = name.split(".")[1:]
        return ".".join(["middle_block", "1" if kind == "attentions" else "02"[int(index)], *map(_ORIGINAL_RESNET.get, rest, rest)])
    if kind in ("downsamplers", "upsamplers"):
        last = int(block) * (layers + 1) + layers
        return f"input_blocks.{last + 1}.0.op" if kind == "downsamplers" else f"output_blocks.{last}.2.conv"
    number = int(block) * (layers + 1) + int(index) + (1 if side == "down_blocks" else 0)
    stem = "input_blocks" if side == "down_blocks" else "output_blocks"
    inner = [_ORIGINAL_RESNET.get(rest[0], rest[0])] if kind == "resnets" else rest
    return ".".join([f"{stem}.{number}.{int(kind == 'attentions')}", *inner])


def stem(network: str, path: str, style: str) -> str:
    """What a style calls a kernel's module."""
    name = module(network, path)
    if style in ("peft", "diffusers"):
        return f"{network}.{name}"
    if style == "original" and network == "unet":
        name = original(name)
    return _PREFIX[network] + name.replace(".", "_")


def lora_arrays(
    config: ModelConfig,
    style: str,
    sites: Sites = ALL,
    rank: int = 3,
    alpha: float | None = 2.0,
    seed: str = "",
    dora: bool = False,
    size: float = 0.6,
) -> dict[str, np.ndarray]:
    """The file's arrays: `style` is "kohya", "original" (kohya with the original release's names), "peft" or "diffusers".

    Ranks differ from kernel to kernel, alphas in the UNet outside of attention alone (elsewhere diffusers 0.42 loses them);
    differences are about `size` of a kernel's own size.
    """
    networks, arrays = build_networks(config), dict[str, np.ndarray]()
    for network, paths in sites.items():
        first = ("lora.down", "lora.up") if network == "unet" else ("lora_linear_layer.down", "lora_linear_layer.up")
        down, up = {"peft": ("lora_A", "lora_B"), "diffusers": first}.get(style, ("lora_down", "lora_up"))
        shapes = networks[network].disk_shapes()
        for number, path in enumerate(paths):
            *kernel, inputs, outputs = shapes[path]
            own = rank + number % 2 if style != "diffusers" else rank
            name, fan_in = stem(network, path, style), inputs * int(np.prod(kernel))
            size_down = np.float32((size / (fan_in * own)) ** 0.5)
            arrays[f"{name}.{down}.weight"] = random(f"{seed}{network}{path}down", own, inputs, *kernel) * size_down
            arrays[f"{name}.{up}.weight"] = random(f"{seed}{network}{path}up", outputs, own, *(1 for _ in kernel)) * np.float32(size**0.5)
            if alpha is not None and style in ("kohya", "original"):
                arrays[f"{name}.alpha"] = np.asarray(alpha + (number % 2 if network == "unet" and "/attn" not in path else 0), np.float32)
            if dora:
                length = 1 + 0.3 * random(f"{seed}{network}{path}length", outputs)
                ones = [1 for _ in kernel]
                if style == "peft":
                    arrays[f"{name}.lora_magnitude_vector"] = length.reshape(1, outputs, *ones) if kernel else length
                else:
                    arrays[f"{name}.dora_scale"] = length.reshape(outputs, 1, *ones)
    return arrays


def write_lora(path: Path, config: ModelConfig, style: str = "kohya", **options: object) -> Path:
    """`lora_arrays` as a file."""
    save_file(lora_arrays(config, style, **options), path)  # type: ignore[arg-type]
    return path
