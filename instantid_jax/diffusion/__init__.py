"""The mathematics of diffusion: noise schedules, samplers, guidance and losses. Arrays in, arrays out, float32."""

from instantid_jax.diffusion.guidance import by_branch, classifier_free, control_window, rescale
from instantid_jax.diffusion.plan import Plan, Sampler
from instantid_jax.diffusion.presets import PRESETS
from instantid_jax.diffusion.samplers import SAMPLERS, make_sampler
from instantid_jax.diffusion.schedule import SamplerError, alphas_cumprod

__all__ = [
    "PRESETS",
    "SAMPLERS",
    "Plan",
    "Sampler",
    "SamplerError",
    "alphas_cumprod",
    "by_branch",
    "classifier_free",
    "control_window",
    "make_sampler",
    "rescale",
]
