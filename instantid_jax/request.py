"""Checking of everything a caller of the pipeline gives, before anything is compiled: one clear sentence for each mistake."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from instantid_jax.config import AutoencoderConfig, ModelConfig
from instantid_jax.diffusion import Plan, Sampler, SamplerError, control_window, make_sampler
from instantid_jax.face import FaceError, box_mask, prepare_control_image
from instantid_jax.models.tiling import Tiling
from instantid_jax.prediction import Pace, Shortcuts
from instantid_jax.strengths import Strength, StrengthError, adapter_places, control_places, read_strength

__all__ = [
    "CHECKED",
    "OUTPUT_TYPES",
    "PipelineError",
    "Request",
    "check_number",
    "check_picture",
    "check_whole",
    "in_options",
    "read_sampler_options",
]

_SIZES = ("original_size", "crops_coords_top_left", "target_size")
_SIZES += tuple(f"negative_{name}" for name in _SIZES)
_SAVINGS = ("guidance_start", "guidance_end", "cache_interval", "cache_branch_id", "control_interval", "vae_tiling", "vae_tile_size")
_IDENTITY = ("identity_guidance_scale", "negative_identity_noise", "negative_identity_seed")
# The pipeline's arguments that can be checked without knowing the size of the picture.
CHECKED = (
    *("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "prompt_weighting", "clip_skip", "num_images_per_prompt", "seed"),
    *("height", "width", "num_inference_steps", "sampler", "sampler_options", "output_type", "guidance_scale", "guidance_rescale"),
    *_IDENTITY,
    *("ip_adapter_scale", "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", *_SIZES),
    *("strength", *_SAVINGS),
)
OUTPUT_TYPES = ("pil", "np", "latent")


class PipelineError(ValueError):
    """An argument of the pipeline that cannot be used; the message names it, its value and what is needed."""


_OPTIONS = {
    "num_inference_steps": "--steps",
    "num_images_per_prompt": "--num-images",
    "controlnet_conditioning_scale": "--identitynet-scale or --control-scale",
    "control_guidance_start": "--control-start",
    "control_guidance_end": "--control-end",
    "sampler_options": "--sampler-option",
    "prompt_weighting=True": "--prompt-weighting",
}
_OPTIONS |= {name: f"--{name.replace('_', '-')}" for name in ("guidance_scale", "guidance_rescale", "ip_adapter_scale", "clip_skip")}
_OPTIONS |= {name: f"--{name.replace('_', '-')}" for name in ("prompt_weighting", "seed", "height", "width")}
_OPTIONS |= {name: f"--{name.replace('_', '-')}" for name in (*_SAVINGS, *_IDENTITY)}
_OPTIONS |= {name: f"--{name.replace('_', '-')}" for name in ("init_image", "strength", "mask_image", "mask_blur")}


def in_options(message: str) -> str:
    """A message about the pipeline's arguments in the words of ``sample.py``: "num_images_per_prompt" as "--num-images".

    Names without an underscore are plain words too, so they count at the beginning alone. Names of files, columns and fields stay.
    """
    for name, option in _OPTIONS.items():
        inside = rf"(?<![\w/\\.-])(?<!column )(?<!field ['\"]){name}(?![\w/\\-]|\.\w)"
        message = re.sub(inside if "_" in name else rf"^{name}\b(?= must)", option, message)
    return message


def read_sampler_options(texts: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts of a command line as `sampler_options`: true and false, numbers, else texts. Raises `PipelineError`."""
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise PipelineError(f"sampler_options must be written as key=value, not {text!r}")
        options[key] = _parsed(value)
    return options


def _parsed(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number from low to high. Raises `PipelineError`, as all of these checks."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer) or not math.isfinite(value):
        raise PipelineError(f"{name} must be a finite number, not {value!r}")
    if not low <= value <= high:
        raise PipelineError(f"{name} must be between {low:g} and {high:g}, not {value:g}")
    return float(value)


def check_whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from low to high."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise PipelineError(f"{name} must be a whole number, not {value!r}")
    if not low <= value <= high:
        raise PipelineError(f"{name} must be between {low} and {high}, not {value}")
    return int(value)


def _texts(name: str, value: Any, count: int | None = None) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else None
    if not texts or not all(isinstance(t, str) for t in texts):
        raise PipelineError(f"{name} must be a text or a list of texts, not {value!r}")
    if count is not None and len(texts) == 1:
        texts = texts * count
    if count is not None and len(texts) != count:
        raise PipelineError(f"{name} has {len(texts)} texts, prompt has {count}")
    return texts


def _per_net(name: str, value: Any, nets: int) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple | np.ndarray) else [value] * nets
    if len(values) != nets:
        raise PipelineError(f"{name} has {len(values)} values for {nets} nets (IdentityNet first)")
    return values


