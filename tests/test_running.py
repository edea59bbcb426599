"""One process in a folder at a time; compiled programs are kept."""

import os
import subprocess
import sys

import pytest

from instantid_jax.running import lease


def test_two_processes_of_one_folder(tmp_path):
    code = (
        "import sys, pathlib; from instantid_jax.running import lease, LeaseError\n"
        "try:\n    lease(pathlib.Path(sys.argv[1]), 'drawing').__enter__()\nexcept LeaseError as e:\n    print(e)\nelse:\n    print('free')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]

    def told():
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with lease(tmp_path / "run"):
        assert "another process is drawing in" in told()
    assert told() == "free\n"


COMPILES = """
import sys
import jax, jax.numpy as jnp
from instantid_jax.running import keep_compiled
print(keep_compiled())
jax.monitoring.register_event_listener(lambda name, **_: print(name) if "cache_hits" in name else None)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
"""


def compile_once(**variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"JAX_PLATFORMS": "cpu"} | variables
    return subprocess.run([sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True, check=True)


def test_the_second_process_reads_what_the_first_compiled(tmp_path):
    own = str(tmp_path / "instantid_jax")
    first, second = (compile_once(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert first.stdout.split() == [own]
    assert second.stdout.split()[0] == own and "cache_hits" in second.stdout
    assert compile_once(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "b")).stdout.split()[0] == str(tmp_path / "b")
    assert compile_once(JAX_ENABLE_COMPILATION_CACHE="false").stdout.split() == ["None"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    done = compile_once(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.stdout.split() == ["None"] and done.stderr.startswith("compiled programs are not kept: ")


DRAWS = """
import numpy as np
from instantid_jax.defaults import random_pipeline
from instantid_jax.running import keep_compiled
keep_compiled()
pipe = random_pipeline()
picture, face = np.zeros((64, 64, 3), np.uint8), np.ones(pipe.config.resampler.embedding_dim, np.float32)
pipe("a person", picture, face, num_inference_steps=2, height=64, width=64, on_step=lambda index: None)
"""


@pytest.mark.slow
def test_the_denoising_program_of_a_watched_picture_is_kept(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", DRAWS], env=environment, check=True)
    kept = {file.name.split("-")[0] for file in (tmp_path / "instantid_jax").iterdir()}
    assert "jit__advance_alone" in kept
