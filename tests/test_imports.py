"""What importing costs: `import instantid_jax` is light, and nothing that the package imports brings torch or TensorFlow."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _loaded(statement: str, names: tuple[str, ...]) -> set[str]:
    """Which of `names` are loaded after `statement` in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint('loaded:', *({set(names)!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("loaded:")[1].split())


def test_the_package_itself_is_light():
    heavy = ("torch", "tensorflow", "jax", "flax", "transformers", "diffusers", "cv2", "insightface", "onnxruntime", "orbax")
    assert _loaded("import instantid_jax; instantid_jax.sdxl()", heavy) == set()


@pytest.mark.parametrize("module", ["instantid_jax.pipeline", "sample", "train", "convert_weights.__main__"])
def test_no_module_brings_torch_or_tensorflow(module):
    assert _loaded(f"import {module}", ("torch", "tensorflow", "diffusers", "peft")) == set()