def check_strength(name: str, value: Any, steps: Sequence[int], places: Sequence[str]) -> Strength:
    """A strength (`strengths.read_strength`) that fits the steps of the calls and the layers of the model."""
    try:
        strength = read_strength(value)
        strength.table(steps, places, 2)
    except StrengthError as error:
        raise PipelineError(f"{name} {error}") from error
    return strength


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PipelineError(f"{name} must be two whole numbers (height or top first), not {value!r}")
    low = 1 if name.endswith("size") else 0
    return check_whole(name, value[0], low, 65536), check_whole(name, value[1], low, 65536)


def _real(name: str, value: Any) -> np.ndarray:
    """An array of finite real numbers as float32."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise PipelineError(f"{name} must be an array of real numbers ({error})") from error
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise PipelineError(f"{name} must be an array of real numbers, not {array.dtype} of shape {array.shape}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise PipelineError(f"{name} has values that are not finite")
    return array


@dataclasses.dataclass(frozen=True)
class Request:
    """The checked arguments of one call, and the sampler and plan that they ask for."""

    prompts: list[str]
    prompts_2: list[str]
    negative_prompts: list[str] | None
    negative_prompts_2: list[str] | None
    num_images_per_prompt: int
    solver: Sampler
    plan: Plan
    """Of the steps that are made: with a picture to begin with, the last ones."""
    whole: Plan
    """Of all steps."""
    start: int
    """How many steps are left out at the beginning."""
    guided: bool
    guidance_scale: tuple[float, ...]
    """One number, or two where text and identity are guided apart."""
    guidance_rescale: float
    negative_identity: tuple[float, int]
    """Strength and seed of the noise that stands for nobody."""
    scales: list[Strength]
    """Of each net."""
    ip_adapter_scale: Strength | None
    windows: list[tuple[float, float]]
    places: tuple[list[str], list[str]]
    """Names of IdentityNet's residuals and of the image adapter's layers."""
    guidance_window: tuple[float, float]
    cache_interval: int
    cache_branch: int
    control_interval: int
    tiling: Tiling | None
    clip_skip: int
    prompt_weighting: bool
    seed: int
    size: tuple[int | None, int | None]
    sizes: tuple[Any, ...]

    @property
    def batch(self) -> int:
        """Number of pictures."""
        return len(self.prompts) * self.num_images_per_prompt

    @classmethod
    def check(cls, config: ModelConfig, *, nets: int, **a: Any) -> Request:
        """Checks the pipeline's arguments (by the pipeline's names) for a model and its number of nets. Raises `PipelineError`."""
        prompts = _texts("prompt", a["prompt"])
        optional = {k: None if a[k] is None else _texts(k, a[k], len(prompts)) for k in ("prompt_2", "negative_prompt", "negative_prompt_2")}
        solver, whole = _solver(config, a["sampler"], a["sampler_options"], a["num_inference_steps"])
        start = _start(a["strength"], a["num_inference_steps"])
        plan = solver.plan(a["num_inference_steps"], start) if start else whole
        if a["output_type"] not in OUTPUT_TYPES:
            raise PipelineError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {a['output_type']!r}")
        if not isinstance(a["prompt_weighting"], bool):
            raise PipelineError(f"prompt_weighting must be True or False, not {a['prompt_weighting']!r}")
        if a["prompt_weighting"] and (optional["prompt_2"] or optional["negative_prompt_2"] or a["clip_skip"]):
            raise PipelineError(
                "prompt_2, negative_prompt_2 and clip_skip have no meaning with prompt_weighting, which feeds one text to both towers"
            )
        if optional["negative_prompt_2"] and optional["negative_prompt"] is None and config.force_zeros_for_empty_prompt:
            raise PipelineError(
                "negative_prompt_2 counts only together with negative_prompt, without which this model takes zeros; give negative_prompt too, or ''"
            )
        # clip_skip=n reads the states n layers before the last but one.
        layers = min(config.text_encoder.num_hidden_layers, config.text_encoder_2.num_hidden_layers)
        guidance = check_number("guidance_scale", a["guidance_scale"], 0, 100)
        apart = a["identity_guidance_scale"]
        # Guided alike, text and identity need no branch of their own.
        apart = None if apart is None or check_number("identity_guidance_scale", apart, 0, 100) == guidance else float(apart)
        places = control_places(config.identitynet), adapter_places(config.unet)
        scales = _per_net("controlnet_conditioning_scale", a["controlnet_conditioning_scale"], nets)
        scale = a["ip_adapter_scale"]
        for side in ("height", "width"):
            if a[side] is not None and check_whole(side, a[side], 64, 8192) % 8:
                raise PipelineError(f"{side} must be a multiple of 8, not {a[side]}")
        return cls(
            prompts=prompts,
            prompts_2=optional["prompt_2"] or prompts,
            negative_prompts=optional["negative_prompt"],
            negative_prompts_2=optional["negative_prompt_2"],
            num_images_per_prompt=check_whole("num_images_per_prompt", a["num_images_per_prompt"], 1, 4096),
            solver=solver,
            plan=plan,
            whole=whole,
            start=start,
            guided=guidance > 1 or apart is not None,
            guidance_scale=(guidance,) if apart is None else (guidance, apart),
            guidance_rescale=check_number("guidance_rescale", a["guidance_rescale"], 0, 1),
            negative_identity=(
                check_number("negative_identity_noise", a["negative_identity_noise"], 0, 10),
                check_whole("negative_identity_seed", a["negative_identity_seed"], 0, 2**32 - 1),
            ),
            scales=[check_strength("controlnet_conditioning_scale", s, plan.steps, places[0]) for s in scales],
            ip_adapter_scale=None if scale is None else check_strength("ip_adapter_scale", scale, plan.steps, places[1]),
            places=places,
            windows=_windows("control_guidance", a["control_guidance_start"], a["control_guidance_end"], nets),
            guidance_window=_windows("guidance", a["guidance_start"], a["guidance_end"], 1)[0],
            cache_interval=check_whole("cache_interval", a["cache_interval"], 1, 1000),
            cache_branch=check_whole("cache_branch_id", a["cache_branch_id"], 0, config.unet.num_skips - 1),
            control_interval=check_whole("control_interval", a["control_interval"], 1, 1000),
            tiling=_tiling(config.vae, a["vae_tiling"], a["vae_tile_size"]),
            clip_skip=check_whole("clip_skip", 0 if a["clip_skip"] is None else a["clip_skip"], 0, layers - 1),
            prompt_weighting=a["prompt_weighting"],
            seed=check_whole("seed", a["seed"], 0, 2**32 - 1),
            size=(a["height"], a["width"]),
            sizes=tuple(None if a[k] is None else _pair(k, a[k]) for k in _SIZES),
        )

    @property
    def branches(self) -> int:
        """How many times as long as the latents the batch of a step is."""
        return 1 + len(self.guidance_scale) if self.guided else 1

    @property
    def shortcuts(self) -> Shortcuts:
        """What the denoising program leaves out at all."""
        return Shortcuts(
            cache_branch=self.cache_branch if self.cache_interval > 1 else None,
            keep_control=self.control_interval > 1,
            guidance_window=self.guided and self.guidance_window != (0, 1),
        )

    def pace(self) -> Pace | None:
        """How it does so; None where it leaves out nothing. As in diffusers, windows are fractions of the model calls."""
        if self.shortcuts == Shortcuts():
            return None
        guidance = self.filled(control_window(self.plan.num_calls, *self.guidance_window) > 0)
        return Pace(jnp.int32(self.cache_interval), jnp.int32(self.control_interval), jnp.asarray(guidance))

    def filled(self, x: np.ndarray) -> np.ndarray:
        """An array with an item for each model call, its last one repeated up to the calls of a run from noise.

        So their number, which decides what is compiled, does not depend on the strength; calls beyond those of `plan` are not made.
        """
        return np.concatenate([x, np.repeat(x[-1:], self.whole.num_calls - len(x), axis=0)])

    def strengths(self, adapter: Any) -> tuple[np.ndarray, np.ndarray]:
        """Tables of the nets' strengths [calls, nets, sides, 1 or residuals], windows in them, and of the image adapter's [calls, sides,
        1 or layers], `filled`; `adapter` is its strength where the request has none. There are two sides, inside and outside of the
        control mask, where something is said of the outside.
        """
        steps = self.plan.steps
        adapter = self.ip_adapter_scale or check_strength("the scale of set_ip_adapter_scale", adapter, steps, self.places[1])
        sides = 2 if any(strength.outside for strength in (*self.scales, adapter)) else 1
        nets = np.stack(np.broadcast_arrays(*(scale.table(steps, self.places[0], sides) for scale in self.scales)), axis=1)
        # As in diffusers, windows are fractions of the model calls, of which Heun makes about two a step.
        windows = np.stack([control_window(self.plan.num_calls, start, end) for start, end in self.windows], axis=1)
        return self.filled(windows[:, :, None, None] * nets), self.filled(adapter.table(steps, self.places[1], sides))

    def negative_identities(self, embeddings: np.ndarray) -> np.ndarray:
        """What stands for nobody in the place of embeddings [n, d]: zeros, or with a strength that times noise that is even from 0 to 1."""
        strength, seed = self.negative_identity
        return (strength * np.random.default_rng(seed).random(embeddings.shape)).astype(np.float32)

    def seeds(self) -> np.ndarray:
        """One seed a picture: seed, seed + 1, ... (wrapping at 2**32)."""
        return (self.seed + np.arange(self.batch, dtype=np.int64)).astype(np.uint32)

    def time_ids(self, picture: tuple[int, int]) -> np.ndarray:
        """SDXL's six numbers, one row a branch of guidance (negative first); heights first.

        As in diffusers the negative ones count only where both negative sizes are given; without, they are the positive ones.
        """
        original, crop, target, negative_original, negative_crop, negative_target = self.sizes
        positive = (original or picture, crop or (0, 0), target or picture)
        both = negative_original is not None and negative_target is not None
        negative = (negative_original, negative_crop or (0, 0), negative_target) if both else positive
        rows = [negative] * self.guided + [positive] * (self.branches - self.guided)
        return np.asarray(rows, np.float32).reshape(len(rows), 6)

    def control_images(self, image: Any, multiple: int) -> list[np.ndarray]:
        """Control pictures as float32 [H, W, 3] in [0, 1], all of the output's size."""
        nets = len(self.scales)
        images = list(image) if isinstance(image, list | tuple) else [image]
        if len(images) != nets:
            raise PipelineError(f"image has {len(images)} pictures for {nets} nets (the keypoints for IdentityNet first)")
        checked = [check_picture("image", i) for i in images]
        first = checked[0]
        across, down = first.size if isinstance(first, Image.Image) else (first.shape[1], first.shape[0])
        height, width = self.size[0] or down // multiple * multiple, self.size[1] or across // multiple * multiple
        if min(height, width) < 64:
            raise PipelineError(f"the picture would be {width}x{height}; at least 64x64 is needed: give a larger image, or height and width")
        try:
            return [prepare_control_image(i, width, height) for i in checked]
        except FaceError as error:
            raise PipelineError(f"image: {error}") from error

    def embeddings(self, value: Any, width: int) -> np.ndarray:
        """The face embedding [d]; several of one person are averaged, as in the paper."""
        array = _real("image_embeds", value)
        if array.shape[-1:] != (width,) or array.ndim > 3:
            raise PipelineError(
                f"image_embeds has shape {array.shape}; this model's recogniser gives vectors of {width}: [{width}] or [photos, {width}]"
            )
        array = array.reshape(-1, width)
        if not len(array) or not np.linalg.norm(array, axis=-1).all():
            raise PipelineError("image_embeds is a zero vector, which is what stands for nobody")
        return array.mean(axis=0)

    def latents(self, value: Any, shape: Sequence[int]) -> np.ndarray:
        """Given noise [b, h, w, c]."""
        array = _real("latents", value)
        if array.shape != (self.batch, *shape):
            raise PipelineError(f"latents has shape {array.shape}; this call needs {(self.batch, *shape)} (batch, height/8, width/8, channels)")
        return array

    def mask(self, value: Any, size: tuple[int, int], name: str = "control_mask") -> np.ndarray | None:
        """A mask, called `name`, as float32 [H, W] in [0, 1]; four numbers are a box (`face.box_mask`)."""
        if value is None:
            return None
        if np.shape(value) == (4,):
            try:
                return box_mask((size[1], size[0]), value, name).astype(np.float32) / np.float32(255)
            except FaceError as error:
                raise PipelineError(str(error)) from error
        given = np.asarray(value.convert("RGB") if isinstance(value, Image.Image) else value)
        array = _real(name, given.astype(np.uint8) * 255 if given.dtype == bool else given)
        if array.shape[:2] != size or array.shape[2:] not in ((), (1,), (3,)):
            raise PipelineError(f"{name} has shape {array.shape}, the picture is {size}: [height, width], or the same with 1 or 3 channels")
        array = array[..., 0] if array.ndim == 3 else array
        whole = given.dtype in (np.uint8, bool) or (given.dtype.kind in "iu" and array.max() > 1)
        array = array / np.float32(255 if whole else 1)
        if array.min() < 0 or array.max() > 1:
            raise PipelineError(f"{name} must hold whole numbers from 0 to 255 or numbers from 0.0 to 1.0, not {given.min()} to {given.max()}")
        return array


