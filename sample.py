"""Makes pictures of a person from one photo and a prompt.

With no arguments: rendered people, drawn by the small model that comes along.

With converted weights: python sample.py --weights DIR --face me.jpg --prompt "film noir"
"""

from __future__ import annotations

import functools
import os
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro
from jax.errors import JaxRuntimeError

from instantid_jax import __version__
from instantid_jax.defaults import DEFAULT_WEIGHTS, NOTICE, default_config, default_pipeline, framed
from instantid_jax.demo import count_people, draw_people, save_sheet
from instantid_jax.face import FaceError, Identity, load_analyzer, load_photo
from instantid_jax.options import check_folder, status_of, wrong_options
from instantid_jax.output import save_run, weights_digest
from instantid_jax.pipeline import InstantIDPipeline, check_call, read_config
from instantid_jax.progress import CompileSeconds, StepBar
from instantid_jax.references import check_files, keypoint_picture, read_identity, read_mask
from instantid_jax.request import in_options
from instantid_jax.sample_options import SampleOptions

ELSEWHERE = ("out", "num_images", "face", "pose", "control_image", "control_mask")
"""Options that are not stored as settings: names and hashes of the files tell them."""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = tyro.cli(SampleOptions, args=arguments, description=__doc__)
    warnings.showwarning = lambda message, *_: print(f"sample.py: {in_options(str(message))}", file=sys.stderr)
    try:
        print("\n".join(map(str, run(options))), flush=True)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"sample.py: {in_options(str(error))}", file=sys.stderr)
        return status_of(error)
    except (MemoryError, JaxRuntimeError) as error:
        if isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("sample.py: out of memory; try smaller --height and --width, fewer --num-images, or --dtype bfloat16", file=sys.stderr)
        return 1
    return 0


def run(given: SampleOptions) -> list[Path]:
    """Photo to pictures: first everything that can be checked or fails quickly, then the weights. One clear sentence for what is wrong."""
    with wrong_options():
        given.check()
        s = given.filled()
        call = s.call()
    check_files([*s.face, *s.control_image, *filter(None, (s.pose, s.control_mask))])
    check_folder(s.out)
    config = default_config() if s.weights is None else read_config(s.weights)
    with wrong_options():
        request = check_call(config, nets=1 + len(s.controlnet), **call)
    analyzer = functools.cache(lambda: load_analyzer(s.analyzer or config.face_analyzer, s.analyzer_root))
    try:
        pose = read_identity((s.pose,), analyzer, face_index=s.pose_face_index) if s.pose else None
    except FaceError as error:
        raise ValueError(str(error).replace("--face-index", "--pose-face-index")) from error
    if s.is_demo:
        identity, backend = None, analyzer()
    else:
        identity = read_identity(s.face, analyzer, config.resampler.embedding_dim, s.face_index)
        call |= _pictures(s, config.keypoint_scale, pose or identity) | {"image_embeds": identity.embedding}
    if s.weights is None:
        print(NOTICE, file=sys.stderr)
        pipe = default_pipeline(dtype=s.dtype)
    else:
        pipe = InstantIDPipeline.from_pretrained(s.weights, dtype=s.dtype, controlnets=s.controlnet)
    about = {"model": "the small model" if s.weights is None else s.weights.resolve().name, "version": f"instantid_jax {__version__}"}
    about |= weights_digest(s.weights or DEFAULT_WEIGHTS)
    settings = {name: value for name, value in asdict(s).items() if name not in ELSEWHERE} | about
    began = time.perf_counter()
    with StepBar(request.plan.num_calls * (count_people() if s.is_demo else 1)) as bar, CompileSeconds() as compiling:
        if identity is None:
            sheet = draw_people(pipe, backend, call | {"prompt": given.prompt}, pose, bar.on_step)
            count, save = len(sheet.rows) * len(sheet.prompts), functools.partial(save_sheet, s.out, sheet, settings)
        else:
            images = pipe(**call, on_step=bar.on_step).images
            count, save = len(images), functools.partial(_save, s, images, call["image"][0], settings)
        seconds = time.perf_counter() - began
    print(f"compiled in {compiling.total:.1f} s, made {count} picture(s) in {seconds - compiling.total:.1f} s")
    return save()


def _pictures(s: SampleOptions, keypoint_scale: float, pose: Identity) -> dict[str, Any]:
    """The pictures that go in: keypoints, those of other ControlNets, and the mask."""
    if s.weights is None:
        keypoints = keypoint_picture(pose, s.width, s.height, 64, keypoint_scale, framed)
    else:
        keypoints = keypoint_picture(pose, s.width, s.height, 1280, keypoint_scale)
    mask = None if s.control_mask is None else read_mask(s.control_mask, keypoints.size)
    return {"image": [keypoints, *(load_photo(path) for path in s.control_image)], "control_mask": mask}


def _save(s: SampleOptions, images: list[Any], keypoints: Any, settings: dict[str, Any]) -> list[Path]:
    """Pictures and contact sheet with every setting inside."""
    inputs = {"face": s.face, "pose": (s.pose,) if s.pose else (), "control": s.control_image}
    inputs["mask"] = (s.control_mask,) if s.control_mask else ()
    return save_run(s.out, images, keypoints, inputs, settings)


if __name__ == "__main__":
    raise SystemExit(main())
