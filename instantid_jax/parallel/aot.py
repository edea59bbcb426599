"""Compiles the real programs for TPUs that are not at hand, and tells what they would need.

    python -m instantid_jax.parallel.aot --topology v5e:4x4 --program train --config configs/instantid.py --json FILE

Nothing of the model's size is allocated: programs are compiled from shapes. What is told of time is the compiler's own
estimate in cycles, never a measurement. A topology is a generation and its chips, as v5e:1x1, v5e:4x4, v5p:2x2x2; 2*v5e:4x4 is
two slices. The exit status is 0, 4 where the plan does not fit into the memory, 2 for a wrong option, 1 for another error. Needs libtpu:
pip install -e ".[tpu]".
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # before JAX looks for devices
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from instantid_jax.options import status_of, while_read, wrong_options
from instantid_jax.parallel import hlo
from instantid_jax.parallel.chips import Chip, TopologyError, parse_topology, topology_devices
from instantid_jax.parallel.flops import kernel_flops
from instantid_jax.parallel.mesh import make_mesh

if TYPE_CHECKING:
    from instantid_jax.config import ComputeConfig, ModelConfig
    from instantid_jax.parallel.aot_programs import Stage
    from instantid_jax.training.config import TrainConfig

__all__ = ["PROGRAMS", "Plan", "StageReport", "analyze", "compile_plan", "main", "recipe_plan", "table", "tell"]

PROGRAMS = ("unet", "sample", "train")
_MOSAIC = "tpu_custom_call"
EXIT_TOO_LARGE = 4
"""Exit status of a plan that does not fit."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to compile, and for which machine."""

    topology: str
    program: str
    model: ModelConfig
    compute: ComputeConfig
    recipe: TrainConfig | None = None
    """What is trained, for the program "train"."""
    data: int | None = None
    fsdp: int | None = None
    """Devices along each axis. By default training splits weights over a slice (`data` over the slices), sampling whole pictures."""
    tensor: int = 1
    batch: int | None = None
    """Training: pictures a step. Sampling: pictures (with guidance twice as many rows). UNet: rows. By default 1, 1 and 2 a device, all of
    `tensor` being one."""
    steps: int = 30
    """Denoising steps."""
    size: tuple[int, int] = (1024, 1024)
    """Height and width in pixels, of sampling and of the UNet."""
    int8: bool = False
    """Sampling: kernels of UNet and IdentityNet in 8 bits."""


@dataclasses.dataclass(frozen=True)
class StageReport:
    """One compiled program on one chip."""

    name: str
    hbm_argument_bytes: int
    hbm_temporary_bytes: int
    hbm_output_bytes: int
    hbm_resident_bytes: int
    """Weights of the other programs, which stay in memory."""
    hbm_peak_bytes: int
    flops: float
    """Of matrix products and convolutions as compiled, kernels included."""
    kernel_flops: float
    """The part within Pallas kernels, by arithmetic."""
    flops_minimum: float
    hbm_bytes_accessed: float
    estimated_cycles: float
    """The compiler's, without custom calls."""
    kernel_cycles: float
    """Kernels at half the chip's peak: an assumption."""
    uncounted: dict[str, float]
    """Calls of custom calls, for which the compiler estimates no cycles."""
    collective_bytes: dict[str, float]
    collective_minimum_bytes: float
    """The fewest that split weights need; 0 where none are."""
    largest_replicated_bytes: int
    """Of what is whole on every device although it could be split."""
    crossing_bytes: float
    """The part of the collectives that goes between slices."""
    compile_seconds: float
    compile_cpu_seconds: float
    """Of all threads together: what a machine that was busy with other work took."""
    fits: bool = True
    error: str | None = None


