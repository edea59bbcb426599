"""What the training step moves and computes when eight devices share the weights, read from the compiled program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import launched
import pytest

WORKER = Path(__file__).with_name("fsdp_worker.py")


@pytest.mark.parametrize("remat", ["none", pytest.param("blocks", marks=pytest.mark.slow)])
def test_weights_are_gathered_gradients_scattered_and_nothing_else_moves(remat: str) -> None:
    (out,) = launched.finish(launched.start(WORKER, remat, 8))
    told = json.loads(out.splitlines()[-1])
    moved = told["collectives"]
    # Weights forward and backward, gradients once. Text towers and autoencoder are not differentiated.
    bound = told["trained"] + told["frozen"] + told["trained"] + told["unet"] + told["trained"]
    assert sum(moved.values()) <= 1.3 * bound, (moved, bound)
    assert moved["all-gather"] >= 1.2 * (told["trained"] + told["frozen"]), "the backward pass keeps gathered weights"
    assert moved.get("all-to-all", 0) + moved.get("collective-permute", 0) <= 0.01 * bound, moved
    # Weight gradients of the frozen UNet would be half as much again.
    assert told["flops"] <= {"none": 1.1, "blocks": 1.5}[remat] * told["minimum"]


ATTENTION = """
import sys
import jax, jax.numpy as jnp, numpy as np
from instantid_jax.nn.attention import dot_product_attention
from instantid_jax.parallel import hlo
from instantid_jax.parallel.mesh import batch_sharding, make_mesh
q, k, v = (jax.random.normal(jax.random.key(i), (8, 300, 2, 16)) for i in range(3))
f = jax.jit(lambda *x: dot_product_attention(*x, backend="blocked"))
plain, mesh = f(q, k, v), make_mesh(data=2, fsdp=4)
with jax.set_mesh(mesh):
    placed = [jax.device_put(x, batch_sharding(mesh)) for x in (q, k, v)]
    text = f.lower(*placed).compile().as_text()
    np.testing.assert_allclose(f(*placed), plain, atol=2e-6)
assert not hlo.costs(hlo.parse(text)).collectives
"""


def test_attention_by_blocks_stays_on_the_rows_own_device() -> None:
    command = [sys.executable, "-c", ATTENTION]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(command, cwd=launched.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
