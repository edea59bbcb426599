"""Full-size networks against PyTorch: SDXL's UNet (2.6 billion parameters) and IdentityNet (1.3 billion), in float32.

    python benchmarks/true_shapes.py                           both, one after the other; latents of 16x16, one picture
    python benchmarks/true_shapes.py --networks identitynet --size 24 --json figures.json

Weights are random but the same on both sides: each is a function of its own path. PyTorch and JAX run in separate
processes one after the other, each filling its parameters tensor by tensor, so that only one copy of one network is ever
in memory: at most 13 GB for the UNet. Prints errors, seconds and peak memory; the exit status is 1 where the largest
relative error of any output exceeds 1e-4.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity")]

BOUND = 1e-4
NETWORKS = ("unet", "identitynet")


def run_torch(name: str, size: int) -> tuple[list[np.ndarray], dict[str, float]]:
    """diffusers' network: outputs as [b, h, w, c], and seconds for weights, first and second call."""
    import torch
    from cases import inputs, torch_residuals, torch_unet_output
    from oracle import nhwc, tensor, to_torch, torch_controlnet, torch_unet

    from instantid_jax.config import sdxl
    from instantid_jax.models import build_networks

    config = sdxl()
    started = time.perf_counter()
    with torch.device("meta"):
        module = torch_unet(config.unet) if name == "unet" else torch_controlnet(config.identitynet)
    module.to_empty(device="cpu")
    unfilled = dict(module.named_parameters())
    for path, shape in build_networks(config)[name].disk_shapes().items():
        ((key, value),) = to_torch({path: tensor(path, shape)}).items()
        unfilled.pop(key).copy_(value)
    if unfilled:
        raise ValueError(f"{name}: no weights for {sorted(unfilled)}")
    seconds = {"weights": time.perf_counter() - started}
    x = inputs(config, (size, size), batch=1)
    for call in ("first call", "second call"):
        started = time.perf_counter()
        outputs = [torch_unet_output(module, x, x.text)] if name == "unet" else torch_residuals(module, x)
        seconds[call] = time.perf_counter() - started
    return [nhwc(y) for y in outputs], seconds


def run_jax(name: str, size: int) -> tuple[list[np.ndarray], dict[str, float]]:
    """This package's network: the same."""
    import jax
    import jax.numpy as jnp
    from cases import inputs

    from instantid_jax.config import sdxl
    from instantid_jax.models import build_networks
    from instantid_jax.models.encoder import AddedConditions

    jax.config.update("jax_default_matmul_precision", "highest")
    config = sdxl()
    network = build_networks(config)[name]
    started = time.perf_counter()
    parameters = jax.block_until_ready(stacked_weights(network))
    seconds = {"weights": time.perf_counter() - started}

    def predict(parameters: Any, x: Any) -> Any:
        module, added = network.bind(parameters), AddedConditions(x.pooled, x.sizes)
        if name == "unet":
            return module(x.sample, x.timestep, module.project_context(x.text), added)
        return module(x.sample, x.timestep, module.project_context(x.tokens), added, module.embed_condition(x.image))

    x = jax.tree.map(jnp.asarray, inputs(config, (size, size), batch=1))
    started = time.perf_counter()
    compiled = jax.jit(predict).lower(parameters, x).compile()
    seconds["compile"] = time.perf_counter() - started
    for call in ("first call", "second call"):
        started = time.perf_counter()
        outputs = jax.block_until_ready(compiled(parameters, x))
        seconds[call] = time.perf_counter() - started
    return [np.asarray(y) for y in jax.tree.leaves(outputs)], seconds


def stacked_weights(network: Any) -> Any:
    """The parameter tree, one tensor at a time: equal layers are written straight into their stack."""
    import jax.numpy as jnp
    from oracle import tensor

    from instantid_jax.paths import flatten, stacked_path, unflatten

    layers: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for path, shape in network.disk_shapes().items():
        layers.setdefault(stacked_path(path)[0], []).append((path, shape))
    tree: dict[str, Any] = {}
    for target, leaf in flatten(network.abstract).items():
        buffer = np.empty(leaf.shape, np.float32)
        for i, (path, shape) in enumerate(layers[target]):
            value = tensor(path, shape)
            if stacked_path(path)[1] is None:
                buffer[...] = value
            else:
                buffer[i] = value
        tree[target] = jnp.asarray(buffer)
    return unflatten(tree)


def side(which: str, name: str, size: int, file: Path) -> None:
    """One child process: runs one side and writes its outputs and figures."""
    outputs, seconds = (run_torch if which == "torch" else run_jax)(name, size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    np.savez(file, *outputs, figures=json.dumps({"seconds": seconds, "peak_gb": peak}))


def compare(name: str, size: int, folder: Path) -> dict[str, Any]:
    """Both sides of one network in turn, and their difference."""
    results = {}
    for which in ("torch", "jax"):
        file = folder / f"{name}_{which}.npz"
        print(f"{name}: {which} ...", flush=True)
        subprocess.run([sys.executable, __file__, "--side", which, "--networks", name, "--size", str(size), "--file", str(file)], check=True)
        with np.load(file) as arrays:
            results[which] = [arrays[f"arr_{i}"].astype(np.float64) for i in range(len(arrays.files) - 1)], json.loads(str(arrays["figures"]))
    (theirs, torch_figures), (ours, jax_figures) = results["torch"], results["jax"]
    pairs = list(zip(ours, theirs, strict=True))
    errors = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]
    rms = [float(np.sqrt(np.square(a - b).mean() / np.square(b).mean())) for a, b in pairs]
    spread = [float(b.std()) for b in theirs]
    return {"max_error": max(errors), "rms_error": max(rms), "outputs": len(pairs), "std": spread, "torch": torch_figures, "jax": jax_figures}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--size", type=int, default=16, help="height and width of the latents (pixels: eight times)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--side", choices=("torch", "jax"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        side(options.side, options.networks[0], options.size, options.file)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        figures = {name: compare(name, options.size, Path(folder)) for name in options.networks}
    for name, result in figures.items():
        print(f"{name}: {result['outputs']} outputs, max relative error {result['max_error']:.2e}, rms {result['rms_error']:.2e}")
        for which in ("torch", "jax"):
            times = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in result[which]["seconds"].items())
            print(f"  {which}: {times}; peak memory {result[which]['peak_gb']:.1f} GB")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return int(any(result["max_error"] > BOUND for result in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
