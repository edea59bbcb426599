"""How fast a full-size checkpoint loads, against plain reading of the same files.

    python benchmarks/loading.py                                     IdentityNet in float32, 4.7 GB
    python benchmarks/loading.py --network unet --dtype bfloat16 --json loading.json

Random weights are written once as `convert_weights` and `train.py` write them. Before every measurement the files are dropped from the page
cache (POSIX_FADV_DONTNEED). Plain reading is one thread, and as many as there are processors, in blocks of 16 MiB; loading is `load_weights` onto
this machine's devices, and what the pipeline does: equal layers are stacked, then given to the device. Medians of `--rounds` that take turns.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from command_line import count, new_file, put

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BLOCK = 16 << 20


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder, the largest first."""
    return sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: -file.stat().st_size)


def drop(files: list[Path]) -> None:
    """Takes files out of the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read(file: Path) -> int:
    """Reads a file to its end; its bytes."""
    buffer, total = bytearray(BLOCK), 0
    with file.open("rb", buffering=0) as handle:
        while count := handle.readinto(buffer):
            total += count
    return total


def plain(files: list[Path], threads: int) -> None:
    """Reads all files."""
    with ThreadPoolExecutor(threads) as pool:
        sum(pool.map(read, files))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="identitynet")
    parser.add_argument("--model", choices=("sdxl", "portraits"), default="sdxl")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="type on disk")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--json", type=new_file)
    options = parser.parse_args(arguments)

    import jax
    import numpy as np

    from instantid_jax import config
    from instantid_jax.checkpoint import load_weights, save_weights
    from instantid_jax.models import build_networks
    from instantid_jax.parallel.mesh import make_mesh

    networks = build_networks(getattr(config, options.model)())
    if options.network not in networks:
        parser.error(f"there is no network {options.network!r}; there are {', '.join(networks)}")
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"--folder {options.folder}: there is no such folder")
    network = networks[options.network]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / options.network
        flat = {path: rng.standard_normal(shape, np.float32) for path, shape in network.disk_shapes().items()}
        save_weights(folder, flat, dtype=options.dtype)
        names = list(flat)
        del flat
        files = files_of(folder)
        size = sum(file.stat().st_size for file in files)
        whole = jax.sharding.NamedSharding(make_mesh(), jax.sharding.PartitionSpec())

        def onto_devices() -> None:
            jax.block_until_ready(load_weights(folder, shardings=dict.fromkeys(names, whole)))

        def stacked() -> None:
            jax.block_until_ready(jax.device_put(network.from_disk(load_weights(folder, later=True), options.network)))

        ways: dict[str, Callable[[], Any]] = {
            "plain reading, one thread": lambda: plain(files, 1),
            "plain reading, all processors": lambda: plain(files, os.cpu_count() or 1),
            "load_weights onto devices": onto_devices,
            "as the pipeline loads": stacked,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                drop(files)
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
    print(f"{options.network}, {options.dtype}: {size / 1e9:.2f} GB in {len(files)} files")
    best = min(statistics.median(seconds[name]) for name in ways if name.startswith("plain"))
    figures = {}
    for name, values in seconds.items():
        middle = statistics.median(values)
        figures[name] = {"seconds": middle, "gb_per_second": size / 1e9 / middle, "share_of_plain": best / middle}
        print(f"{name:32} {middle:7.2f} s  {size / 1e9 / middle:6.2f} GB/s  {best / middle:.2f} of plain reading")
    if options.json:
        put(options.json, json.dumps({"bytes": size, "files": len(files), "ways": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
