"""How seconds and memory grow with pixels, pictures and steps, on this machine.

    python benchmarks/growth.py                        a model of 0.3 billion parameters, float32
    python benchmarks/growth.py --model portraits --json growth.json

One step of IdentityNet and UNet with guidance at 256 to 1024 pixels, for 1 to 8 pictures of 256 pixels, and taken 1 to 8 times in a row.
Seconds are medians of `--repeats` after an untimed call, memory is XLA's plan for what is needed beside weights and inputs. Exponents are
fitted to log y = a + k log x: 1 is proportional, 2 is what attention's scores alone would do with pixels.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "parity"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from vs_pytorch import clock, jax_step_program, middle_model

SIDES, PICTURES, STEPS = (256, 384, 512, 768, 1024), (1, 2, 4, 8), (1, 2, 4, 8)


def exponent(x: Any, y: Any) -> float:
    """Slope of the line through (log x, log y)."""
    return float(np.polyfit(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)), 1)[0])


def measure(compiled: Any, arguments: Any, repeats: int, steps: int = 1) -> dict[str, float]:
    """Median seconds and planned bytes of a compiled step, taken `steps` times in a row."""
    import jax

    def run() -> Any:
        result = None
        for _ in range(steps):
            result = compiled(*arguments)
        return jax.block_until_ready(result)

    seconds, _ = clock(run, repeats)
    return {"seconds": float(np.median(seconds)), "bytes": float(compiled.memory_analysis().temp_size_in_bytes)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("middle", "portraits"), default="middle")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    from true_shapes import stacked_weights

    from instantid_jax.config import portraits
    from instantid_jax.models import build_networks

    config = middle_model() if options.model == "middle" else portraits()
    scale = 1 if options.model == "middle" else 4  # the small model draws a quarter of the pixels
    networks = build_networks(config)
    weights = {name: stacked_weights(networks[name]) for name in ("unet", "identitynet", "adapter")}
    figures: dict[str, Any] = {"pixels": {}, "pictures": {}, "steps": {}}
    for side in SIDES:
        compiled, inputs, _ = jax_step_program(config, side // scale // config.vae.downscale, 2, weights)
        figures["pixels"][side // scale] = told = measure(compiled, inputs, options.repeats)
        print(f"{side // scale:5} pixels    {told['seconds']:8.3f} s  {told['bytes'] / 2**20:8.0f} MiB", flush=True)
        if side == SIDES[0]:
            for steps in STEPS:
                figures["steps"][steps] = told = measure(compiled, inputs, options.repeats, steps)
                print(f"{steps:5} steps     {told['seconds']:8.3f} s  {told['bytes'] / 2**20:8.0f} MiB", flush=True)
    for count in PICTURES:
        compiled, inputs, _ = jax_step_program(config, SIDES[0] // scale // config.vae.downscale, 2 * count, weights)
        figures["pictures"][count] = told = measure(compiled, inputs, options.repeats)
        print(f"{count:5} pictures  {told['seconds']:8.3f} s  {told['bytes'] / 2**20:8.0f} MiB", flush=True)
    for what, rows in figures.items():
        x = [key**2 for key in rows] if what == "pixels" else list(rows)
        powers = {unit: exponent(x, [row[unit] for row in rows.values()]) for unit in ("seconds", "bytes")}
        rows["exponents"] = powers
        print(f"{what}: seconds grow with the power {powers['seconds']:.2f}, memory with {powers['bytes']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
