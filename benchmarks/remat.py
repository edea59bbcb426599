"""What a training step computes twice under each of `compute.remat`'s policies: FLOPs against the least that do its work.

    python benchmarks/remat.py                            SDXL with IdentityNet and adapter at 1024 pixels, from shapes alone: a minute or two
    python benchmarks/remat.py --config configs/portraits_quick.py

FLOPs of matrix products and convolutions, counted on the program as the networks are defined, in no platform's forms (XLA may save some of what
it finds twice). What each policy saves in memory is in docs/scale.md, for the ones that were compiled.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from jax.sharding import AbstractDevice, AbstractMesh

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from instantid_jax.parallel.aot_programs import train_stages
from instantid_jax.parallel.flops import count_flops
from instantid_jax.parallel.mesh import AXES
from instantid_jax.training.recipes import load_recipe

POLICIES = ("none", "dots", "blocks", "offload", "full")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/instantid.py")
    try:
        recipe = load_recipe(parser.parse_args().config)
    except ValueError as error:
        parser.error(str(error))
    recipe = dataclasses.replace(recipe, loader=dataclasses.replace(recipe.loader, global_batch=1))
    anywhere = AbstractMesh((1,) * len(AXES), AXES, abstract_device=AbstractDevice("any", None, "any"))
    print("| policy | TFLOP a picture | / minimum |\n| --- | --- | --- |")
    for policy in POLICIES:
        changed = dataclasses.replace(recipe, compute=dataclasses.replace(recipe.compute, remat=policy))
        (stage,) = train_stages(changed, anywhere)
        traced = stage.function.trace(*stage.arguments)
        flops, least = count_flops(traced.jaxpr), stage.minimum()
        print(f"| {policy} | {flops / 1e12:.2f} | {flops / least:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
