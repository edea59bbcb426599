"""Makes pictures of a person from one photo and a prompt.

With no arguments: rendered people, drawn by the small model that comes along.

With converted weights: python sample.py --weights DIR --face me.jpg --prompt "film noir"

Many people, prompts and seeds, on many devices: python sample.py --jobs jobs.jsonl (docs/jobs.md)

Exit status: 0 all made, 1 an error, 2 a wrong option; of --jobs also 3 some failed, 75 stopped by a signal: the same command goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
import time
import warnings
from pathlib import Path

import tyro
from jax.errors import JaxRuntimeError

from convert_weights.lora import read_loras
from instantid_jax.config import ComputeConfig, sdxl
from instantid_jax.demo import count_people, demo_prompts, demo_settings, draw_people, save_sheet
from instantid_jax.face import FaceError, load_analyzer
from instantid_jax.jobs import run_jobs
from instantid_jax.options import OptionError, check_folder, status_of, while_read, wrong_options
from instantid_jax.output import place_in_batch, run_settings, save_run
from instantid_jax.parallel.distributed import leave
from instantid_jax.pipeline import read_config
from instantid_jax.progress import CompileSeconds, StepBar
from instantid_jax.prompts import prompts_of
from instantid_jax.references import check_files, photos_table, read_identity
from instantid_jax.replay import Replay
from instantid_jax.request import in_options
from instantid_jax.running import keep_compiled
from instantid_jax.sample_edits import calls_of_run, drawn, initial_of, on_initial_canvas
from instantid_jax.sample_options import SampleOptions, gathered
from instantid_jax.sampling import (
    conditions_of,
    face_facts,
    group_conditions,
    inputs_of,
    made_maps,
    model_config,
    open_pipeline,
    read_people,
    settings_of,
)
from instantid_jax.variants import compared_variants, draw_variants, prompt_variants, save_variants, variants_of


@while_read
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = gathered(arguments)
    options = tyro.cli(SampleOptions, args=given, description=__doc__)
    keep_compiled()
    warnings.showwarning = lambda message, *_: print(f"sample.py: {in_options(str(message))}", file=sys.stderr)
    try:
        if options.aot is not None:
            return _plan(options)
        if options.aot_json is not None:
            raise OptionError("--aot-json goes with --aot")
        if options.replay is not None:
            print("\n".join(map(str, run_again(options.replay, given))), flush=True)
            return 0
        if options.jobs is not None:
            return run_jobs(options, lambda config: read_loras(options.lora, config, options.allow_unknown_lora_keys))
        print("\n".join(map(str, run(options))), flush=True)
    except BrokenPipeError:  # an OSError, but no fault: `while_read` has it
        raise
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


def run_again(path: Path, arguments: list[str]) -> list[Path]:
    """The picture of a file, from its settings; options among the `arguments` count first."""
    replay = Replay(path)
    options = tyro.cli(SampleOptions, args=arguments, default=replay.base)
    with wrong_options():
        if options.jobs is not None:
            raise ValueError("--replay makes one picture again; leave out --jobs")
    with tempfile.TemporaryDirectory() as scratch:
        options = replay.options(options, Path(scratch))
        print("\n".join([f"again: {path}", *replay.told]))
        return run(options, replay)


def run(given: SampleOptions, replay: Replay | None = None) -> list[Path]:
    """Photo to pictures: first everything that can be checked or fails quickly, then the weights. One clear sentence for what is wrong."""
    with wrong_options():
        given.check()
        s = given.filled()
        check_files([*s.style_file, *filter(None, (s.prompt_file,))])
        asked, columns = prompts_of(s)
        again = replay if replay and replay.single and len(asked) == 1 else None
        s = again.batch(asked[0].options) if again else asked[0].options
        variants = prompt_variants(asked)
        if len(asked) > 1 and (one := next((name for name in ("view", "blend", "compare") if getattr(s, name)), None)):
            raise ValueError(f"--{one} goes with one prompt, not {len(asked)}")
        prompts = []
        if s.is_demo:
            told = (given.prompt, given.style, given.prompt_file) != (None, (), None)
            prompts = again.prompts(s) if again and again.person else demo_prompts(asked if told else None, s.negative_prompt)
    listed = read_people(s)
    if s.is_demo and s.control_mask is not None:
        raise OptionError("--control-mask has no meaning for the people who come along; name a photo with --face")
    check_folder(s.out)
    s = on_initial_canvas(s)
    with wrong_options():
        call = s.call()
    config = model_config(s)
    loras = read_loras(s.lora, config, s.allow_unknown_lora_keys)
    with wrong_options():
        variants = variants or compared_variants(s, config)
        calls = calls_of_run(s, config, [call, *(call | variant.change for variant in variants)], listed)
    call |= initial_of(s)
    analyzer = functools.cache(lambda: load_analyzer(s.analyzer or config.face_analyzer, s.analyzer_root))
    try:
        place = s.pose or (s.init_image if listed is None else None)
        pose = read_identity((place,), analyzer, face_index=s.pose_face_index) if place else None
    except FaceError as error:
        raise ValueError(str(error).replace("--face-index", "--pose-face-index")) from error
    keypoints, identity = None, None
    if listed is not None:
        conditions, keypoints = group_conditions(s, config, listed, analyzer)
        call |= conditions
    elif s.is_demo:
        analyzer()  # a missing one is told before the weights are read
    else:
        identity = read_identity(s.face, analyzer, config.resampler.embedding_dim, s.face_index, s.face_combine, s.face_weight or None)
        print(photos_table(identity), end="\n" if len(identity.reports) > 1 else "")
        variants = variants or variants_of(s, config, identity, analyzer)
        if again and again.variant is not None:
            variants = [variant for variant in variants if variant.label == again.variant][:1]
        view = variants[0].change.get("image") if variants else None
        call |= conditions_of(s, config.keypoint_scale, pose or identity, view) | {"image_embeds": identity.embedding}
        keypoints = call["image"][0]
    pipe = open_pipeline(s, loras)
    settings = settings_of(s, loras) | (face_facts(identity) if identity is not None and s.keep_face_vector else {})
    began = time.perf_counter()
    runs = (1 if again else count_people()) if keypoints is None else len(variants) or 1
    with StepBar(calls * runs) as bar, CompileSeconds() as compiling:
        draw = functools.partial(drawn, pipe, s, analyzer, bar.listener)
        if keypoints is None:
            sheet = draw_people(pipe, analyzer(), call, prompts, pose, bar.listener, again.person if again else None)
            pictures, save = [image for row in sheet.rows for image in row[3]], functools.partial(save_sheet, s.out, sheet, settings)
            told = demo_settings(sheet, sheet.rows[0][0], again.index, settings) if again else {}
        elif variants:
            rows = draw_variants(draw, call, variants)
            pictures, told = [picture for row in rows for picture in row], variants[0].told
            across = columns if len(asked) > 1 else None
            save = functools.partial(save_variants, s.out, variants, rows, inputs_of(s, listed), settings, across)
        else:
            pictures, told = draw(call), {}
            save = functools.partial(save_run, s.out, pictures, keypoints, inputs_of(s, listed), settings, made_maps(s, call["image"]))
        if again:
            place = {} if keypoints is None else place_in_batch(s.seed, again.index, len(pictures))
            own = run_settings(pictures[0].size, inputs_of(s, listed), settings | told) | place
            save = functools.partial(again.save, s.out, pictures[again.index], own)
        seconds = time.perf_counter() - began
    print(f"compiled in {compiling.total:.1f} s, made {len(pictures)} picture(s) in {seconds - compiling.total:.1f} s")
    return save()


def _plan(s: SampleOptions) -> int:
    """Tells what sampling would need on the TPUs of `SampleOptions.aot`: of the weights' model, or of SDXL; only its configuration is read."""
    from instantid_jax.parallel.aot import Plan, tell  # only a plan needs it

    plans = ("aot", "aot_json", "weights", "dtype", "weights_dtype", "num_images", "steps", "height", "width")
    changed = (f.name for f in dataclasses.fields(s) if getattr(s, f.name) != getattr(SampleOptions, f.name))
    if other := next((name for name in changed if name not in (*plans, "out")), None):
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in plans[1:])
        raise OptionError(f"--{other.replace('_', '-')} takes no part in --aot, which plans with {listed}; leave it out")
    if s.num_images < 1:
        raise OptionError(f"--num-images must be at least 1, not {s.num_images}")
    config = sdxl() if s.weights is None else read_config(s.weights)
    side = config.unet.sample_size * config.vae.downscale
    height, width = (next(n for n in sides if n is not None) for sides in ((s.height, s.width, side), (s.width, s.height, side)))
    batch = None if s.num_images == 1 else s.num_images  # one a chip
    steps = 30 if s.steps is None else s.steps
    int8 = s.weights_dtype is not None
    plan = Plan(s.aot or "", "sample", config, ComputeConfig(dtype=s.dtype), batch=batch, steps=steps, size=(height, width), int8=int8)
    return tell(plan, s.aot_json)


if __name__ == "__main__":
    raise SystemExit(main())
