"""How many samples a second the input pipeline gives, and how many processors a TPU host would need.

    python benchmarks/input.py                           photos of 1024 pixels and cached latents, at SDXL's sizes
    python benchmarks/input.py --photo 1280 --seconds 10 --json input.json

    jpeg        decode, crop, resize to 1024 x 1024, keypoint picture, tokens of both towers
    cached      latents [128, 128, 4] (float16) and text out of the records; keypoint picture
    in_memory   cached latents of 64-pixel heads, cut out of arrays

Rates are of this process on the processors it may use, after a warm-up. The share of a training step that waits for data is printed by
`train.py` itself (`data_wait_share`).
"""

import argparse
import dataclasses
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from command_line import amount, count, new_file, put
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from instantid_jax.data.loader import LoaderConfig, make_loader
from instantid_jax.data.record import CachedLatents, Record, View
from instantid_jax.data.sources import MemorySource
from instantid_jax.text import Tokenizer


def photo(size: int, number: int) -> bytes:
    """A JPEG with structure and some noise, so that it takes about as long to decode as a photo."""
    from skimage import data

    picture = Image.fromarray(data.astronaut()).resize((size, size), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(number).normal(0, 6, (size, size, 3))
    out = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def record(number: int, size: int, latents: tuple[int, int] | None) -> Record:
    """One record: a JPEG, or latents of (side, channels) beside a picture of `size` pixels."""
    points = np.float32([[0.35, 0.4], [0.65, 0.4], [0.5, 0.55], [0.4, 0.7], [0.6, 0.7]]) * size
    box = np.float32([0.25, 0.2, 0.75, 0.85]) * size
    fields: dict[str, Any] = {}
    if latents is not None:
        side, channels = latents
        rng = np.random.default_rng(number)
        view = View(size, size, 0, 0, size, size)
        fields["latents"] = CachedLatents(
            rng.normal(size=(side, side, channels)).astype(np.float16), np.full((side, side, channels), -9, np.float16), view, "n"
        )
    embedding = np.random.default_rng(number).normal(size=(1, 512)).astype(np.float32)
    image = b"" if latents is not None else photo(size, number)
    caption = f"a photo of an astronaut, number {number}"
    return Record(f"{number:06}", image, (size, size), points, box, embedding, "antelopev2", caption=caption, identity=str(number // 2), **fields)


def rate(config: LoaderConfig, records: list[Record], seconds: float) -> dict[str, float]:
    """Samples a second and processor seconds a sample."""
    from instantid_jax.defaults import DEFAULT_WEIGHTS

    tokenizers = tuple(Tokenizer.from_directory(DEFAULT_WEIGHTS / name) for name in ("tokenizer", "tokenizer_2"))
    loader = make_loader(MemorySource(records), config, tokenizers)  # type: ignore[arg-type]
    for _ in range(4):
        next(loader)
    started, worked, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        next(loader)
        count += config.global_batch
    took, work = time.perf_counter() - started, time.process_time() - worked
    loader.close()
    return {"samples_per_second": count / took, "cpu_seconds_per_sample": work / count}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=count, default=1024, help="side of the photos in pixels")
    parser.add_argument("--seconds", type=amount, default=8)
    parser.add_argument("--step-seconds", type=amount, default=1.0, help="of a training step on the host's chips, for the arithmetic")
    parser.add_argument("--chips", type=count, default=8, help="chips of a host")
    parser.add_argument("--per-chip", type=count, default=1, help="pictures a chip and step")
    parser.add_argument("--json", type=new_file)
    options = parser.parse_args(arguments)
    processors = len(os.sched_getaffinity(0))
    large = LoaderConfig(global_batch=8, resolution=1024, num_threads=processors, paired_reference=0.5)
    cached = dataclasses.replace(large, cached_latents=True)
    small = LoaderConfig(global_batch=256, resolution=64, num_threads=processors, cached_latents=True, in_memory=True, paired_reference=0.5)
    cases = {
        "jpeg": (large, [record(i, options.photo, None) for i in range(32)]),
        "cached": (cached, [record(i, 1024, (128, 4)) for i in range(64)]),
        "in_memory": (small, [record(i, 64, (16, 8)) for i in range(512)]),
    }
    figures: dict[str, Any] = {"processors": processors}
    need = options.chips * options.per_chip / options.step_seconds
    for name, (config, records) in cases.items():
        figures[name] = told = rate(config, records, options.seconds)
        told["processors_needed"] = need * told["cpu_seconds_per_sample"]
        each = f"{1000 * told['cpu_seconds_per_sample']:7.2f} ms of processor time each"
        needed = f"{need:.0f} samples/s need {told['processors_needed']:.2f} processors"
        print(f"{name:10} {told['samples_per_second']:9.1f} samples/s on {processors} processors, {each}; {needed}", flush=True)
    if options.json:
        put(options.json, json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
