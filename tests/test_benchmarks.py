"""Benchmarks that nothing else runs still run; what they measure is in docs/."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        ("options.py --only unipc", ["| unipc, 8 steps | 0.267 | "]),
        ("growth.py --model portraits --repeats 1", ["| pixels | seconds |", "| pictures | seconds |", "| steps | seconds |"]),
        ("remat.py --config configs/portraits_quick.py", ["| none | ", "| full | "]),
        ("attention_length.py --help", ["usage"]),
    ],
)
def test_it_runs(command: str, rows: list[str]) -> None:
    name, *options = command.split()
    done = subprocess.run([sys.executable, f"benchmarks/{name}", *options], cwd=ROOT, check=True, capture_output=True, text=True)
    for row in rows:
        assert row in done.stdout
