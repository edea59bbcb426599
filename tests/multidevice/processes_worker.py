"""One of several processes that join, look at their mesh, and wait for each other in vain: ``processes_worker.py '{"out": ...}'``."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

from instantid_jax.parallel.distributed import MissingProcess, agreed, is_main, join, leave, put_whole, stacked, synchronize, to_host
from instantid_jax.parallel.mesh import batch_rows, batch_sharding, make_mesh


def refused(**shape):
    try:
        make_mesh(**shape)
    except ValueError as error:
        return str(error)
    return None


def main(out, absent, timeout=300.0):
    join(timeout=timeout)
    process, count = jax.process_index(), jax.process_count()
    mesh = make_mesh(fsdp=2, dcn_data=count)
    rows = np.arange(4 * count, dtype=np.int32)
    array = put_whole(rows, batch_sharding(mesh))
    told = {
        "process": process,
        "main": is_main(),
        "mesh": dict(mesh.shape),
        "along_data": [{d.process_index for d in row.flat} == {i} for i, row in enumerate(mesh.devices)],
        "fed_rows": batch_rows(mesh, len(rows)).tolist(),
        "own_rows": sorted(int(x) for shard in array.addressable_shards for x in shard.data),
        "rows": to_host(array).tolist(),
        "agreed": [agreed(process == 1), agreed(False)],
        "stacked": stacked(np.int32([process])).tolist(),
        "refused": refused(data=count, fsdp=1, dcn_data=2),
    }
    for _ in range(2):
        synchronize("all are here", 60)
    if process not in absent:
        try:
            synchronize("the absent", 3)
        except MissingProcess as error:
            told["missing"] = str(error)
    (Path(out) / f"{process}.json").write_text(json.dumps(told))
    if absent:
        synchronize("before the end", 60)
        leave(7)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
