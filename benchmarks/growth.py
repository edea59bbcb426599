"""How seconds and memory grow with pixels, pictures and steps, on this machine.

    python benchmarks/growth.py                        a model of 0.38 billion parameters, float32
    python benchmarks/growth.py --model portraits --json growth.json

The denoising program of the pipeline (`instantid_jax.denoise.denoise`: conditions, then the loop over the steps, with guidance), one step at 256 to
1024 pixels, one step for 1 to 8 pictures of 256 pixels, and 1 to 8 steps of one picture; the small model draws a quarter as high and wide. Seconds
are medians of `--repeats` calls after an untimed one, memory is XLA's plan for what is needed beside weights and inputs. Exponents are fitted to
log y = a + k log x: 1 is proportional, 2 is what attention's scores alone would do with pixels. Needs the packages of the tests (`.[dev]`).
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "parity"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from command_line import count, needs, new_file, put
from vs_pytorch import clock, middle_model

SIDES, PICTURES, STEPS = (256, 384, 512, 768, 1024), (1, 2, 4, 8), (1, 2, 4, 8)


def exponent(x: Any, y: Any) -> float:
    """Slope of the line through (log x, log y)."""
    return float(np.polyfit(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)), 1)[0])


def measure(config: Any, parameters: Any, side: int, pictures: int, steps: int, repeats: int) -> dict[str, float]:
    """Median seconds and planned bytes of the denoising of `pictures` of `side` pixels in `steps` guided steps."""
    import jax
    import jax.numpy as jnp

    from instantid_jax import denoise as programs
    from instantid_jax.diffusion import make_sampler
    from instantid_jax.models import build_networks
    from instantid_jax.models.encoder import AddedConditions

    networks, sampler = build_networks(config), make_sampler("euler", config.scheduler)
    random, rows, width = np.random.default_rng(0), 2 * pictures, config.unet.cross_attention_dim

    def numbers(*shape: int) -> Any:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    conditions = programs.Conditions(
        text=numbers(rows, 77, width),
        text_mask=None,
        added=AddedConditions(numbers(rows, config.unet.pooled_dim), jnp.full((rows, 6), float(side))),
        identity_tokens=numbers(rows, config.resampler.num_queries, width),
        images=(jnp.asarray(random.uniform(size=(1, side, side, 3)), jnp.float32),),
        control_scales=jnp.ones((steps, 1)),
        adapter_scale=jnp.ones((steps,)),
        control_mask=None,
    )
    noise = numbers(pictures, side // config.vae.downscale, side // config.vae.downscale, config.unet.in_channels)
    denoiser = programs.Denoiser(networks["unet"], networks["adapter"], networks["identitynet"])
    arguments = parameters, conditions, noise, jnp.zeros(pictures, jnp.uint32), sampler.plan(steps), jnp.float32(5), jnp.float32(0)
    compiled = programs.denoise.lower(denoiser, sampler, True, *arguments).compile()

    def run() -> Any:
        return jax.block_until_ready(compiled(*arguments[:2], noise + 0, *arguments[3:]))  # the noise is used up

    seconds, _ = clock(run, repeats)
    return {"seconds": float(np.median(seconds)), "bytes": float(compiled.memory_analysis().temp_size_in_bytes)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("middle", "portraits"), default="middle")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--json", type=new_file)
    options = parser.parse_args(arguments)
    needs(parser, "torch", "diffusers")  # whose weights the model is given
    from true_shapes import stacked_weights

    from instantid_jax.config import portraits
    from instantid_jax.models import build_networks
    from instantid_jax.nn.stacking import layers_apart

    config, scale = (middle_model(), 1) if options.model == "middle" else (portraits(), 4)
    networks = build_networks(config)
    weights = {name: stacked_weights(networks[name]) for name in ("unet", "identitynet", "adapter")}
    weights |= {name: layers_apart(weights[name]) for name in ("unet", "identitynet")} | {"controlnets": ()}  # as the pipeline does
    of = functools.partial(measure, config, weights, repeats=options.repeats)
    smallest = SIDES[0] // scale
    tables = {
        "pixels": {side // scale: functools.partial(of, side // scale, 1, 1) for side in SIDES},
        "pictures": {count: functools.partial(of, smallest, count, 1) for count in PICTURES},
        "steps": {steps: functools.partial(of, smallest, 1, steps) for steps in STEPS},
    }
    figures: dict[str, Any] = {}
    for what, rows in tables.items():
        print(f"| {what} | seconds | MiB beside weights |\n| --- | --- | --- |")
        figures[what] = {}
        for key, run in rows.items():
            figures[what][key] = told = run()
            print(f"| {key} | {told['seconds']:.3f} | {told['bytes'] / 2**20:.0f} |", flush=True)
        x = [key**2 for key in rows] if what == "pixels" else list(rows)
        powers = {unit: exponent(x, [row[unit] for row in figures[what].values()]) for unit in ("seconds", "bytes")}
        figures[what]["exponents"] = powers
        print(f"| power | {powers['seconds']:.2f} | {powers['bytes']:.2f} |\n", flush=True)
    if options.json:
        put(options.json, json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