def _solver(config: ModelConfig, name: Any, options: Any, steps: Any) -> tuple[Sampler, Plan]:
    """The sampler and its plan."""
    if options is not None and not (isinstance(options, Mapping) and all(isinstance(key, str) for key in options)):
        raise PipelineError(f"sampler_options must be a dict of option names and values, not {options!r}")
    if not isinstance(name, str):
        raise PipelineError(f"sampler must be a name, not {name!r}")
    steps = check_whole("num_inference_steps", steps, 1, 1000)
    try:
        solver = make_sampler(name, config.scheduler, **(options or {}))
        return solver, solver.plan(steps)
    except SamplerError as error:
        raise PipelineError(str(error)) from error


def _start(strength: Any, steps: int) -> int:
    """How many of the steps are left out; None is none. As in diffusers, int(steps * strength) are made."""
    if strength is None:
        return 0
    made = min(int(steps * check_number("strength", strength, 0, 1)), steps)
    if made < 1:
        raise PipelineError(f"strength must be at least {1 / steps:.3g} with {steps} steps, so that one of them is made, not {strength:g}")
    return steps - made


def _windows(name: str, start: Any, end: Any, nets: int) -> list[tuple[float, float]]:
    """(start, end) of each net; the arguments are called `name`_start and `name`_end."""
    given = {f"{name}_start": start, f"{name}_end": end}
    starts, ends = ([check_number(key, v, 0, 1) for v in _per_net(key, value, nets)] for key, value in given.items())
    for begin, stop in zip(starts, ends, strict=True):
        if begin >= stop:
            raise PipelineError(f"{name}_start {begin:g} must be smaller than {name}_end {stop:g}")
    return list(zip(starts, ends, strict=True))


