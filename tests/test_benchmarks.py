"""Benchmarks that nothing else runs still run; what they measure is in docs/."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("scale.py --recount --dump nowhere", "nowhere holds no texts of these cases"),
        ("vs_pytorch.py --rounds 0", "must be a whole number from 1, not '0'"),
        ("vs_pytorch.py --json nowhere/x.json", "cannot be written"),
        ("loading.py --folder nowhere", "there is no such folder"),
        ("input.py --seconds 0", "must be a number above 0, not '0'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(command: str, says: str) -> None:
    name, *options = command.split()
    done = subprocess.run([sys.executable, f"benchmarks/{name}", *options], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_the_page_has_the_figures_that_were_measured() -> None:
    """docs/speed.md's table against PyTorch, and docs/speed.json, which `benchmarks/vs_pytorch.py` wrote."""
    figures = json.loads((ROOT / "docs/speed.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    for name, found in figures.items():
        ours = f"| {found['ours_s']:.{1 if found['ours_s'] >= 8 else 2}f} s |"
        row = [line for line in page.splitlines() if ours in line and (not found["ratio"] or f"| {found['ratio']:.2f} |" in line)]
        assert len(row) == 1, name
        if found["ratio"]:
            assert found["ratio"] == pytest.approx(found["pytorch_s"] / found["ours_s"]), name
