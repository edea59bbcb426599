"""Makes pictures of a person from one photo and a prompt.

With no arguments: a small random model on a real photo.

With converted weights: python sample.py --weights DIR --face me.jpg --prompt "film noir"
"""

from __future__ import annotations

import functools
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from jax.errors import JaxRuntimeError

from instantid_jax import __version__
from instantid_jax.defaults import NOTICE, default_config, default_photo, default_pipeline
from instantid_jax.face import load_analyzer, load_photo
from instantid_jax.output import check_folder, save_run
from instantid_jax.pipeline import InstantIDPipeline, check_call, read_config
from instantid_jax.progress import CompileSeconds, StepBar
from instantid_jax.references import check_files, keypoint_picture, read_identity, read_mask
from instantid_jax.request import in_options, read_sampler_options

SamplerName = Literal["euler", "euler_a", "heun", "ddim", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "unipc", "lcm"]


@dataclass(frozen=True)
class Settings:
    """Pictures of a person from one photo and a prompt."""

    weights: Path | None = None  # Folder that `python -m convert_weights import` wrote; without it a small random model.
    face: tuple[Path, ...] = ()  # One photo of the person or several (averaged), or one .npz/.npy with a face vector and keypoints.
    pose: Path | None = None  # Photo (or .npz) whose keypoints give the pose; the first face photo's by default.
    prompt: str = "analog film photo of a person, highly detailed"  # What to make.
    negative_prompt: str | None = None  # What to avoid. Leaving it out is not the same as an empty text.
    prompt_weighting: bool = False  # Read (word:1.2), [word] and BREAK in prompts, and prompts of any length.
    num_images: int = 1  # How many pictures; picture i has seed + i.
    seed: int = 0  # Seed of the first picture.
    steps: int = 30  # Denoising steps.
    sampler: SamplerName = "euler"  # How to go from noise to a picture.
    sampler_option: tuple[str, ...] = ()  # The sampler's own options as key=value: karras=true, eta=0.5, final_sigmas_type=sigma_min.
    guidance_scale: float = 5.0  # Classifier-free guidance; 1 or less switches it off.
    guidance_rescale: float = 0.0  # Against over-saturation, 0 to 1.
    clip_skip: int = 0  # Text layers to leave out, counted from the last but one.
    identitynet_scale: float = 0.8  # Strength of IdentityNet: keypoints and likeness.
    ip_adapter_scale: float = 0.8  # Strength of the image adapter: facial detail. Lower it first when colours burn.
    control_start: float = 0.0  # Fraction of the steps at which IdentityNet (and other ControlNets) begin to act.
    control_end: float = 1.0  # Fraction of the steps at which they stop acting.
    control_mask: Path | None = None  # Picture that is white where IdentityNet and the image adapter act, black where they do not.
    controlnet: tuple[Path, ...] = ()  # Other ControlNets, folders that `python -m convert_weights import --controlnet` wrote.
    control_image: tuple[Path, ...] = ()  # One picture (depth, edges, ...) for each --controlnet.
    control_scale: tuple[float, ...] = ()  # One strength for each --controlnet; 1 by default.
    height: int | None = None  # Pixels, a multiple of 8; by default from the pose photo, its long side 1280 (128 with the random model).
    width: int | None = None  # Width, likewise.
    face_index: int | None = None  # Which face to take, counted from 0 from the left, when a photo shows several.
    analyzer: Literal["antelopev2", "opencv"] | None = None  # Face backend; by default the one that the weights were trained with.
    analyzer_root: Path | None = None  # Folder of the antelopev2 model files.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # Type of weights and arithmetic.
    out: Path = Path("outputs")  # Folder for the pictures and the contact sheet.


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    settings = tyro.cli(Settings, args=arguments, description=__doc__)
    warnings.showwarning = lambda message, *_: print(f"sample.py: {in_options(str(message))}", file=sys.stderr)
    try:
        run(settings)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"sample.py: {in_options(str(error))}", file=sys.stderr)
        return 1
    except (MemoryError, JaxRuntimeError) as error:
        if isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("sample.py: out of memory; try smaller --height and --width, fewer --num-images, or --dtype bfloat16", file=sys.stderr)
        return 1
    return 0


def run(s: Settings) -> None:
    """Photo to pictures: first everything that can be checked or fails quickly, then the weights. One clear sentence for what is wrong."""
    if len(s.control_image) != len(s.controlnet) or len(s.control_scale) not in (0, len(s.controlnet)):
        raise ValueError("--control-image and --control-scale go with --controlnet: one of each for every ControlNet")
    check_files([*s.face, *s.control_image, *filter(None, (s.pose, s.control_mask))])
    check_folder(s.out)
    if s.weights is None and s.controlnet:
        raise ValueError("--controlnet needs --weights: the random model has no other ControlNets")
    if s.weights is not None and not s.face:
        raise ValueError("no --face given: name a photo of the person")
    config = default_config() if s.weights is None else read_config(s.weights)
    call: dict[str, Any] = {key: getattr(s, key) for key in ("prompt", "negative_prompt", "prompt_weighting", "seed", "sampler", "clip_skip")}
    call |= {key: getattr(s, key) for key in ("guidance_scale", "guidance_rescale", "ip_adapter_scale", "height", "width")}
    call |= {"num_images_per_prompt": s.num_images, "num_inference_steps": s.steps, "sampler_options": read_sampler_options(s.sampler_option)}
    call |= {"control_guidance_start": s.control_start, "control_guidance_end": s.control_end}
    call["controlnet_conditioning_scale"] = [s.identitynet_scale, *(s.control_scale or (1.0,) * len(s.controlnet))]
    request = check_call(config, nets=1 + len(s.controlnet), **call)

    faces, long_side = (s.face or (default_photo(),), 128) if s.weights is None else (s.face, 1280)
    analyzer = functools.cache(lambda: load_analyzer(s.analyzer or config.face_analyzer, s.analyzer_root))
    identity = read_identity(faces, analyzer, config.resampler.embedding_dim, s.face_index)
    pose = read_identity((s.pose,), analyzer, face_index=s.face_index) if s.pose else identity
    keypoints = keypoint_picture(pose, s.width, s.height, long_side)
    images = [keypoints, *(load_photo(path) for path in s.control_image)]
    mask = None if s.control_mask is None else read_mask(s.control_mask, keypoints.size)
    if s.weights is None:
        print(NOTICE, file=sys.stderr)
        pipe = default_pipeline(dtype=s.dtype)
    else:
        pipe = InstantIDPipeline.from_pretrained(s.weights, dtype=s.dtype, controlnets=s.controlnet)
    began = time.perf_counter()
    with StepBar(request.plan.num_calls) as bar, CompileSeconds() as compiling:
        made = pipe(image=images, image_embeds=identity.embedding, control_mask=mask, on_step=bar.on_step, **call).images
        seconds = time.perf_counter() - began
    about = {"model": s.weights.resolve().name if s.weights else "random weights", "version": f"instantid_jax {__version__}"}
    inputs = {"face": faces, "pose": (s.pose,) if s.pose else (), "control": s.control_image}
    inputs["mask"] = (s.control_mask,) if s.control_mask else ()
    elsewhere = ("out", "num_images", "face", "pose", "control_image", "control_mask")  # in the names and hashes of the files
    paths = save_run(s.out, made, keypoints, inputs, {k: v for k, v in asdict(s).items() if k not in elsewhere} | about)
    print(f"compiled in {compiling.total:.1f} s, made {len(made)} picture(s) in {seconds - compiling.total:.1f} s")
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    raise SystemExit(main())
