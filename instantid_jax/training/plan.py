"""What a run would need, told before it begins: memory and FLOPs of the step, and where every weight would lie.

Neither needs data or weights, and nothing is allocated.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from instantid_jax.nn.placement import SMALL
from instantid_jax.parallel.mesh import abstract_mesh, make_mesh
from instantid_jax.parallel.rules import partition_spec
from instantid_jax.paths import flatten
from instantid_jax.training.config import TrainConfig
from instantid_jax.training.program import Program

__all__ = ["dry_run", "explain_sharding"]


def dry_run(config: TrainConfig) -> str:
    """Compiles the step of a run for the devices at hand and tells its memory and FLOPs; trains nothing."""
    program = Program(config, make_mesh(**dataclasses.asdict(config.mesh)))
    step = program.compiled(program.abstract_state, program.abstract_frozen, program.abstract_batch())
    memory: Any = step.call.memory_analysis()
    costs: Any = step.call.cost_analysis() or {}
    trained, frozen = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (program.abstract_state.parameters, program.abstract_frozen))
    rows = [
        f"step of {config.stage.objective}: batch {config.loader.global_batch} on {jax.device_count()} x {jax.devices()[0].device_kind}",
        f"compiled in {step.seconds:.1f} s",
        f"parameters: {trained:,} trained, {frozen:,} frozen",
        f"FLOPs a step, matrix products and convolutions, all devices: {step.flops:.4g}",
        f"FLOPs a step and device by XLA's count, which takes loop bodies once: {costs.get('flops', float('nan')):.4g}",
    ]
    if memory is not None:
        parts = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes, "output": memory.output_size_in_bytes}
        rows.append(
            "memory a device: " + ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items()) + " (the output replaces the state)"
        )
    return "\n".join(rows)


def explain_sharding(config: TrainConfig) -> str:
    """A table of path, shape, partition and bytes a device for every weight of a run, on any number of devices."""
    mesh = abstract_mesh(**dataclasses.asdict(config.mesh))
    program = Program(config, mesh)
    rows = [("", "path", "shape", "partition", "bytes a device")]
    totals: dict[str, int] = {}
    whole = 0

    def share(path: str, leaf: Any) -> tuple[Any, int]:
        spec = partition_spec(path, leaf.shape, mesh)
        shards = math.prod(mesh.shape[axis] for axis in spec if axis is not None)
        return spec, leaf.size * leaf.dtype.itemsize // shards

    for title, tree in (("trained", program.abstract_state.parameters), ("frozen", program.abstract_frozen)):
        for path, leaf in flatten(tree).items():
            spec, local = share(path, leaf)
            totals[title] = totals.get(title, 0) + local
            if config.mesh.fsdp > 1 and leaf.size >= SMALL and "fsdp" not in spec:
                whole += local
            rows.append((title, path, "x".join(map(str, leaf.shape)), str(tuple(spec)) if any(spec) else "replicated", f"{local:,}"))
    for title, tree in (("optimizer", program.abstract_state.optimizer), ("moving average", program.abstract_state.ema)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            totals[title] = totals.get(title, 0) + share(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)[1]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.rjust(w) if i == 4 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
    lines += [f"{title}: {total / 2**20:,.1f} MiB a device" for title, total in totals.items()]
    if whole:
        lines.append(f"not split over fsdp, as no axis divides by {config.mesh.fsdp}: {whole / 2**20:,.1f} MiB of weights a device")
    return "\n".join(lines)
