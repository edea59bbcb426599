"""From how many keys the splash kernel is worth it on a TPU, by the compiler's estimates (nothing runs).

    python benchmarks/attention_length.py                    the sites of SDXL at 1024 pixels, on one v5e chip

For queries of 4096 and 1024 tokens, two rows, bfloat16: millions of cycles, and MiB of temporaries, of plain attention and of the kernel.
The compiler estimates no cycles within a kernel: its operations are added at half the chip's peak, an assumption. Needs libtpu.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from instantid_jax.nn.attention import _plain
from instantid_jax.nn.splash import splash_attention
from instantid_jax.parallel.aot import analyze
from instantid_jax.parallel.aot_programs import Stage
from instantid_jax.parallel.chips import topology_devices
from instantid_jax.parallel.mesh import make_mesh

SITES = ((4096, 10), (1024, 20))  # queries and heads of 64 channels
KEYS = (128, 256, 512, 1024, 4096)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    jax.config.update("jax_platforms", "cpu")
    chip, devices = topology_devices("v5e:1x1")
    mesh = make_mesh(devices=devices)
    whole = NamedSharding(mesh, PartitionSpec())

    def told(function, *lengths: int, heads: int) -> tuple[float, float]:
        q, k = (jax.ShapeDtypeStruct((2, n, heads, 64), jnp.bfloat16, sharding=whole) for n in lengths)
        report, _ = analyze(Stage("attention", jax.jit(function), (q, k, k)), chip, 1, mesh)
        return (report.estimated_cycles + report.kernel_cycles) / 1e6, report.hbm_temporary_bytes / 2**20

    print("| queries, heads | keys | plain, Mcycles (MiB) | kernel, Mcycles (MiB) |\n| --- | --- | --- | --- |")
    for queries, heads in SITES:
        for keys in KEYS:
            plain = told(lambda q, k, v: _plain(q, k, v, None), queries, keys, heads=heads)
            kernel = told(splash_attention, queries, keys, heads=heads)
            print(f"| {queries}, {heads} | {keys} | {plain[0]:.2f} ({plain[1]:.0f}) | {kernel[0]:.2f} ({kernel[1]:.0f}) |", flush=True)


if __name__ == "__main__":
    main()
