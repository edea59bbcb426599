"""What the options of sampling save, and what they do to the picture.

    python benchmarks/options.py                    all the tables
    python benchmarks/options.py --only "int8"      the lines whose name holds this text, besides the exact one

Operations are counted on the sampling program itself (matrix products and convolutions), every loop as often as it turns and
every condition as this call takes it: of SDXL with IdentityNet at 1024 x 1024 pixels, from shapes alone. Pictures are those
that the small model that comes along makes of every person who comes along, with the same noise in all lines. PSNR is against
the exact line; of latents, the root mean square of the difference over that of the exact ones.
"""

import argparse
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from instantid_jax import denoise as programs
from instantid_jax.config import ComputeConfig, sdxl
from instantid_jax.defaults import PROMPTS, default_pipeline
from instantid_jax.demo import draw_people
from instantid_jax.denoise import Conditions, Denoiser
from instantid_jax.face import load_analyzer
from instantid_jax.models import build_networks
from instantid_jax.models.encoder import AddedConditions
from instantid_jax.nn.platform import as_defined
from instantid_jax.parallel.flops import executed_flops
from instantid_jax.pipeline import InstantIDPipeline, check_call

STEPS, SIDE, SMALL = 30, 1024, 64
CALL = {"prompt": PROMPTS["photo"], "negative_prompt": None, "num_images_per_prompt": 1, "width": None, "height": None, "seed": 0}
CALL |= {"guidance_scale": 2.0, "controlnet_conditioning_scale": 1.0, "ip_adapter_scale": 1.0, "num_inference_steps": STEPS}


class Line(NamedTuple):
    """One line of the table."""

    name: str
    settings: dict[str, Any]
    loading: Mapping[str, Any] = MappingProxyType({})


LINES = (
    Line("exact", {}),
    Line("IdentityNet in the first 80 %", {"control_guidance_end": 0.8}),
    Line("IdentityNet in the first half", {"control_guidance_end": 0.5}),
    Line("IdentityNet every 2nd step", {"control_interval": 2}),
    Line("IdentityNet every 3rd step", {"control_interval": 3}),
    Line("guidance in the first 80 %", {"guidance_end": 0.8}),
    Line("guidance from 20 % to 80 %", {"guidance_start": 0.2, "guidance_end": 0.8}),
    Line("guidance in the first half", {"guidance_end": 0.5}),
    Line("identity guided apart from the text", {"identity_guidance_scale": 1.5}),
    Line("cache interval 2, branch 0", {"cache_interval": 2}),
    Line("cache interval 3, branch 0", {"cache_interval": 3}),
    Line("cache interval 2, branch 2", {"cache_interval": 2, "cache_branch_id": 2}),
    Line("cache interval 3, branch 2", {"cache_interval": 3, "cache_branch_id": 2}),
    Line("cache 2, guidance in the first 80 %", {"cache_interval": 2, "guidance_end": 0.8}),
    Line("for comparison: 15 steps", {"num_inference_steps": 15}),
    Line("8 steps", {"num_inference_steps": 8}),
    Line("dpmpp_2m, 15 steps", {"num_inference_steps": 15, "sampler": "dpmpp_2m"}),
    Line("dpmpp_2m, 8 steps", {"num_inference_steps": 8, "sampler": "dpmpp_2m"}),
    Line("unipc, 8 steps", {"num_inference_steps": 8, "sampler": "unipc"}),
    Line("lcm, 4 steps without guidance", {"num_inference_steps": 4, "sampler": "lcm", "guidance_scale": 1.0}),
    Line("tcd, 4 steps without guidance", {"num_inference_steps": 4, "sampler": "tcd", "guidance_scale": 1.0}),
    Line("bfloat16", {}, {"dtype": "bfloat16"}),
    Line("int8 weights", {}, {"weights_dtype": "int8"}),
    Line("int8 weights, bfloat16", {}, {"dtype": "bfloat16", "weights_dtype": "int8"}),
)


