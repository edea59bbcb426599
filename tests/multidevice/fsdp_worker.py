"""The training step compiled for eight simulated devices that share the weights: bytes of collectives, operations, the fewest of both."""

import dataclasses
import json
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import small

from instantid_jax.nn import placement
from instantid_jax.parallel import hlo
from instantid_jax.parallel.aot_programs import train_stages
from instantid_jax.parallel.mesh import make_mesh
from instantid_jax.training.program import Program

placement.SMALL = 2**11


def main(remat):
    model = small.model()
    wide = {"block_out_channels": (64, 128)}
    model = dataclasses.replace(model, unet=dataclasses.replace(model.unet, **wide), identitynet=dataclasses.replace(model.identitynet, **wide))
    recipe = small.recipe("nowhere", "nowhere", model=model, loader__global_batch=8, compute__remat=remat, mesh__fsdp=8)
    mesh = make_mesh(fsdp=8)
    program = Program(recipe, mesh)
    (stage,) = train_stages(recipe, mesh)
    minimum = stage.minimum() / mesh.size
    with jax.set_mesh(mesh):
        traced = stage.function.trace(*stage.arguments)
        work = hlo.costs(hlo.parse(traced.lower().compile().as_text()))

    def split(tree):
        return sum(4 * leaf.size for leaf in jax.tree.leaves(tree) if "fsdp" in leaf.sharding.spec)

    told = {
        "collectives": work.collectives,
        "flops": work.flops,
        "minimum": minimum,
        "trained": split(program.abstract_state.parameters),
        "unet": split(program.abstract_frozen["unet"]),
        "frozen": split(program.abstract_frozen),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
