"""What scripts for diffusers call and this package does not have: each name with what to use instead."""

from __future__ import annotations

from collections.abc import Iterable

from instantid_jax.published import did_you_mean

_TEXT = "give prompt and negative_prompt: texts are encoded here"
_STEPS = "give num_inference_steps, sampler and sampler_options"
_DEVICE = "the weights go to JAX's devices while they are loaded; spread them with from_pretrained(mesh=...)"
_LORA = "give convert_weights.lora.read_lora(file, pipe.config) to set_loras, or to from_pretrained as loras, which merges it for good"
_LORA_OFF = "set_loras([]) takes LoRAs away; weights with merged ones are loaded anew"
_IMPORTED = "what `python -m convert_weights import --instantid DIR` writes has the adapter in it; its strength is ip_adapter_scale"

CALL = {
    "generator": "give seed (picture i of the call has seed + i), or the noise itself as latents",
    "eta": 'give sampler="ddim" and sampler_options={"eta": ...}',
    "guess_mode": 'the nets act with and without guidance; give prompt="" and a lower guidance_scale',
    "prompt_embeds": _TEXT,
    "negative_prompt_embeds": _TEXT,
    "pooled_prompt_embeds": _TEXT,
    "negative_pooled_prompt_embeds": _TEXT,
    "return_dict": "the result is always an object whose `images` are the pictures",
    "timesteps": _STEPS,
    "sigmas": _STEPS,
    "denoising_end": _STEPS,
    "denoising_start": "give strength: it says how many of the steps are made",
    "control_image": "give image: the keypoint picture, and a list with those of other ControlNets; the picture to begin with is init_image",
    "masked_image_latents": "give init_image and mask_image",
    "padding_mask_crop": "crop the picture before and paste it after, or redraw a face with refine_face, which does both",
    "image_emb": "give image_embeds",
    "ip_adapter_image": "give image_embeds, the face's embedding",
    "ip_adapter_image_embeds": "give image_embeds, the face's embedding",
    "cross_attention_kwargs": "give ip_adapter_scale for the strength of the adapter",
    "callback": "give on_step",
    "callback_steps": "give on_step, which is called after every model call",
    "callback_on_step_end": "give on_step",
    "callback_on_step_end_tensor_inputs": "give on_step, which sees the number of the model call alone",
    "scheduler": _STEPS,
}
"""Arguments of a call."""

LOADING = {
    "torch_dtype": 'give dtype: "float32", "bfloat16" or "float16"',
    "controlnet": "the IdentityNet is in the folder; other ControlNets are controlnets=[folder, ...]",
    "variant": "choose it while converting: python -m convert_weights import --variant",
    "use_safetensors": "the folder holds converted weights: python -m convert_weights import",
    "device_map": _DEVICE,
    "scheduler": "give sampler and sampler_options to each call",
    "safety_checker": "there is none; leave it out",
}
"""Arguments of `from_pretrained`."""

METHODS = {
    "load_ip_adapter_instantid": _IMPORTED,
    "load_ip_adapter": _IMPORTED,
    "load_lora_weights": _LORA,
    "fuse_lora": _LORA,
    "load_lora_adapter": _LORA,
    "set_adapters": "set_lora_scales gives every LoRA of set_loras its strength, and compiles nothing",
    "disable_lora": "set_lora_scales with strengths of 0, which compiles nothing",
    "enable_lora": "set_lora_scales",
    "unload_lora_weights": _LORA_OFF,
    "unfuse_lora": _LORA_OFF,
    "to": _DEVICE,
    "cuda": _DEVICE,
    "enable_model_cpu_offload": _DEVICE,
    "enable_sequential_cpu_offload": _DEVICE,
    "scheduler": "give sampler and sampler_options to each call",
    "enable_vae_tiling": 'give vae_tiling="even" (or "diffusers") to the call',
    "enable_vae_slicing": "pictures are decoded one at a time already; leave it out",
    "enable_xformers_memory_efficient_attention": "give attention to from_pretrained",
}
"""Methods and attributes of a pipeline."""


def refusal(name: str, instead: dict[str, str], known: Iterable[str], owner: str) -> str:
    """One sentence for an argument that `owner` does not take."""
    if name in instead:
        return f"{name} is an argument of diffusers that {owner} does not take: {instead[name]}"
    return f"{owner} has no argument {name!r}{did_you_mean(name, known)}"
