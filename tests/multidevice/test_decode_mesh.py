"""Eight simulated devices decode a batch each its own pictures, as one device makes them, and send nothing but split weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json
import jax
from instantid_jax.config import portraits
from instantid_jax.denoise import decode
from instantid_jax.models import build_networks
from instantid_jax.models.tiling import Tiling
from instantid_jax.nn import placement
from instantid_jax.parallel import hlo
from instantid_jax.parallel.mesh import batch_sharding, make_mesh
from instantid_jax.parallel.rules import shardings

placement.SMALL = 2**14  # kernels of this small autoencoder are split too
vae = build_networks(portraits())["vae"]
weights = vae.init(jax.random.key(0))
latents = jax.random.normal(jax.random.key(1), (16, 20, 20, vae.config.latent_channels))  # tokens enough for attention by blocks
told = {}
both, one = make_mesh(data=4, fsdp=2), make_mesh(data=8)
for name, tiling, mesh, split in (
    ("whole", None, both, False), ("tiled", Tiling("even", 64), both, False), ("over one axis", None, one, False), ("split", None, both, True)
):
    single = hlo.costs(hlo.parse(decode.lower(vae, weights, latents[:1], tiling).compile().as_text()))
    with jax.set_mesh(mesh):
        rows = jax.device_put(latents, batch_sharding(mesh))
        placed = jax.device_put(weights, shardings(weights, mesh)) if split else weights
        compiled = decode.lower(vae, placed, rows, tiling).compile()
        pictures = compiled(placed, rows)
    each = hlo.costs(hlo.parse(compiled.as_text()))
    difference = float(abs(decode(vae, weights, latents, tiling) - pictures).max())
    told[name] = {"flops": each.flops / single.flops, "collectives": each.collectives, "difference": difference}
print(json.dumps(told))
"""


def test_each_device_decodes_its_own_pictures_and_no_others() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["flops"] == 2, name  # of sixteen pictures
        assert list(found["collectives"]) == (["all-gather"] if name == "split" else []), name
        assert found["difference"] < 1e-6, name