def operations(denoiser: Denoiser, solver: Any, guided: bool, dynamic: tuple[Any, ...], shortcuts: Any, pace: Any) -> float:
    """Of one run of the denoising program; `dynamic` are its arguments from `parameters` to `guidance_rescale`, arrays or shapes."""

    def run(dynamic: Any, pace: Any) -> jax.Array:
        return programs.denoise(denoiser, solver, guided, *dynamic, pace, None, shortcuts)

    with as_defined():
        return executed_flops(jax.make_jaxpr(run)(dynamic, pace), jax.tree.leaves((dynamic, pace)))


@functools.cache
def pipeline(**loading: Any) -> InstantIDPipeline:
    """The small model."""
    return default_pipeline(**loading)


def draw(line: Line, analyzer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Latents and pictures of everybody by the small model."""
    pipe = pipeline(**line.loading)
    prompts = [("photo", {"prompt": CALL["prompt"], "negative_prompt": None})]
    rows = draw_people(pipe, analyzer, CALL | line.settings | {"output_type": "latent"}, prompts, None, lambda _: None).rows
    latents = np.concatenate([np.asarray(row[-1]) for row in rows])
    return latents, np.asarray(programs.decode(pipe.networks["vae"], pipe.parameters["vae"], latents))


def count(line: Line) -> float:
    """Operations of one picture by SDXL and IdentityNet."""
    config, of = sdxl(), jax.ShapeDtypeStruct
    settings = {name: value for name, value in (CALL | line.settings).items() if name != "prompt"}
    request = check_call(config, prompt="x", **settings)
    networks = build_networks(config, ComputeConfig(attention="xla"))
    unet, width = config.unet, config.unet.cross_attention_dim
    control, adapter = request.strengths(1.0)
    rows, guidance = request.branches, np.asarray(request.guidance_scale, np.float32)
    conditions = Conditions(
        text=of((rows, 77, width), np.float32),
        text_mask=None,
        added=AddedConditions(of((rows, unet.pooled_dim), np.float32), of((rows, 6), np.float32)),
        identity_tokens=of((rows, config.resampler.num_queries, width), np.float32),
        images=(of((1, SIDE, SIDE, 3), np.float32),),
        control_scales=control,
        adapter_scale=adapter,
        control_mask=None,
    )
    names = ("unet", "adapter", "identitynet")
    parameters = {name: networks[name].abstract for name in names} | {"controlnets": ()}
    noise = of((1, SIDE // 8, SIDE // 8, unet.in_channels), np.float32)
    dynamic = parameters, conditions, noise, np.zeros(1, np.uint32), request.plan, guidance if rows > 2 else guidance[0], np.float32(0)
    return operations(Denoiser(*(networks[name] for name in names)), request.solver, request.guided, dynamic, request.shortcuts, request.pace())


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each picture [n, H, W, 3] in [0, 1], in dB."""
    return -10 * np.log10(np.maximum(np.square(a - b).mean((1, 2, 3)), 1e-12))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a line's name")
    only = parser.parse_args().only
    if not any(only in line.name for line in LINES[1:]):
        parser.error(f"no line's name has {only!r} in it; there are: {', '.join(line.name for line in LINES[1:])}")
    analyzer = load_analyzer("opencv")
    exact, (latents, pictures) = count(LINES[0]), draw(LINES[0], analyzer)
    print(f"{len(pictures)} pictures of {SMALL} pixels, {STEPS} steps of euler, on {jax.devices()[0].platform};")
    print(f"exact: {exact / 1e12:.0f} TFLOP a picture of SDXL with IdentityNet at {SIDE} pixels.\n")
    print("| option | operations | latents, rms | PSNR in dB, mean | lowest |\n| --- | --- | --- | --- | --- |")
    for line in LINES[1:]:
        if only not in line.name:
            continue
        share = 1.0 if line.loading else count(line) / exact
        found, drawn = draw(line, analyzer)
        rms, decibels = np.sqrt(np.square(found - latents).mean() / np.square(latents).mean()), psnr(drawn, pictures)
        print(f"| {line.name} | {share:.3f} | {rms:.4f} | {decibels.mean():.1f} | {decibels.min():.1f} |", flush=True)


if __name__ == "__main__":
    main()
