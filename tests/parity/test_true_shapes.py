"""The full-size UNet and IdentityNet, by the benchmark that also reports time and memory: needs 13 GB, takes minutes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "true_shapes.py"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "outputs"), [("unet", 1), ("identitynet", 10)])
def test_full_size(name: str, outputs: int, tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), "--networks", name, "--json", str(tmp_path / "figures.json")], check=True)
    figures = json.loads((tmp_path / "figures.json").read_text())[name]
    assert figures["outputs"] == outputs
    assert figures["max_error"] <= 1e-4
    # Outputs of ordinary size: nothing has died out or blown up on the way through the depth.
    assert all(0.05 < spread < 20 for spread in figures["std"])
    assert np.isfinite(figures["rms_error"])