def analyze(stage: Stage, chip: Chip, slices: int, mesh: jax.sharding.Mesh, dump: Path | None = None) -> tuple[StageReport, Any]:
    """Compiles a program and reads what it would do on one device; its text is in `dump` before it is read."""
    minimum = stage.minimum() / mesh.size
    with jax.set_mesh(mesh):
        began, worked = time.perf_counter(), time.process_time()
        traced = stage.function.trace(*stage.arguments)
        inside = kernel_flops(traced.jaxpr)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            return _too_large(stage, str(error), minimum, time.perf_counter() - began, time.process_time() - worked), None
        seconds, busy = time.perf_counter() - began, time.process_time() - worked
    text = compiled.as_text()
    if dump is not None:
        (dump / f"{stage.name}.hlo.txt").write_text(text, encoding="utf-8")
    memory: Any = compiled.memory_analysis()
    own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    peak = own + memory.generated_code_size_in_bytes + stage.resident
    report = StageReport(
        name=stage.name,
        hbm_argument_bytes=memory.argument_size_in_bytes,
        hbm_temporary_bytes=memory.temp_size_in_bytes,
        hbm_output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        hbm_resident_bytes=stage.resident,
        hbm_peak_bytes=peak,
        **account(text, inside, chip, mesh, slices),
        flops_minimum=minimum,
        collective_minimum_bytes=stage.collective_minimum,
        largest_replicated_bytes=stage.largest_whole,
        compile_seconds=seconds,
        compile_cpu_seconds=busy,
        fits=peak <= chip.hbm_bytes,
    )
    return report, compiled


