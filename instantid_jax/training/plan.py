"""What a run would need, told before it begins: memory and FLOPs of the step, and where every weight would lie."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from instantid_jax.parallel.mesh import make_mesh
from instantid_jax.parallel.rules import partition_spec
from instantid_jax.paths import flatten
from instantid_jax.training.config import TrainConfig
from instantid_jax.training.loop import Run
from instantid_jax.training.networks import training_networks
from instantid_jax.training.state import split

__all__ = ["dry_run", "explain_sharding"]


def dry_run(config: TrainConfig) -> str:
    """Compiles the step of a run for the devices at hand and tells its memory and FLOPs; trains nothing."""
    run = Run(config)
    batch = run.global_batch(next(run.loader))
    run.loader.close()
    began = time.perf_counter()
    compiled = run.step.lower(run.state, run.frozen, batch, np.float32(np.inf)).compile()
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis() or {}
    trained = sum(x.size for x in jax.tree.leaves(run.state.parameters))
    frozen = sum(x.size for x in jax.tree.leaves(run.frozen))
    rows = [
        f"step of {config.stage.objective}: batch {config.loader.global_batch} on {jax.device_count()} x {jax.devices()[0].device_kind}",
        f"compiled in {seconds:.1f} s",
        f"parameters: {trained:,} trained, {frozen:,} frozen",
        f"FLOPs a device and step: {costs.get('flops', float('nan')):.4g}",
    ]
    if memory is not None:
        parts = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes, "output": memory.output_size_in_bytes}
        rows.append("bytes a device: " + ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items()))
    return "\n".join(rows)


def explain_sharding(config: TrainConfig) -> str:
    """A table of path, shape, partition and bytes a device for every weight of a run; allocates nothing."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    trained, frozen = split({name: network.abstract for name, network in training_networks(config).items()}, config.stage)
    rows, totals = [("", "path", "shape", "partition", "bytes a device")], {}
    for title, tree, size in (("trained", trained, 4), ("frozen", frozen, np.dtype(config.frozen_dtype).itemsize if config.frozen_dtype == "float32" else 2)):
        for path, leaf in flatten(tree).items():
            spec = partition_spec(path, tuple(leaf.shape), mesh)
            shards = int(np.prod([mesh.shape[axis] for axis in spec if axis is not None], initial=1))
            local = int(np.prod(leaf.shape)) * size // shards
            totals[title] = totals.get(title, 0) + local
            rows.append((title, path, "x".join(map(str, leaf.shape)), str(tuple(spec)) if any(spec) else "replicated", f"{local:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.rjust(w) if i == 4 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
    return "\n".join([*lines, *(f"{title}: {total / 2**20:,.1f} MiB a device" for title, total in totals.items())])