def _tiling(config: AutoencoderConfig, layout: Any, size: Any) -> Tiling | None:
    """How to decode in tiles; None is not at all."""
    if layout is None:
        if size is not None:
            raise PipelineError("vae_tile_size has no meaning without vae_tiling: give one of 'even' and 'diffusers'")
        return None
    if layout not in ("even", "diffusers"):
        raise PipelineError(f"vae_tiling must be 'even', 'diffusers' or None, not {layout!r}")
    unit = 4 * config.downscale
    if size is None:
        return Tiling(layout, -(-config.sample_size // unit) * unit)
    if check_whole("vae_tile_size", size, unit, 8192) % unit:
        raise PipelineError(f"vae_tile_size must be a multiple of {unit}, not {size}")
    return Tiling(layout, int(size))


def check_picture(name: str, value: Any) -> Image.Image | np.ndarray:
    """A PIL picture in RGB, or an array [h, w, 3]: uint8 as it is, else float32 in [0, 1]."""
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    array = value if isinstance(value, np.ndarray) and value.dtype == np.uint8 else _real(name, value)
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
        raise PipelineError(f"{name} must be a picture [height, width, 3], not shape {array.shape}")
    if array.dtype != np.uint8 and (array.min() < 0 or array.max() > 1):
        raise PipelineError(f"{name} must be uint8, or float in [0, 1]")
    return array
