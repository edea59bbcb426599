"""Compiles the real programs at full size for TPU topologies, and writes docs/scale.json and the tables of docs/scale.md.

    python benchmarks/scale.py                        # everything: hours
    python benchmarks/scale.py --only unet_v5e_1      # one case; the others stay as they were written
    python benchmarks/scale.py --dump texts           # keeps what was compiled, a folder a case
    python benchmarks/scale.py --dump texts --recount # reads it again after a change of the accounting: minutes

Needs libtpu (pip install -e ".[tpu]"), no TPU, and 24 GB of memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from command_line import put

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS, PAGE = ROOT / "docs/scale.json", ROOT / "docs/scale.md"
BEGIN, END = "<!-- made by benchmarks/scale.py -->", "<!-- until here -->"


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of the tool."""

    topology: str
    program: str
    options: tuple[str, ...] = ()
    config: str = "configs/instantid.py"


CASES: dict[str, Case] = {
    "small_unet": Case("v5e:1x1", "unet", ("--size", "64", "--dtype", "bfloat16"), "configs/portraits_quick.py"),
    "small_sample": Case("v5e:1x1", "sample", ("--size", "64", "--dtype", "bfloat16"), "configs/portraits_quick.py"),
    "small_train": Case("v5e:2x2", "train", ("--dtype", "bfloat16"), "configs/portraits_quick.py"),
    "unet_v5e_1": Case("v5e:1x1", "unet"),
    "sample_v5e_1": Case("v5e:1x1", "sample"),
    "sample_v5e_1_int8": Case("v5e:1x1", "sample", ("--weights-dtype", "int8")),
    "sample_v5e_16": Case("v5e:4x4", "sample"),
    "sample_v5e_256": Case("v5e:16x16", "sample"),
    "sample_v6e_16": Case("v6e:4x4", "sample"),
    "sample_v5p_8": Case("v5p:2x2x2", "sample"),
    "sample_v4_4": Case("v4:2x2x1", "sample"),
    "train_v5e_4": Case("v5e:2x2", "train", ("--remat", "full")),
    "train_v5e_16": Case("v5e:4x4", "train", ("--remat", "blocks")),
    "train_v5e_16_plain": Case("v5e:4x4", "train", ("--remat", "none")),
    "train_v5e_256": Case("v5e:16x16", "train", ("--remat", "blocks", "--data", "16", "--fsdp", "16")),
    "train_v5e_256_large": Case("v5e:16x16", "train", ("--remat", "blocks", "--batch", "512", "--data", "16", "--fsdp", "16")),
    "train_v5e_256_full": Case("v5e:16x16", "train", ("--remat", "full", "--batch", "512", "--data", "16", "--fsdp", "16")),
    "train_v6e_16_plain": Case("v6e:4x4", "train", ("--remat", "none")),
    "train_v6e_16": Case("v6e:4x4", "train", ("--remat", "blocks", "--batch", "112")),
    "train_v6e_16_large": Case("v6e:4x4", "train", ("--remat", "blocks", "--batch", "128")),
    "train_v5p_8": Case("v5p:2x2x2", "train", ("--remat", "none", "--batch", "24")),
    "train_v5p_8_large": Case("v5p:2x2x2", "train", ("--remat", "none", "--batch", "32")),
    "train_v5p_64": Case("v5p:4x4x4", "train", ("--remat", "none", "--batch", "192", "--data", "4", "--fsdp", "16")),
    "train_v5p_64_large": Case("v5p:4x4x4", "train", ("--remat", "none", "--batch", "256", "--data", "4", "--fsdp", "16")),
    "train_2_v5e_16": Case("2*v5e:4x4", "train", ("--remat", "blocks")),
    "train_v4_4": Case("v4:2x2x1", "train", ("--remat", "blocks")),
}

LARGE = ("train_v6e_16_large", "train_v4_4")
"""Cases that took more memory than 24 GB to compile, or may: run where they are named."""


