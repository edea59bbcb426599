"""Makes pictures of a person from one photo and a prompt.

With no arguments: rendered people, drawn by the small model that comes along.

With converted weights: python sample.py --weights DIR --face me.jpg --prompt "film noir"
Many people, prompts and seeds, on many devices: python sample.py --jobs jobs.jsonl (docs/jobs.md)
Exit status: 0 all made, 1 an error, 2 a wrong option; of --jobs also 3 some failed, 75 stopped by a signal: the same command goes on.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import warnings
from pathlib import Path

import tyro
from jax.errors import JaxRuntimeError

from convert_weights.lora import read_loras
from instantid_jax.config import ComputeConfig, sdxl
from instantid_jax.demo import count_people, draw_people, save_sheet
from instantid_jax.face import FaceError, load_analyzer
from instantid_jax.jobs import run_jobs
from instantid_jax.options import OptionError, check_folder, status_of, wrong_options
from instantid_jax.output import save_run
from instantid_jax.parallel.distributed import leave
from instantid_jax.pipeline import check_call, read_config
from instantid_jax.progress import CompileSeconds, StepBar
from instantid_jax.references import photos_table, read_identity
from instantid_jax.request import in_options
from instantid_jax.running import keep_compiled
from instantid_jax.sample_edits import count_calls, initial_of, on_initial_canvas, refined, unchanged
from instantid_jax.sample_options import SampleOptions, gathered
from instantid_jax.sampling import conditions_of, group_conditions, inputs_of, model_config, open_pipeline, read_people, settings_of
from instantid_jax.variants import draw_variants, save_variants, variants_of


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = tyro.cli(SampleOptions, args=gathered(arguments), description=__doc__)
    keep_compiled()
    warnings.showwarning = lambda message, *_: print(f"sample.py: {in_options(str(message))}", file=sys.stderr)
    try:
        if options.aot is not None:
            print(_plan_table(options))
            return 0
        if options.jobs is not None:
            return run_jobs(options)
        print("\n".join(map(str, run(options))), flush=True)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"sample.py: {error if options.jobs else in_options(str(error))}", file=sys.stderr)
        return leave(status_of(error))
    except (MemoryError, JaxRuntimeError) as error:
        if isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        instead = "smaller --height and --width, fewer --num-images, --dtype bfloat16, --weights-dtype int8, or --vae-tiling even"
        print(f"sample.py: out of memory; try {instead}", file=sys.stderr)
        return leave(1)
    return 0


def run(given: SampleOptions) -> list[Path]:
    """Photo to pictures: first everything that can be checked or fails quickly, then the weights. One clear sentence for what is wrong."""
    with wrong_options():
        given.check()
        s = given.filled()
        call = s.call()
    listed = read_people(s)
    if s.is_demo and s.control_mask is not None:
        raise OptionError("--control-mask has no meaning for the people who come along; name a photo with --face")
    check_folder(s.out)
    s = on_initial_canvas(s)
    call = s.call() | initial_of(s)
    config = model_config(s)
    loras = read_loras(s.lora, config, s.allow_unknown_lora_keys)
    with wrong_options():
        request = check_call(config, nets=1 + len(s.controlnet), **s.call())
    analyzer = functools.cache(lambda: load_analyzer(s.analyzer or config.face_analyzer, s.analyzer_root))
    try:
        place = s.pose or (s.init_image if listed is None else None)
        pose = read_identity((place,), analyzer, face_index=s.pose_face_index) if place else None
    except FaceError as error:
        raise ValueError(str(error).replace("--face-index", "--pose-face-index")) from error
    keypoints, variants = None, []
    if listed is not None:
        conditions, keypoints = group_conditions(s, config, listed, analyzer)
        call |= conditions
    elif s.is_demo:
        analyzer()  # a missing one is told before the weights are read
    else:
        identity = read_identity(s.face, analyzer, config.resampler.embedding_dim, s.face_index, s.face_combine, s.face_weight or None)
        print(photos_table(identity), end="\n" if len(identity.reports) > 1 else "")
        variants = variants_of(s, config, identity, analyzer)
        drawn = variants[0].change.get("image") if variants else None
        call |= conditions_of(s, config.keypoint_scale, pose or identity, drawn) | {"image_embeds": identity.embedding}
        keypoints = call["image"][0]
    pipe = open_pipeline(s, loras)
    settings = settings_of(s, loras=loras)
    began = time.perf_counter()
    with StepBar(count_calls(s, config, request, count_people() if s.is_demo else len(variants) or 1)) as bar, CompileSeconds() as compiling:
        if keypoints is None:
            sheet = draw_people(pipe, analyzer(), call | {"prompt": given.prompt}, pose, bar.on_step)
            count, save = len(sheet.rows) * len(sheet.prompts), functools.partial(save_sheet, s.out, sheet, settings)
        elif variants:
            rows = draw_variants(pipe, call, variants, bar.on_step)
            if s.refine_face:
                rows = [refined(pipe, s, call | v.change, row, analyzer(), bar.on_step) for v, row in zip(variants, rows, strict=True)]
            count, save = sum(map(len, rows)), functools.partial(save_variants, s.out, variants, rows, inputs_of(s), settings)
        else:
            images = unchanged(s) or pipe(**call, on_step=bar.on_step).images
            images = refined(pipe, s, call, images, analyzer(), bar.on_step) if s.refine_face else images
            count, save = len(images), functools.partial(save_run, s.out, images, keypoints, inputs_of(s, listed), settings)
        seconds = time.perf_counter() - began
    print(f"compiled in {compiling.total:.1f} s, made {count} picture(s) in {seconds - compiling.total:.1f} s")
    return save()


def _plan_table(s: SampleOptions) -> str:
    """What sampling would need on the TPUs of `SampleOptions.aot`: of the weights' model, or of SDXL; nothing is read but its configuration."""
    from instantid_jax.parallel.aot import Plan, tell  # only a plan needs it

    config = sdxl() if s.weights is None else read_config(s.weights)
    side = config.unet.sample_size * config.vae.downscale
    size = s.height or s.width or side, s.width or s.height or side
    batch = s.num_images if s.num_images > 1 else None  # one a chip
    return tell(Plan(s.aot or "", "sample", config, ComputeConfig(dtype=s.dtype), batch=batch, steps=s.steps or 30, size=size))


if __name__ == "__main__":
    raise SystemExit(main())
