"""Makes pictures of a person from one photo and a prompt.

With no arguments: a small random model on a real photo.

With converted weights: python sample.py --weights DIR --face me.jpg --prompt "film noir"
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from instantid_jax import __version__
from instantid_jax.defaults import NOTICE, default_photo, default_pipeline
from instantid_jax.face import load_analyzer
from instantid_jax.output import save_run
from instantid_jax.pipeline import InstantIDPipeline
from instantid_jax.progress import CompileSeconds, StepBar
from instantid_jax.references import keypoint_picture, read_identity


@dataclass(frozen=True)
class Settings:
    """Pictures of a person from one photo and a prompt."""

    weights: Path | None = None
    """Folder that `python -m convert_weights import` wrote; without it a small random model."""
    face: tuple[Path, ...] = ()
    """One photo of the person or several (their embeddings are averaged), or one .npz/.npy with a face vector and keypoints."""
    pose: Path | None = None
    """Photo (or .npz) whose keypoints give the pose; the first face photo's by default."""
    prompt: str = "analog film photo of a person, highly detailed"
    """What to make."""
    negative_prompt: str | None = None
    """What to avoid. Leaving it out is not the same as an empty text."""
    prompt_weighting: bool = False
    """Read (word:1.2), [word] and BREAK in prompts, and prompts of any length."""
    num_images: int = 1
    """How many pictures; picture i has seed + i."""
    seed: int = 0
    """Seed of the first picture."""
    steps: int = 30
    """Denoising steps."""
    sampler: str = "euler"
    """euler, euler_a, heun, ddim, dpmpp_2m, dpmpp_2m_karras, dpmpp_2m_sde, unipc or lcm."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; 1 or less switches it off."""
    guidance_rescale: float = 0.0
    """Against over-saturation, 0 to 1."""
    identitynet_scale: float = 0.8
    """Strength of IdentityNet: keypoints and likeness."""
    ip_adapter_scale: float = 0.8
    """Strength of the image adapter: facial detail. Lower it first when colours burn."""
    control_start: float = 0.0
    """Fraction of the steps at which IdentityNet begins to act."""
    control_end: float = 1.0
    """Fraction of the steps at which IdentityNet stops acting."""
    height: int | None = None
    """Height in pixels, a multiple of 8; by default from the pose photo, its long side 1280 (128 with the random model)."""
    width: int | None = None
    """Width, likewise."""
    face_index: int | None = None
    """Which face to take, counted from 0 from the left, when a photo shows several."""
    analyzer: str | None = None
    """Face backend: antelopev2 or opencv; by default the one that the weights were trained with."""
    analyzer_root: Path | None = None
    """Folder of the antelopev2 model files."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    out: Path = Path("outputs")
    """Folder for the pictures and the contact sheet."""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    settings = tyro.cli(Settings, args=arguments, description=__doc__)
    warnings.showwarning = lambda message, *_: print(f"sample.py: {message}", file=sys.stderr)
    try:
        run(settings)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 1
    return 0


def run(s: Settings) -> None:
    """Photo to pictures. Raises ValueError or OSError with one clear sentence."""
    if s.weights is None:
        print(NOTICE, file=sys.stderr)
        pipe, faces, long_side = default_pipeline(), s.face or (default_photo(),), 128
    else:
        pipe, faces, long_side = InstantIDPipeline.from_pretrained(s.weights, dtype=s.dtype), s.face, 1280
        if not faces:
            raise ValueError("no --face given: name a photo of the person")
    analyzer = load_analyzer(s.analyzer or pipe.config.face_analyzer, s.analyzer_root)
    identity = read_identity(faces, analyzer, s.face_index)
    keypoints = keypoint_picture(read_identity((s.pose,), analyzer, s.face_index) if s.pose else identity, s.width, s.height, long_side)
    began = time.perf_counter()
    with StepBar(pipe.num_calls(s.sampler, s.steps)) as bar, CompileSeconds() as compiling:
        images = pipe(
            s.prompt, keypoints, identity.embedding, negative_prompt=s.negative_prompt, prompt_weighting=s.prompt_weighting,
            num_images_per_prompt=s.num_images, seed=s.seed, num_inference_steps=s.steps, sampler=s.sampler, guidance_scale=s.guidance_scale,
            guidance_rescale=s.guidance_rescale, controlnet_conditioning_scale=s.identitynet_scale, ip_adapter_scale=s.ip_adapter_scale,
            control_guidance_start=s.control_start, control_guidance_end=s.control_end, height=s.height, width=s.width, on_step=bar.on_step,
        ).images  # fmt: skip
        seconds = time.perf_counter() - began
    about = {"model": s.weights.name if s.weights else "random weights", "version": f"instantid_jax {__version__}"}
    paths = save_run(s.out, images, keypoints, faces, asdict(s) | about)
    print(f"compiled in {compiling.total:.1f} s, made {len(images)} picture(s) in {seconds - compiling.total:.1f} s")
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    raise SystemExit(main())
