"""The ceiling that single operations set on this machine: every matrix product and convolution of a guided step, each alone.

    python benchmarks/ceiling.py                              SDXL with IdentityNet at 512 pixels, float32, XLA beside PyTorch
    python benchmarks/ceiling.py --size 32 --json ceiling.json    latents of 32 x 32: 256 pixels

The step is traced as the networks are defined, without the forms that a CPU is given (`nn.winograd`), and not run. Each distinct product
in it is timed alone, in XLA and in PyTorch, in processes of their own; times its number in the step this is what a step would take if
nothing else took time. What `vs_pytorch.py --only step_512` measures beyond that is everything between the products, norms, activations,
softmax, memory, less what other forms save.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from command_line import count, needs, new_file, put

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity"), str(ROOT / "benchmarks")]

LEAST = 0.05
"""Seconds that a measurement takes at least, in as many calls as that needs."""


def products(jaxpr: Any, times: int, found: Counter[str], equations: dict[str, Any]) -> None:
    """Counts the products of a traced function, by what they are; one equation of each kind is kept."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            shapes = [v.aval.shape for v in equation.invars]
            if equation.primitive.name == "dot_general":
                key = f"product {shapes} {equation.params['dimension_numbers']}"
            else:
                key = f"convolution {shapes} stride {equation.params['window_strides'][0]}"
            found[key] += times
            equations[key] = equation
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    products(inner, times * equation.params.get("length", 1), found, equations)


def traced(size: int) -> tuple[Counter[str], dict[str, Any]]:
    """Of a guided step with latents of `size` x `size`."""
    import jax
    import jax.numpy as jnp
    from vs_pytorch import inputs

    from instantid_jax.config import sdxl
    from instantid_jax.models import build_networks
    from instantid_jax.models.encoder import AddedConditions, IdentityContext
    from instantid_jax.nn.platform import as_defined

    config = sdxl()
    networks = build_networks(config)
    x = inputs(config, size)

    def step(parameters: Any, x: Any, features: Any) -> Any:
        unet, net, adapter = (networks[name].bind(parameters[name]) for name in ("unet", "identitynet", "adapter"))
        added = AddedConditions(x.pooled, x.sizes)
        residuals = net(x.sample, x.timestep, net.project_context(x.tokens), added, features)
        identity = IdentityContext(adapter(x.tokens), jnp.float32(1.0))
        return unet(x.sample, x.timestep, unet.project_context(x.text), added, identity=identity, residuals=residuals)

    features = jax.ShapeDtypeStruct((2, size, size, config.unet.block_out_channels[0]), jnp.float32)
    abstract = {name: networks[name].abstract for name in ("unet", "identitynet", "adapter")}
    found: Counter[str] = Counter()
    equations: dict[str, Any] = {}
    with as_defined():
        products(jax.make_jaxpr(step)(abstract, x, features).jaxpr, 1, found, equations)
    return found, equations


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median of a call's seconds."""
    call()
    started = time.perf_counter()
    call()
    inside = max(1, int(LEAST / (time.perf_counter() - started + 1e-9)))
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(inside):
            call()
        taken.append((time.perf_counter() - started) / inside)
    return float(np.median(taken))


def in_xla(equation: Any, a: np.ndarray, b: np.ndarray) -> Callable[[], Any]:
    import jax

    call = jax.jit(lambda a, b: equation.primitive.bind(a, b, **equation.params))
    a, b = jax.device_put(a), jax.device_put(b)
    return lambda: jax.block_until_ready(call(a, b))


def in_torch(equation: Any, a: np.ndarray, b: np.ndarray) -> Callable[[], Any]:
    import torch

    x, y = torch.from_numpy(a), torch.from_numpy(b)
    if equation.primitive.name == "conv_general_dilated":
        x = x.permute(0, 3, 1, 2)  # NHWC in memory: PyTorch's channels last
        y = y.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        stride, padding = equation.params["window_strides"], equation.params["padding"][0][1]
        return lambda: torch.nn.functional.conv2d(x, y, stride=stride, padding=padding)
    (left, right), (left_batch, right_batch) = equation.params["dimension_numbers"]
    rows = [i for i in range(x.ndim) if i not in (*left, *left_batch)]
    columns = [i for i in range(y.ndim) if i not in (*right, *right_batch)]
    x, y = x.permute(*left_batch, *rows, *left), y.permute(*right_batch, *right, *columns)
    count, inner = len(left_batch), int(np.prod([a.shape[i] for i in left]))
    batch = x.shape[:count]
    x, y = x.reshape(*batch, -1, inner), y.reshape(*batch, inner, -1)
    return lambda: torch.matmul(x, y)


def side(framework: str, size: int, repeats: int, file: Path) -> None:
    """Times all products in one framework."""
    found, equations = traced(size)
    told = {}
    if framework == "torch":
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_grad_enabled(False)
    for key, times in found.items():
        equation = equations[key]
        a, b = (np.random.default_rng(0).standard_normal(v.aval.shape, np.float32) for v in equation.invars)
        flops = 2.0 * equation.outvars[0].aval.size
        if equation.primitive.name == "dot_general":
            flops *= np.prod([equation.invars[0].aval.shape[i] for i in equation.params["dimension_numbers"][0][0]])
        else:
            flops *= np.prod(equation.invars[1].aval.shape[:3])
        call = (in_torch if framework == "torch" else in_xla)(equation, a, b)
        told[key] = {"count": times, "flops": float(flops), "seconds": seconds(call, repeats)}
    file.write_text(json.dumps(told))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=count, default=64, help="height and width of the latents; pixels are eight times as many")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--rows", type=count, default=12, help="how many of the dearest to print")
    parser.add_argument("--json", type=new_file)
    parser.add_argument("--side", choices=("xla", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        side(options.side, options.size, options.repeats, options.json)
        return 0
    needs(parser, "torch", "diffusers")
    told = {}
    with tempfile.TemporaryDirectory() as folder:
        for framework in ("xla", "torch"):
            file = Path(folder) / f"{framework}.json"
            command = [sys.executable, __file__, "--side", framework, "--size", str(options.size), "--repeats", str(options.repeats)]
            subprocess.run([*command, "--json", str(file)], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
            told[framework] = json.loads(file.read_text())
    ours, theirs = told["xla"], told["torch"]
    for key in sorted(ours, key=lambda k: -ours[k]["count"] * ours[k]["seconds"])[: options.rows]:
        row, speeds = ours[key], [side[key]["flops"] / side[key]["seconds"] / 1e9 for side in (ours, theirs)]
        print(f"{row['count']:5} x {row['seconds'] * 1e3:9.2f} ms  XLA {speeds[0]:5.0f}  PyTorch {speeds[1]:5.0f} GFLOP/s  {key}")
    for kind in ("product", "convolution", ""):
        sums = [sum(r["count"] * r["seconds"] for k, r in side.items() if k.startswith(kind)) for side in (ours, theirs)]
        total = sum(r["count"] * r["flops"] for k, r in ours.items() if k.startswith(kind))
        name = f"all {kind}s" if kind else "together"
        print(f"{name:17} {total / 1e12:6.2f} TFLOP  XLA {sums[0]:7.2f} s  PyTorch {sums[1]:7.2f} s")
    if options.json:
        put(options.json, json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
