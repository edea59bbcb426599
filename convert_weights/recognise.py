"""Names the file that someone brought instead of the right one.

Published weights of other models often load far enough to give an incomprehensible list of names. Where a file can be
told by its names and shapes, the error says what it is. Contents that no trained network has are refused here too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.source import FLOATS, SourceError, TensorFile
from instantid_jax.config import UNetConfig

_CHANNELS = {
    9: "an inpainting model",
    8: "an image-editing model",
    5: "a depth model",
}
# Bits of the exponent, all set in NaN and infinity and in no other number.
_EXPONENTS = {
    FLOATS["float16"]: (np.uint16, 0x7C00),
    FLOATS["bfloat16"]: (np.uint16, 0x7F80),
    FLOATS["float32"]: (np.uint32, 0x7F800000),
    FLOATS["float64"]: (np.uint64, 0x7FF0000000000000),
}


def refuse_foreign_adapter(file: TensorFile, width: int, tokens: int) -> None:
    """Raises `SourceError` that names an adapter that is not InstantID's for a UNet with contexts of `width`."""
    tensors = file.tensors
    image_proj = {name.removeprefix("image_proj."): t for name, t in tensors.items() if name.startswith("image_proj.")}
    keys = [t for name, t in tensors.items() if name.startswith("ip_adapter.") and name.endswith("to_k_ip.weight")]
    latents, proj_in = image_proj.get("latents"), image_proj.get("proj_in.weight")
    context = keys[0].shape[1] if keys and len(keys[0].shape) == 2 else None
    kind = None
    if any(name.startswith(("pulid_", "id_adapter", "id_encoder")) or ".id_to_k" in name for name in tensors):
        kind = "a PuLID file"
    elif any(name.startswith(("image_proj.proj.0.", "image_proj.perceiver_resampler.")) for name in tensors):
        kind = "an IP-Adapter-FaceID"
    elif "proj.weight" in image_proj and latents is None:
        kind = "a plain IP-Adapter, whose tokens come from one projection of a CLIP picture embedding"
    elif context == 768 and width != 768:
        kind = "an adapter for Stable Diffusion 1.5 (contexts of 768)"
    elif proj_in is not None and len(proj_in.shape) == 2 and proj_in.shape[1] in (768, 1024, 1280, 1664) and width == 2048:
        kind = f"an IP-Adapter-plus, which takes CLIP picture features of width {proj_in.shape[1]} instead of a face embedding"
    elif any(".processor." in name or name.startswith(("unet.", "lora_")) for name in tensors):
        kind = "a LoRA or attention-processor file"
    elif not image_proj or not keys:
        lacks = " and ".join(part for part, there in (("image_proj", image_proj), ("ip_adapter", keys)) if not there)
        raise SourceError(f"{file.where}: this is not an InstantID adapter: it has no {lacks}")
    if kind:
        raise SourceError(f"{file.where}: this is {kind}, not InstantID's adapter for SDXL (ip-adapter.bin of InstantX/InstantID)")
    if latents is not None and len(latents.shape) == 3 and latents.shape[1] != tokens:
        made = latents.shape[1]
        raise SourceError(
            f"{file.where}: the adapter makes {made} identity tokens where InstantID has {tokens}; if that is meant, give --tokens {made}"
        )


def refuse_foreign_single_file(file: TensorFile) -> None:
    """Raises `SourceError` that names a single-file checkpoint that is not of SDXL base."""
    names = file.tensors

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    kind = None
    first = names.get("model.diffusion_model.input_blocks.0.0.weight")
    if has("cond_stage_model.transformer."):
        kind = "a Stable Diffusion 1 checkpoint"
    elif has("cond_stage_model.model."):
        kind = "a Stable Diffusion 2 checkpoint"
    elif has("conditioner.embedders.0.model.") and not has("conditioner.embedders.1."):
        kind = "the SDXL refiner, which has another architecture and one text tower"
    elif has("model.diffusion_model.joint_blocks.", "joint_blocks."):
        kind = "a Stable Diffusion 3 checkpoint"
    elif has("model.diffusion_model.double_blocks.", "double_blocks."):
        kind = "a Flux checkpoint"
    elif has("control_model."):
        kind = "a ControlNet"
    elif is_lora(file):
        kind = "a LoRA, which sample.py takes as --lora"
    elif first is not None and len(first.shape) == 4 and first.shape[1] in _CHANNELS:
        kind = f"{_CHANNELS[first.shape[1]]}, whose UNet takes {first.shape[1]} channels"
    elif first is None:
        kind = "no checkpoint with the names of the original SDXL release (model.diffusion_model.*)"
    if kind:
        raise SourceError(f"{file.where}: this is {kind}, not SDXL base or a model made from it")


def is_lora(file: TensorFile) -> bool:
    """Whether the names are a LoRA's."""
    return any(name.startswith(("lora_unet_", "lora_te")) or ".lora" in name or "_lora." in name for name in file.tensors)


def refuse_foreign_unet(file: TensorFile) -> None:
    """Raises `SourceError` where a file that should be a UNet alone is a LoRA or holds more."""
    if is_lora(file):
        raise SourceError(f"{file.where}: this is a LoRA, not a UNet; sample.py takes it as --lora")
    if any(name.startswith(("first_stage_model.", "conditioner.", "cond_stage_model.")) for name in file.tensors):
        raise SourceError(f"{file.where}: this is a whole checkpoint, not a UNet alone; give it as --base")


def refuse_foreign_config(base: Path, unet: dict[str, Any]) -> None:
    """Raises `SourceError` that names a diffusers folder whose UNet is not SDXL base's."""
    channels = unet.get("in_channels", 4)
    if channels in _CHANNELS:
        raise SourceError(f"{base}: this is {_CHANNELS[channels]}, whose UNet takes {channels} channels; InstantID works on text-to-image SDXL")
    if unet.get("cross_attention_dim") == 1280 and unet.get("projection_class_embeddings_input_dim") == 2560:
        raise SourceError(f"{base}: this is the SDXL refiner, which has another architecture and one text tower; name SDXL base")


def refuse_foreign_base(file: TensorFile, config: UNetConfig) -> None:
    """Raises `SourceError` where a UNet's first layer shows that it is of another kind than its configuration says."""
    for name in ("conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight"):
        tensor = file.tensors.get(name)
        if tensor is not None and len(tensor.shape) == 4 and tensor.shape[1] != config.in_channels and tensor.shape[1] in _CHANNELS:
            raise SourceError(f"{file.where}: this is {_CHANNELS[tensor.shape[1]]}, whose UNet takes {tensor.shape[1]} channels")


def refuse_foreign_network(name: str, file: TensorFile) -> None:
    """After a failed match: raises `SourceError` where the file can be told to be something else."""
    names = file.tensors
    if any(n.startswith("control_model.") for n in names):
        raise SourceError(f"{file.where}: this ControlNet has the original release's names; its diffusers version is needed")
    if is_lora(file):
        raise SourceError(f"{file.where}: this is a LoRA, not the weights of {name}")


def numbers_wrong(x: np.ndarray) -> str | None:
    """What makes an array's values impossible for weights: "NaN or infinity", or None. `x` is contiguous."""
    bits, mask = _EXPONENTS[x.dtype]
    flat = x.reshape(-1).view(bits)
    for start in range(0, flat.size, 2**18):
        exponent = flat[start : start + 2**18] & bits(mask)
        if exponent.size and exponent.max() == mask:
            return "NaN or infinity"
    return None
