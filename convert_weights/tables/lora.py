"""LoRA files: what their names end in, and how they spell the modules that our paths stand for.

A name is a module and a part of its change. Modules are those of `tables.diffusers` and `tables.single_file`, whose names
the trainers spell in ways of their own:

    diffusers, PEFT      unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q .lora_A.weight
    diffusers, first     unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora .down.weight
    kohya, LyCORIS       lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q .lora_down.weight
    kohya, SDXL's own    lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q .lora_down.weight
    ComfyUI              diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q .lora_down.weight
    text towers          text_encoder_2.text_model... .lora_A.weight, lora_te1_text_model_... .lora_down.weight

An underscore may be a dot or itself, so no name is taken apart: every module of the network is spelled in every way, and
names are looked up.
"""

import re
from collections.abc import Iterator

PARTS = (
    (r"\.(lora_down|lora_A|lora\.down|lora_linear_layer\.down)(\.default(_\d+)?)?\.weight", "down"),
    (r"\.(lora_up|lora_B|lora\.up|lora_linear_layer\.up)(\.default(_\d+)?)?\.weight", "up"),
    (r"(?<=_lora)\.down\.weight", "down"),
    (r"(?<=_lora)\.up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.alpha", "alpha"),
    (r"\.dora_scale|\.lora_magnitude_vector(\.default(_\d+)?)?(\.weight)?", "magnitude"),
)
"""(pattern of a name's end, which part of a module's change it is)."""

REASONS = (
    (r"\.hada_w\d", "LoHa, which is no LoRA"),
    (r"\.lokr_w\d", "LoKr, which is no LoRA"),
    (r"\.(oft_|boft_)", "OFT, which is no LoRA"),
    (r"\.(diff|diff_b|w_norm|b_norm|set_weight)$", "a whole difference of a weight, which is no LoRA"),
    (r"\.lora_B(\.default)?\.bias$", "a bias in a LoRA"),
    (r"^bundle_emb\.|^emb_params$|^clip_[lg]$", "a textual inversion"),
    (r"to_[kv]_ip|^ip_adapter\.|^image_proj\.", "part of an image adapter"),
    (r"^lora_te3|^lora_transformer|^transformer\.|double_blocks|joint_blocks", "part of a LoRA for Stable Diffusion 3 or Flux"),
)
"""(pattern, what a name that is not understood is)."""

TOWERS = {"text_encoder": ("lora_te1_", "lora_te_"), "text_encoder_2": ("lora_te2_",)}
"""kohya's prefixes of the text towers."""

_FIRST = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
_FIRST_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def split(name: str) -> tuple[str, str] | None:
    """(module as the file spells it, part) of a name; None where it ends in nothing known."""
    for pattern, part in PARTS:
        found = re.search(f"(?:{pattern})$", name)
        if found is not None:
            return name[: found.start()], part
    return None


def reason(name: str) -> str:
    """What a name that is not understood is, in brackets after a space; nothing where that is not known."""
    return next((f" ({what})" for pattern, what in REASONS if re.search(pattern, name)), "")


def unet_spellings(module: str, original: str) -> Iterator[str]:
    """Every spelling of a UNet's module by its names in diffusers and in the original release."""
    yield from (f"unet.{module}", module, f"base_model.model.{module}", f"base_model.model.unet.{module}")
    yield from (f"lora_unet_{module.replace('.', '_')}", f"lora_unet_{original.replace('.', '_')}", f"diffusion_model.{original}")
    for ours, first in _FIRST.items():
        if module.endswith(f".{ours}"):
            stem = module.removesuffix(ours)
            yield from (f"{prefix}{stem}processor.{first}_lora" for prefix in ("unet.", ""))


def text_spellings(tower: str, module: str) -> Iterator[str]:
    """The same of a text tower's module, by its name in transformers."""
    short = module.removeprefix("text_model.")
    for name in dict.fromkeys((module, short)):
        yield f"{tower}.{name}"
        yield from (f"{prefix}{name.replace('.', '_')}" for prefix in TOWERS[tower])
    for ours, first in _FIRST_TEXT.items():
        if module.endswith(f".{ours}"):
            yield f"{tower}.{module.removesuffix(ours)}{first}_lora"
