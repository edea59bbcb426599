"""A 3x3 convolution in float32 on this CPU: as it is defined, and by Winograd's tiles (`nn.winograd`), which `nn.conv` takes for large pictures.

python benchmarks/convolutions.py          shapes of SDXL's UNet at 512 pixels (two rows) and of its autoencoder

Every shape has as many kernels as fill 150 MB, one after the other in one program, so that they come from memory as in a network.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from instantid_jax.nn.conv import resize_nearest
from instantid_jax.nn.winograd import conv3x3_of_doubled, conv3x3_winograd

BYTES = 150e6
SHAPES = ((2, 64, 320), (2, 32, 640), (2, 16, 1280), (1, 128, 512), (1, 256, 256), (1, 512, 128))
DOUBLED = ((2, 16, 1280), (2, 32, 640))


def as_defined(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def doubled_as_defined(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return as_defined(resize_nearest(x, (2 * x.shape[1], 2 * x.shape[2])), kernel)


def milliseconds(form: Callable[[jax.Array, jax.Array], jax.Array], shape: tuple[int, int, int], repeats: int) -> float:
    """Of one convolution; the least of `repeats`."""
    rows, side, channels = shape
    rng = np.random.default_rng(0)
    kernels = [
        jnp.asarray(rng.standard_normal((3, 3, channels, channels), np.float32)) for _ in range(min(20, math.ceil(BYTES / (36 * channels**2))))
    ]
    x = jnp.asarray(rng.standard_normal((rows, side, side, channels), np.float32))

    @jax.jit
    def all_of_them(x: jax.Array, kernels: list[jax.Array]) -> jax.Array:
        total = jnp.float32(0)
        for kernel in kernels:  # each needs the one before, so that one runs at a time
            total = jnp.mean(form(x + total, kernel)) * 1e-6
        return total

    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(all_of_them(x, kernels))
        taken.append(time.perf_counter() - started)
    return 1000 * min(taken[1:]) / len(kernels)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print("| rows, side, channels | as defined, ms | by tiles, ms | ratio |\n| --- | --- | --- | --- |", flush=True)
    cases = [(shape, as_defined, conv3x3_winograd, "") for shape in SHAPES]
    cases += [(shape, doubled_as_defined, conv3x3_of_doubled, ", enlarged by two") for shape in DOUBLED]
    for shape, defined, tiles, what in cases:
        a, b = (milliseconds(form, shape, repeats) for form in (defined, tiles))
        print(f"| {', '.join(map(str, shape))}{what} | {a:.1f} | {b:.1f} | {a / b:.2f} |", flush=True)


if __name__ == "__main__":
    main()