def account(text: str, kernels: float, chip: Chip, mesh: jax.sharding.Mesh, slices: int) -> dict[str, Any]:
    """What a compiled program's text says of one device, by the names of `StageReport`; `kernels` are the FLOPs within its kernels."""
    work = hlo.costs(hlo.parse(text), mesh.size // slices if slices > 1 else None)
    return {
        "flops": work.flops + kernels,
        "kernel_flops": kernels,
        "hbm_bytes_accessed": work.hbm_bytes,
        "estimated_cycles": work.cycles,
        "kernel_cycles": 2 * kernels / chip.flops_per_cycle,
        "uncounted": work.uncounted,
        "collective_bytes": work.collectives,
        "crossing_bytes": work.crossing,
    }


def _too_large(stage: Stage, message: str, minimum: float, seconds: float, busy: float) -> StageReport:
    """A program that the compiler refuses for its size; anything else is raised."""
    used = re.search(r"Used ([\d.]+)([TGMK]) of ([\d.]+[GMK])", message) or re.search(
        r"\(([\d.]+)([TGMK])\) exceeds available HBM \(([\d.]+[GMK])\)", message
    )
    if used is None:
        raise ValueError(f"{stage.name} does not compile: {message.splitlines()[0]}")
    needed = int(float(used.group(1)) * {"T": 2**40, "G": 2**30, "M": 2**20, "K": 2**10}[used.group(2)])
    nothing: dict[str, Any] = dict.fromkeys((f.name for f in dataclasses.fields(StageReport)), 0)
    told = {
        "name": stage.name,
        "uncounted": {},
        "collective_bytes": {},
        "hbm_resident_bytes": stage.resident,
        "hbm_peak_bytes": needed + stage.resident,
        "flops_minimum": minimum,
        "compile_seconds": seconds,
        "compile_cpu_seconds": busy,
        "fits": False,
        "error": f"needs {used.group(1)}{used.group(2)}iB of {used.group(3)}iB",
    }
    return StageReport(**nothing | told)


def _batch(plan: Plan, mesh: jax.sharding.Mesh) -> int:
    return plan.batch or mesh.shape["data"] * mesh.shape["fsdp"] * (2 if plan.program == "unet" else 1)


def stages(plan: Plan, mesh: jax.sharding.Mesh) -> list[Stage]:
    """The programs of a plan."""
    from instantid_jax.parallel import aot_programs as programs

    if plan.program == "train":
        if plan.recipe is None:
            raise TopologyError("the program train needs a recipe: --config FILE")
        with wrong_options():
            loader = dataclasses.replace(plan.recipe.loader, global_batch=_batch(plan, mesh))
            return programs.train_stages(dataclasses.replace(plan.recipe, compute=plan.compute, loader=loader), mesh)
    if plan.program == "sample":
        return programs.sample_stages(plan.model, plan.compute, mesh, _batch(plan, mesh), plan.size, plan.steps, int8=plan.int8)
    return programs.unet_stages(plan.model, plan.compute, mesh, _batch(plan, mesh), plan.size)


def make_plan_mesh(plan: Plan) -> tuple[Chip, jax.sharding.Mesh]:
    """The chip and the mesh of a plan."""
    for name in ("data", "fsdp", "tensor", "batch", "steps"):
        if (value := getattr(plan, name)) is not None and value < 1:
            raise TopologyError(f"--{name} must be at least 1, not {value}")
    if plan.program != "train" and any(side < 1 or side % plan.model.vae.downscale for side in plan.size):
        raise TopologyError(f"height and width must be multiples of {plan.model.vae.downscale}, not {plan.size[0]} and {plan.size[1]}")
    if plan.int8 and plan.program != "sample":
        raise TopologyError(f"--weights-dtype int8 is for the program sample, not for {plan.program}")
    _, _, slices = parse_topology(plan.topology)
    chip, devices = topology_devices(plan.topology)
    axes = {name: getattr(plan, name) for name in ("data", "fsdp", "tensor") if getattr(plan, name) is not None}
    if len(devices) % math.prod(axes.values()):
        asked = " x ".join(f"{name} {value}" for name, value in axes.items())
        raise TopologyError(f"{plan.topology} has {len(devices)} devices, which {asked} does not divide; set --data, --fsdp and --tensor to match")
    count = len(devices) // plan.tensor
    if plan.program == "train":
        data = plan.data or (slices if plan.fsdp is None else count // plan.fsdp)
        fsdp = plan.fsdp or count // data
    else:
        fsdp = plan.fsdp or 1
        data = plan.data or count // fsdp
        if (plan.batch or 0) % (data * fsdp):
            raise TopologyError(f"a batch of {plan.batch} cannot be spread over data {data} x fsdp {fsdp}; ask for a multiple of {data * fsdp}")
    if data * fsdp * plan.tensor != len(devices) or data % slices:
        whole = f", and slices lie along data: a multiple of {slices}" if slices > 1 else ""
        raise TopologyError(f"a mesh of {data} x {fsdp} x {plan.tensor} is not that of {plan.topology}, which has {len(devices)} devices{whole}")
    return chip, make_mesh(data // slices, fsdp, plan.tensor, dcn_data=slices, devices=devices)  # in the order in which a run would have them


def compile_plan(plan: Plan, say: Any = None, dump: Path | None = None) -> dict[str, Any]:
    """Compiles a plan's programs; returns what the command line writes as JSON. Raises TopologyError, ValueError."""
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed JAX would look for a TPU, and complain
    if plan.program not in PROGRAMS:
        raise TopologyError(f"there is no program {plan.program!r}; there are {', '.join(PROGRAMS)}")
    chip, mesh = make_plan_mesh(plan)
    slices = parse_topology(plan.topology)[2]
    reports = []
    for stage in stages(plan, mesh):
        if say is not None:
            say(f"{stage.name}: compiling for {plan.topology}; at full size that takes minutes")
        report, _ = analyze(stage, chip, slices, mesh, dump)
        reports.append(report)
        if say is not None:
            say(f"{report.name}: compiled in {report.compile_seconds:.0f} s")
    unit = 1 if sys.platform == "darwin" else 1024
    return summary(plan, chip, mesh, reports) | {"compile_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def recount(plan: Plan, recorded: dict[str, Any], dump: Path) -> dict[str, Any]:
    """The figures of a plan that was compiled before, from the texts in `dump`: memory and seconds, of compiling too, stay as `recorded`.

    For when the reading of texts, or the minimum, has changed. A program that was refused has no text. Raises TopologyError, ValueError, OSError.
    """
    jax.config.update("jax_platforms", "cpu")
    chip, mesh = make_plan_mesh(plan)
    slices = parse_topology(plan.topology)[2]
    programs, planned, figures = recorded.get("programs", ()), list(stages(plan, mesh)), {field.name for field in dataclasses.fields(StageReport)}
    if [old.get("name") for old in programs] != [stage.name for stage in planned] or any(old.keys() != figures for old in programs):
        raise TopologyError("--recount needs the figures that --json wrote for this plan, and the file has other ones")
    reports = []
    for stage, old in zip(planned, programs, strict=True):
        found = {"flops_minimum": stage.minimum() / mesh.size, "collective_minimum_bytes": stage.collective_minimum}
        found["largest_replicated_bytes"] = stage.largest_whole
        if old["error"] is None:
            text = (dump / f"{stage.name}.hlo.txt").read_text(encoding="utf-8")
            found |= account(text, old["kernel_flops"], chip, mesh, slices)
        reports.append(StageReport(**old | found))
    return summary(plan, chip, mesh, reports) | {"compile_memory_bytes": recorded.get("compile_memory_bytes")}


def summary(plan: Plan, chip: Chip, mesh: jax.sharding.Mesh, reports: list[StageReport]) -> dict[str, Any]:
    """The sum of the programs, on one device."""
    collectives: dict[str, float] = {}
    for report in reports:
        for kind, count in report.collective_bytes.items():
            collectives[kind] = collectives.get(kind, 0) + count
    flops, moved = sum(r.flops for r in reports), sum(r.hbm_bytes_accessed for r in reports)
    crossing = sum(r.crossing_bytes for r in reports)
    sent = sum(collectives.values()) + collectives.get("all-reduce", 0.0)  # a ring sends what it reduces twice, to sum and to spread it
    peak = max(r.hbm_peak_bytes for r in reports)
    seconds = {
        "compute": flops / chip.flops,
        "memory": moved / chip.hbm_bandwidth,
        "interconnect": (sent - crossing) / chip.ici_bandwidth + crossing / chip.dcn_bandwidth,
    }
    known = all(r.error is None for r in reports)  # of a program that was refused only its size is
    return {
        "topology": plan.topology,
        "program": plan.program,
        "mesh": dict(mesh.shape),
        "batch": _batch(plan, mesh),
        "jax": jax.__version__,
        "hbm_peak_bytes": peak,
        "hbm_limit_bytes": chip.hbm_bytes,
        "fits": all(r.fits for r in reports),
        "flops": flops if known else None,
        "flops_minimum": sum(r.flops_minimum for r in reports),
        "hbm_bytes_accessed": moved if known else None,
        "estimated_cycles": sum(r.estimated_cycles for r in reports) if known else None,
        "kernel_cycles_at_half_peak": sum(r.kernel_cycles for r in reports) if known else None,
        "collective_bytes": collectives if known else None,
        "collective_minimum_bytes": sum(r.collective_minimum_bytes for r in reports),
        "largest_replicated_bytes": max(r.largest_replicated_bytes for r in reports),
        "slice_crossing_bytes": crossing if known else None,
        "compile_seconds": sum(r.compile_seconds for r in reports),
        "compile_cpu_seconds": sum(r.compile_cpu_seconds for r in reports),
        "bound_by": max(seconds, key=lambda name: seconds[name]) if known else None,
        "roofline_shares": {name: value / max(sum(seconds.values()), 1e-30) for name, value in seconds.items()} if known else None,
        "programs": [dataclasses.asdict(r) for r in reports],
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    mib = 2**20
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    lines = [f"{result['program']} on {result['topology']}, mesh {mesh}; figures are of one device"]
    head = (
        "program",
        "arguments",
        "temporaries",
        "output",
        "resident",
        "peak MiB",
        "TFLOP",
        "/ minimum",
        "GB moved",
        "Mcycles",
        "+ kernels",
        "compile s",
        "CPU s",
    )
    rows: list[tuple[str, ...]] = [head]
    for r in result["programs"]:
        ratio = f"{r['flops'] / r['flops_minimum']:.3f}" if r["flops_minimum"] else "-"
        sizes = (r[f"hbm_{name}_bytes"] for name in ("argument", "temporary", "output", "resident", "peak"))
        numbers = [f"{n / mib:,.0f}" for n in sizes]
        work = [f"{r['flops'] / 1e12:.3f}", ratio, f"{r['hbm_bytes_accessed'] / 1e9:.2f}"]
        work += [f"{r['estimated_cycles'] / 1e6:.1f}", f"{r['kernel_cycles'] / 1e6:.1f}"]
        numbers += ["-"] * len(work) if r["error"] else work
        rows.append((r["name"], *numbers, f"{r['compile_seconds']:.0f}", f"{r['compile_cpu_seconds']:.0f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines += ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
    lines += [f"{r['name']}: does not fit: {r['error']}" for r in result["programs"] if r["error"]]
    peak, limit = result["hbm_peak_bytes"], result["hbm_limit_bytes"]
    lines.append(f"HBM: peak {peak / 2**30:.2f} GiB of {limit / 2**30:.2f} GiB: {'fits' if result['fits'] else 'does not fit'}")
    if result["compile_memory_bytes"]:
        lines.append(f"compiling took up to {result['compile_memory_bytes'] / 2**30:.1f} GiB of this machine's memory")
    if result["bound_by"] is None:
        return "\n".join([*lines, "a program that does not compile tells nothing else"])
    kinds = ", ".join(f"{kind} {count / mib:,.1f} MiB" for kind, count in sorted(result["collective_bytes"].items())) or "none"
    least, total = result["collective_minimum_bytes"], sum(result["collective_bytes"].values())
    bound = f"; {total / least:.2f} x what FSDP moves, {least / 2**30:.2f} GiB" if least else ""
    lines.append(f"collectives: {kinds}{bound}")
    if least:
        lines.append(f"largest array that is whole on every device: {result['largest_replicated_bytes'] / mib:.2f} MiB")
    left = collections.Counter()
    for r in result["programs"]:
        left.update(r["uncounted"])
    lines.append(
        "cycles: the compiler's estimates; custom calls have none"
        + (f" ({', '.join(f'{n} x {c:,.0f}' for n, c in left.items())}); kernels count at half the chip's peak" if left else "")
    )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["roofline_shares"].items())
    lines.append(f"roofline: {result['bound_by']} bound (shares of the three times: {shares})")
    return "\n".join(lines)


def recipe_plan(topology: str, recipe: TrainConfig) -> Plan:
    """The training step of a recipe as it stands: its batch, and its mesh unless that is one device.

    Raises TopologyError where the recipe's slices (`mesh.dcn_data`) are not those of the topology."""
    shape, slices = recipe.mesh, parse_topology(topology)[2]
    one = shape.dcn_data * shape.data * shape.fsdp * shape.tensor == 1
    if not one and shape.dcn_data != slices:
        raise TopologyError(f"mesh.dcn_data is {shape.dcn_data}, but {topology} is {slices} slice{'s' if slices > 1 else ''}; set one to the other")
    data, fsdp, tensor = (None, None, 1) if one else (shape.dcn_data * shape.data, shape.fsdp, shape.tensor)
    return Plan(topology, "train", recipe.model, recipe.compute, recipe, data, fsdp, tensor, recipe.loader.global_batch)


def tell(plan: Plan, file: Path | None = None, dump: Path | None = None, recorded: Path | None = None) -> int:
    """Prints the table of a plan, progress on the standard error, and writes the figures to `file` as JSON; `recorded` is for `recount`.

    Returns the exit status: 0, or 4 where the plan does not fit into the memory. Raises TopologyError, ValueError.
    """
    if file is not None:
        _reserve(file)
    if recorded is not None:
        if dump is None:
            raise TopologyError("--recount needs the folder of the texts: --dump DIR")
        result = recount(plan, _figures(recorded), dump)
    else:
        if dump is not None:
            try:
                dump.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TopologyError(f"no texts can be written to {dump}: {error.strerror}; name a folder that may be made") from error
        result = compile_plan(plan, lambda line: print(line, file=sys.stderr, flush=True), dump)
    print(table(result), flush=True)
    if file is not None:
        new = file.with_name(f"{file.name}.new")
        new.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        new.replace(file)
    return 0 if result["fits"] else EXIT_TOO_LARGE


def _figures(file: Path) -> dict[str, Any]:
    """What --json wrote. Raises TopologyError for another file."""
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TopologyError(f"--recount cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise TopologyError(f"--recount needs figures that --json wrote, and {file} is no JSON") from error
    if not isinstance(figures, dict):
        raise TopologyError(f"--recount needs figures that --json wrote, and {file} holds no such table")
    return figures


def _reserve(file: Path) -> None:
    """Raises TopologyError where the figures could not be written: it takes long to make them."""
    if not file.absolute().parent.is_dir():
        raise TopologyError(f"no figures can be written to {file}: there is no folder {file.absolute().parent}")
    if file.is_dir():
        raise TopologyError(f"no figures can be written to {file}: it is a folder; name a file in it")
    new = file.with_name(f"{file.name}.new")
    try:
        new.touch()
        new.unlink()
    except OSError as error:
        raise TopologyError(f"no figures can be written to {file}: {error.strerror}; name a file in a folder that may be written to") from error


@while_read
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 4 where the plan does not fit into the memory."""
    parser = argparse.ArgumentParser(prog="python -m instantid_jax.parallel.aot", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--topology", required=True, help="as v5e:4x4; 2*v5e:4x4 is two slices")
    parser.add_argument("--program", required=True, choices=PROGRAMS)
    parser.add_argument("--config", default="configs/instantid.py", help="recipe whose model, arithmetic and sizes are taken")
    parser.add_argument("--data", type=int, help="devices along the axis data of the mesh, whole slices first")
    parser.add_argument("--fsdp", type=int, help="devices along fsdp; training: by default all of a slice")
    parser.add_argument("--tensor", type=int, default=1, help="devices along tensor")
    parser.add_argument("--batch", type=int, help="training, sampling: pictures in all, by default one a device; unet: rows, by default two a device")
    parser.add_argument("--steps", type=int, help="sampling: denoising steps, 30 by default")
    parser.add_argument("--size", type=int, help="sampling, unet: height and width in pixels, 1024 by default; training has its recipe's")
    parser.add_argument("--remat", help="compute.remat of the recipe: none, dots, blocks, offload or full")
    parser.add_argument("--dtype", help="compute.dtype of the recipe")
    parser.add_argument("--weights-dtype", choices=("int8",), help="sampling: hold the kernels of UNet and IdentityNet in 8 bits")
    parser.add_argument("--attention", help="compute.attention of the recipe")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--dump", type=Path, help="folder for the compiled programs' text")
    parser.add_argument("--recount", type=Path, help="figures written by --json: read the texts in --dump again, and compile nothing")
    given = parser.parse_args(arguments)
    from instantid_jax.training.recipes import load_recipe  # needs the packages of training

    try:
        changes = {name: getattr(given, name) for name in ("remat", "attention", "dtype") if getattr(given, name) is not None}
        with wrong_options():
            config = load_recipe(given.config)
            config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, **changes))
        for name, programs in (("steps", ("sample",)), ("size", ("sample", "unet"))):
            if getattr(given, name) is not None and given.program not in programs:
                raise TopologyError(f"--{name} takes no part in the program {given.program}; leave it out")
        changed: dict[str, Any] = {name: getattr(given, name) for name in ("data", "fsdp", "tensor", "batch")}
        changed |= {} if given.steps is None else {"steps": given.steps}
        changed |= {} if given.size is None else {"size": (given.size, given.size)}
        plan = Plan(given.topology, given.program, config.model, config.compute, config, **changed, int8=given.weights_dtype is not None)
        return tell(plan, given.json, given.dump, given.recount)
    except KeyboardInterrupt:
        print("aot: stopped; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"aot: {error}", file=sys.stderr)
        return status_of(error)


if __name__ == "__main__":
    raise SystemExit(main())
