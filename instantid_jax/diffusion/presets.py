"""The settings that few-step models are made for, as their authors give them: arguments of the pipeline's call, by name.

turbo        stabilityai/sdxl-turbo: model card and scheduler_config.json. Best at 512 pixels; 1 to 4 steps.
lightning-N  ByteDance/SDXL-Lightning (arXiv 2402.13929): model card, "trailing" Euler, without guidance. As a UNet or a LoRA;
             the file's number of steps must be the preset's.
hyper-1      ByteDance/Hyper-SD (arXiv 2404.13686): model card, Hyper-SDXL-1step-lora: TCD with eta 1; it allows up to 8 steps, for
             which a lower eta gives more detail.
hyper-8      The same card, Hyper-SDXL-8steps-lora: "trailing" DDIM, without guidance.
lcm          latent-consistency/lcm-lora-sdxl (arXiv 2311.05556): model card. 2 to 8 steps; no guidance, or 1 to 2.

None of these was made with the identity nets in place: what steps and strengths do best there is to be tried.
"""

from typing import Any

__all__ = ["PRESETS"]

_TRAILING = {"timestep_spacing": "trailing"}


def _settings(sampler: str, steps: int, **options: Any) -> dict[str, Any]:
    return {"sampler": sampler, "sampler_options": options, "num_inference_steps": steps, "guidance_scale": 0.0}


PRESETS: dict[str, dict[str, Any]] = {
    "turbo": _settings("euler_a", 1, **_TRAILING),
    "lightning-2": _settings("euler", 2, **_TRAILING),
    "lightning-4": _settings("euler", 4, **_TRAILING),
    "lightning-8": _settings("euler", 8, **_TRAILING),
    "hyper-1": _settings("tcd", 1, eta=1.0),
    "hyper-8": _settings("ddim", 8, **_TRAILING),
    "lcm": _settings("lcm", 4),
}
"""Name -> sampler, sampler_options, num_inference_steps and guidance_scale."""
