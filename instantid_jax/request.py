"""Checking of everything a caller of the pipeline gives, before anything is compiled: one clear sentence for each mistake."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from instantid_jax.diffusion import SAMPLERS

_SIZES = ("original_size", "crops_coords_top_left", "target_size")
_SIZES += tuple(f"negative_{name}" for name in _SIZES)
# The pipeline's arguments that can be checked without knowing the size of the picture.
CHECKED = (
    *("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "prompt_weighting", "clip_skip", "num_images_per_prompt", "seed"),
    *("height", "width", "num_inference_steps", "sampler", "output_type", "guidance_scale", "guidance_rescale", "ip_adapter_scale"),
    *("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", *_SIZES),
)
OUTPUT_TYPES = ("pil", "np", "latent")


class PipelineError(ValueError):
    """An argument of the pipeline that cannot be used; the message names it, its value and what is needed."""


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer) or not math.isfinite(value):
        raise PipelineError(f"{name} must be a finite number, not {value!r}")
    if not low <= value <= high:
        raise PipelineError(f"{name} must be between {low:g} and {high:g}, not {value:g}")
    return float(value)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise PipelineError(f"{name} must be a whole number, not {value!r}")
    return int(_number(name, int(value), low, high))


def _texts(name: str, value: Any, count: int | None = None) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else None
    if not texts or not all(isinstance(t, str) for t in texts):
        raise PipelineError(f"{name} must be a text or a list of texts, not {value!r}")
    if count is not None and len(texts) == 1:
        texts = texts * count
    if count is not None and len(texts) != count:
        raise PipelineError(f"{name} has {len(texts)} texts, prompt has {count}")
    return texts


def _per_net(name: str, value: Any, nets: int, low: float, high: float) -> list[float]:
    values = list(value) if isinstance(value, list | tuple | np.ndarray) else [value] * nets
    if len(values) != nets:
        raise PipelineError(f"{name} has {len(values)} values for {nets} nets (IdentityNet first)")
    return [_number(name, v, low, high) for v in values]


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PipelineError(f"{name} must be two whole numbers (height or top first), not {value!r}")
    return _whole(name, value[0], -65536, 65536), _whole(name, value[1], -65536, 65536)


@dataclasses.dataclass(frozen=True)
class Request:
    """The checked arguments of one call."""

    prompts: list[str]
    prompts_2: list[str]
    negative_prompts: list[str] | None
    negative_prompts_2: list[str] | None
    num_images_per_prompt: int
    num_inference_steps: int
    guided: bool
    scales: list[float]
    ip_adapter_scale: float | None
    windows: list[tuple[float, float]]
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
    def check(cls, *, nets: int, **a: Any) -> Request:
        """Checks the pipeline's arguments (by the pipeline's names). Raises `PipelineError`."""
        prompts = _texts("prompt", a["prompt"])
        optional = {k: None if a[k] is None else _texts(k, a[k], len(prompts)) for k in ("prompt_2", "negative_prompt", "negative_prompt_2")}
        if a["sampler"] not in SAMPLERS:
            near = difflib.get_close_matches(str(a["sampler"]), list(SAMPLERS), n=1)
            raise PipelineError(
                f"sampler {a['sampler']!r} is unknown" + (f"; did you mean {near[0]!r}?" if near else "") + f" Known: {', '.join(SAMPLERS)}"
            )
        if a["output_type"] not in OUTPUT_TYPES:
            raise PipelineError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {a['output_type']!r}")
        if a["prompt_weighting"] and (optional["prompt_2"] or optional["negative_prompt_2"] or a["clip_skip"]):
            raise PipelineError(
                "prompt_2, negative_prompt_2 and clip_skip have no meaning with prompt_weighting, which feeds one text to both towers"
            )
        starts = _per_net("control_guidance_start", a["control_guidance_start"], nets, 0, 1)
        ends = _per_net("control_guidance_end", a["control_guidance_end"], nets, 0, 1)
        for start, end in zip(starts, ends, strict=True):
            if start >= end:
                raise PipelineError(f"control_guidance_start {start:g} must be smaller than control_guidance_end {end:g}")
        scale = a["ip_adapter_scale"]
        _number("guidance_rescale", a["guidance_rescale"], 0, 1)
        for side in ("height", "width"):
            if a[side] is not None and _whole(side, a[side], 64, 8192) % 8:
                raise PipelineError(f"{side} must be a multiple of 8, not {a[side]}")
        pairs = [None if a[k] is None else _pair(k, a[k]) for k in _SIZES]
        return cls(
            prompts=prompts,
            prompts_2=optional["prompt_2"] or prompts,
            negative_prompts=optional["negative_prompt"],
            negative_prompts_2=optional["negative_prompt_2"],
            num_images_per_prompt=_whole("num_images_per_prompt", a["num_images_per_prompt"], 1, 4096),
            num_inference_steps=_whole("num_inference_steps", a["num_inference_steps"], 1, 1000),
            guided=_number("guidance_scale", a["guidance_scale"], 0, 100) > 1,
            scales=_per_net("controlnet_conditioning_scale", a["controlnet_conditioning_scale"], nets, -10, 10),
            ip_adapter_scale=None if scale is None else _number("ip_adapter_scale", scale, -10, 10),
            windows=list(zip(starts, ends, strict=True)),
            clip_skip=_whole("clip_skip", a["clip_skip"], 0, 10),
            prompt_weighting=bool(a["prompt_weighting"]),
            seed=_whole("seed", a["seed"], 0, 2**32 - 1),
            size=(a["height"], a["width"]),
            sizes=tuple(pairs),
        )

    def seeds(self) -> np.ndarray:
        """One seed a picture: seed, seed + 1, ... (wrapping at 2**32)."""
        return (self.seed + np.arange(self.batch, dtype=np.int64)).astype(np.uint32)

    def time_ids(self, picture: tuple[int, int]) -> np.ndarray:
        """SDXL's six numbers, [2, 6] with guidance (negative first) else [1, 6]; heights first."""
        original, crop, target, *negative = self.sizes
        positive = (original or picture, crop or (0, 0), target or picture)
        rows = [positive]
        if self.guided:
            rows.insert(0, tuple(n if n is not None else p for n, p in zip(negative, positive, strict=True)))  # type: ignore[arg-type]
        return np.asarray(rows, np.float32).reshape(len(rows), 6)

    def control_images(self, image: Any, prepare: Callable[..., np.ndarray], multiple: int) -> list[np.ndarray]:
        """Control pictures as float32 [H, W, 3] in [0, 1], all of the output's size."""
        nets = len(self.scales)
        images = list(image) if isinstance(image, list | tuple) else [image]
        if len(images) != nets:
            raise PipelineError(f"image has {len(images)} pictures for {nets} nets (the keypoints for IdentityNet first)")
        checked = [_picture("image", i) for i in images]
        height = self.size[0] or checked[0].size[1] // multiple * multiple
        width = self.size[1] or checked[0].size[0] // multiple * multiple
        if min(height, width) < 64:
            raise PipelineError(f"the picture would be {width}x{height}; at least 64x64 is needed: give a larger image, or height and width")
        return [prepare(i, width, height) for i in checked]

    def embeddings(self, value: Any, width: int) -> np.ndarray:
        """The face embedding [d]; several of one person are averaged, as in the paper."""
        array = np.asarray(value, np.float32)
        if array.shape[-1:] != (width,) or array.ndim > 3:
            raise PipelineError(
                f"image_embeds has shape {array.shape}; this model's recogniser gives vectors of {width}: [{width}] or [photos, {width}]"
            )
        array = array.reshape(-1, width)
        if not np.isfinite(array).all():
            raise PipelineError("image_embeds has values that are not finite")
        if not np.linalg.norm(array, axis=-1).all():
            raise PipelineError("image_embeds is a zero vector, which is what stands for nobody")
        return array.mean(axis=0)

    def latents(self, value: Any, shape: Sequence[int]) -> np.ndarray:
        """Given noise [b, h, w, c]."""
        array = np.asarray(value, np.float32)
        if array.shape != (self.batch, *shape):
            raise PipelineError(f"latents has shape {array.shape}; this call needs {(self.batch, *shape)} (batch, height/8, width/8, channels)")
        return array

    def mask(self, value: Any, size: tuple[int, int]) -> np.ndarray | None:
        """The control mask as float32 [H, W] in [0, 1]."""
        if value is None:
            return None
        array = np.asarray(value.convert("RGB") if isinstance(value, Image.Image) else value)
        array = array[..., 0] if array.ndim == 3 else array
        if array.shape != size:
            raise PipelineError(f"control_mask is {array.shape[:2]}, the picture is {size} (height, width)")
        array = array.astype(np.float32) / (255 if array.dtype == np.uint8 else 1)
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise PipelineError("control_mask must lie in [0, 1], or be uint8")
        return array


def _picture(name: str, value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    array = np.asarray(value)
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
        raise PipelineError(f"{name} must be a picture [height, width, 3], not shape {array.shape}")
    if array.dtype != np.uint8:
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise PipelineError(f"{name} must be uint8, or float in [0, 1]")
        array = np.round(array * 255).astype(np.uint8)
    return Image.fromarray(array)
