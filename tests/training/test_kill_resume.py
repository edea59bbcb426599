"""SIGKILL at random moments: what comes back is the undisturbed run, bit for bit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "kill_resume.py"


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_come_back_bit_for_bit(kills):
    done = subprocess.run([sys.executable, str(BENCHMARK), "--kills", str(kills), "--seed", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^{kills} of {kills} kills came back bit for bit, in \d+ runs$", done.stdout, re.MULTILINE)


def test_a_difference_is_not_overlooked(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import kill_resume
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    for name, digest, index in (("a", "1", 5), ("b", "1", 5), ("c", "2", 5), ("d", "1", 6)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "digest.json").write_text(f'{{".ema": "{digest}"}}')
        (folder / "order.jsonl").write_text(f'{{"position": 0, "index": [{index}]}}\n{{"position": 8, "ind')
    assert kill_resume.compare(tmp_path / "a", tmp_path / "b") == []
    assert kill_resume.compare(tmp_path / "c", tmp_path / "b") == [".ema"]
    assert kill_resume.compare(tmp_path / "d", tmp_path / "b") == ["batch at position 0"]
