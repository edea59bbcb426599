"""Weights spread over eight simulated devices make the picture that one device makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
import jax
import numpy as np
from instantid_jax.parallel.mesh import make_mesh
from instantid_jax.pipeline import InstantIDPipeline
weights, golden, kind = sys.argv[1:]
z = np.load(golden)
compiled, told = [], []
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None)
changed = {"init_image": z["control_image"], "mask_image": (20, 20, 100, 90), "num_images_per_prompt": 4} if kind == "changed" else {}
changed |= {"num_images_per_prompt": 4, "on_step": lambda index: told.append(len(compiled))} if kind == "watched" else {}
one, many = (
    InstantIDPipeline.from_pretrained(weights, mesh=mesh)(
        "a man", z["kps_image"], z["emb"], num_inference_steps=3, output_type="latent", **changed
    ).images
    for mesh in (None, make_mesh(fsdp=4, tensor=2))
)
print(json.dumps({"difference": float(abs(one - many).max()), "spread": float(one.std()), "told": told}))
"""


@pytest.mark.parametrize("kind", ["watched", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("from noise", "changed"))])
def test_fsdp_and_tensor(kind: str, golden_snapshot: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "convert_weights", "import", "--base", str(golden_snapshot / "base")]
    command += ["--instantid", str(golden_snapshot / "instantid"), "--out", str(tmp_path / "weights")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "weights"), str(ROOT / "tests/golden/dev/golden.npz"), kind]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["difference"] <= 1e-4 * found["spread"]
    told = found["told"]  # how many programs had been compiled when a call ended: none after the first
    assert [len(set(calls)) for calls in (told[:3], told[3:])] == ([1, 1] if kind == "watched" else [0, 0])
