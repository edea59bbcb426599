"""Trains in a process of its own and writes what happened: ``python training_worker.py '{"out": ..., "mesh": [1, 2, 2], ...}'``.

OUT/told-P.json of process P has the losses and gradient norms of every step, the records of its batches and the leaves that are
split; OUT/state.npz the final state. Parameters of any size are split, so that small networks meet what large ones do.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import small

from instantid_jax.nn import placement
from instantid_jax.parallel import mesh
from instantid_jax.parallel.distributed import join, to_host
from instantid_jax.training import run as run_module
from instantid_jax.training.loop import Run, train

jax.config.update("jax_default_matmul_precision", "highest")
placement.SMALL = 2


def main(out, weights, mesh_shape, steps, part="quick", bad=(), joined=False, mixed_up=False):
    if joined:
        join()
    process = jax.process_index()
    if tuple(mesh_shape) == (1, 1, 1):  # one of several devices
        one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), mesh.AXES)
        run_module.make_mesh = lambda **_: one
    if mixed_up:  # the devices of a process lie apart, as on a torus
        order = sorted(jax.devices(), key=lambda device: (device.id % 2048, device.process_index))
        plain_mesh = run_module.make_mesh
        run_module.make_mesh = lambda **shape: jax.sharding.Mesh(np.array(order).reshape(plain_mesh(**shape).devices.shape), mesh.AXES)
    axes = zip(("data", "fsdp", "tensor", "dcn_data"), mesh_shape, strict=False)
    fields = {f"mesh__{axis}": size for axis, size in axes} | {"steps": steps, "optimizer__eps": 1e-3}
    records = [small.record(i) for i in range(24)]
    for i in bad:
        records[i].embeddings[:] = np.inf
    run = Run(small.PARTS[part](out, weights, **fields), source=small.MemorySource(records))
    order, plain = [], run.global_batch

    def noting(batch):
        order.append(batch["index"].tolist())
        return plain(batch)

    run.global_batch = noting
    status = train(run)
    leaves = jax.tree.leaves(run.program.abstract_state.parameters)
    told = {
        "status": status,
        "order": order,
        "rows": run.own_rows.tolist(),
        "split": sum(not x.sharding.is_fully_replicated for x in leaves) / len(leaves),
    }
    (run.out / f"told-{process}.json").write_text(json.dumps(told))
    state = to_host(run.state)
    if process == 0:
        named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
        np.savez(run.out / "state.npz", **{name: np.asarray(leaf) for name, leaf in named.items()})


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