def run(case: Case, dump: Path | None, recorded: dict[str, Any] | None) -> dict[str, Any]:
    """Runs the tool in a process of its own, so that memory is given back. With what was `recorded` it compiles nothing."""
    from instantid_jax.parallel.aot import EXIT_TOO_LARGE

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "instantid_jax.parallel.aot", "--topology", case.topology, "--program", case.program]
        command += ["--config", case.config, *case.options]
        extra = ["--json", str(file)]
        if dump is not None:
            extra += ["--dump", str(dump)]
        if recorded is not None:
            (Path(folder) / "recorded.json").write_text(json.dumps(recorded), encoding="utf-8")
            extra += ["--recount", f"{folder}/recorded.json"]
        status = subprocess.run([*command, *extra], check=False, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode
        if status not in (0, EXIT_TOO_LARGE):
            raise SystemExit(f"{' '.join(command[1:])} ended with status {status}")
        made = {"command": " ".join(command[1:]), "libtpu": importlib.metadata.version("libtpu"), "date": time.strftime("%Y-%m-%d")}
        if recorded is not None:
            made = {name: recorded[name] for name in (*made, "jax") if name in recorded}
        return json.loads(file.read_text(encoding="utf-8")) | made


def table(results: dict[str, Any]) -> list[str]:
    """One row a case."""
    head = ("case", "mesh", "pictures", "HBM peak / limit (GiB)", "temporaries", "TFLOP a device", "/ minimum", "Mcycles + kernels")
    head += ("collectives (GiB)", "bound by", "compile s (CPU s)", "its memory (GiB)")
    rows = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, r in results.items():
        gib = 2**30
        mesh = " x ".join(f"{axis} {n}" for axis, n in r["mesh"].items() if n > 1) or "one"
        fits = "" if r["fits"] else " **does not fit**"
        temporary = max(p["hbm_temporary_bytes"] for p in r["programs"]) / gib
        whole = r["flops"] is not None  # of a program that was refused only its size is known
        sent = r["collective_bytes"] or {}
        moved = ", ".join(f"{kind} {count / gib:.2f}" for kind, count in sorted(sent.items()) if count > gib / 200) or "none"
        cells = [f"`{name}`", mesh, str(r["batch"]), f"{r['hbm_peak_bytes'] / gib:.2f} / {r['hbm_limit_bytes'] / gib:.2f}{fits}"]
        cells += [f"{temporary:.2f}" if whole else "-", f"{r['flops'] / 1e12:.2f}" if whole else "-"]
        cells += [f"{r['flops'] / r['flops_minimum']:.3f}" if whole else "-"]
        cells += [f"{r['estimated_cycles'] / 1e6:.0f} + {r['kernel_cycles_at_half_peak'] / 1e6:.0f}" if whole else "-"]
        if r.get("collective_minimum_bytes"):
            moved += f"; {sum(sent.values()) / r['collective_minimum_bytes']:.2f} x FSDP's"
        processor = f"{r['compile_cpu_seconds']:.0f}" if r["compile_cpu_seconds"] else "-"
        cells += [moved if whole else "-", r["bound_by"] or "-", f"{r['compile_seconds']:.0f} ({processor})"]
        cells += [f"{r['compile_memory_bytes'] / gib:.1f}" if r.get("compile_memory_bytes") else "-"]
        rows.append("| " + " | ".join(cells) + " |")
    rows += ["", "Commands:", ""]
    rows += [
        f"- `{name}`: `python {r['command']}` (jax {r['jax']}, libtpu {r['libtpu']}, {r.get('date', 'before 2026-11-28')})"
        for name, r in results.items()
    ]
    return rows


def so_far() -> dict[str, Any]:
    """The results so far, by case."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in CASES if name not in LARGE]
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", default=usual, help=f"of {', '.join(CASES)}; all but {', '.join(LARGE)}")
    parser.add_argument("--dump", type=Path, help="folder for the compiled texts, one within for each case")
    parser.add_argument("--recount", action="store_true", help="read the texts in --dump again, of the cases that have any, and compile nothing")
    given = parser.parse_args()
    if given.recount and given.dump is None:
        parser.error("--recount needs --dump DIR")
    if given.recount and not any((given.dump / name).is_dir() for name in given.only):
        parser.error(f"--recount: {given.dump} holds no texts of these cases")
    for name in given.only:
        results = so_far()
        dump = None if given.dump is None else given.dump.resolve() / name
        if given.recount and not (dump and dump.is_dir() and name in results):
            continue
        made = run(CASES[name], dump, results[name] if given.recount else None)
        results = so_far() | {name: made}  # read again: it took long, and another case may have been written meanwhile
        ordered = {known: results[known] for known in CASES if known in results}
        put(RESULTS, json.dumps(ordered, indent=1, sort_keys=True) + "\n")
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        put(PAGE, "\n".join([before + BEGIN, "", *table(ordered), "", END]) + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
