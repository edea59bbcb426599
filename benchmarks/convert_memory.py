"""Time and memory of ``convert_weights import`` on a snapshot of the published sizes.

    python benchmarks/convert_memory.py --work DIR [--parts model|controlnet] [--dtype keep|float32|bfloat16]

Writes seed-determined numbers under the published names and types (float16; the adapter float32) into DIR/source, times a
plain copy of those files, then runs the import as a process of its own and watches its memory. DIR needs three times the
size of the source: 11 GB for the model, 2.5 GB for a ControlNet. Linux only.

Pages of mapped files count as resident although the system takes them back whenever it needs memory, so anonymous
memory, which it cannot take back, is reported by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert_weights.readers import table_of
from convert_weights.rules import plan
from convert_weights.safetensors_file import write_safetensors
from convert_weights.torch_writer import write_torch
from instantid_jax.config import ModelConfig, sdxl
from instantid_jax.models import build_networks

ROOT = Path(__file__).parents[1]
BLOCK = np.random.default_rng(0).standard_normal(2**24, dtype=np.float32) * np.float32(0.02)
Entries = dict[str, tuple[np.dtype, tuple[int, ...]]]


def entries_of(name: str, config: ModelConfig, dtype: str) -> Entries:
    """The published names, types and shapes of a network."""
    return {a.published: (np.dtype(dtype), a.source_shapes()[0]) for a in plan(table_of(name, config), build_networks(config)[name].disk_shapes())}


def numbers(entries: Entries) -> Callable[[str], np.ndarray]:
    """Normal numbers of the right size, cut out of one block."""
    return lambda name: np.resize(BLOCK.astype(entries[name][0]), entries[name][1])


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def published(config: object, *without: str) -> dict[str, object]:
    """A configuration as config.json has it."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in without}  # type: ignore[call-overload]


def synthesise(source: Path, parts: str) -> None:
    """Writes the snapshot."""
    config = sdxl()
    control = source / "instantid/ControlNetModel"
    write_json(control / "config.json", published(config.identitynet, "out_channels", "up_block_types"))
    entries = entries_of("identitynet", config, "float16")
    write_safetensors(control / "diffusion_pytorch_model.safetensors", entries, numbers(entries))
    if parts == "controlnet":
        return
    halves = {"image_proj": entries_of("resampler", config, "float32"), "ip_adapter": entries_of("adapter", config, "float32")}
    write_torch(source / "instantid/ip-adapter.bin", halves, lambda half, name: numbers(halves[half])(name))
    classes = {"text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    write_json(source / "base/model_index.json", {"_class_name": "StableDiffusionXLPipeline", **classes})
    write_json(source / "base/scheduler/scheduler_config.json", published(config.scheduler))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        write_json(source / "base" / name / "config.json", published(getattr(config, name), "with_projection"))
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        entries = entries_of(name, config, "float16")
        write_safetensors(source / "base" / name / f"{stem}.safetensors", entries, numbers(entries))
    for name in ("tokenizer", "tokenizer_2"):
        write_json(source / "base" / name / "vocab.json", {})


def copy_seconds(source: Path, target: Path) -> tuple[float, int]:
    """Seconds of a plain copy that has reached the disk, and the bytes."""
    start, size = time.monotonic(), 0
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        there = target / path.relative_to(source)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, there)
        with there.open("rb") as file:
            os.fsync(file.fileno())
        size += path.stat().st_size
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds, size


def memory(process: int) -> dict[str, float]:
    """Resident memory of a process by kind, in GB."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(("VmRSS", "RssAnon", "RssFile"))}


def watched(command: list[str]) -> tuple[float, dict[str, float], float]:
    """Runs a command: seconds, the peak of each kind of memory, and the anonymous memory after imports alone."""
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    peaks: dict[str, float] = {}
    while process.poll() is None:
        for kind, value in memory(process.pid).items():
            peaks[kind] = max(peaks.get(kind, 0.0), value)
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"the import failed with exit code {process.returncode}")
    code = "import convert_weights.__main__, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    idle = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout) * 1024 / 1e9
    return time.monotonic() - start, peaks, idle


def main() -> None:
    """Prints one line of figures each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parts", choices=("model", "controlnet"), default="model")
    parser.add_argument("--dtype", choices=("keep", "float32", "bfloat16"), default="keep")
    parser.add_argument("--keep-files", action="store_true")
    options = parser.parse_args()
    source, out = options.work / f"source-{options.parts}", options.work / "weights"
    if not source.exists():
        synthesise(source, options.parts)
    seconds, size = copy_seconds(source, options.work / "copy")
    print(f"plain copy: {size / 1e9:.2f} GB in {seconds:.1f} s ({size / seconds / 1e6:.0f} MB/s)", flush=True)
    control = source / "instantid/ControlNetModel"
    given = (
        ["--controlnet", str(control)]
        if options.parts == "controlnet"
        else ["--base", str(source / "base"), "--instantid", str(source / "instantid")]
    )
    command = [sys.executable, "-m", "convert_weights", "import", *given, "--out", str(out), "--dtype", options.dtype, "--overwrite"]
    took, peaks, idle = watched(command)
    print(f"import --dtype {options.dtype}: {took:.1f} s, {took / seconds:.2f} times the copy")
    print(f"peak resident memory {peaks['VmRSS']:.2f} GB: anonymous {peaks['RssAnon']:.2f} GB, mapped files {peaks['RssFile']:.2f} GB")
    print(f"the program alone, with its libraries: {idle:.2f} GB resident")
    if not options.keep_files:
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
