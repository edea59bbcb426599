"""TPU generations and topologies of them, described without having one.

Figures are Google's published ones for a chip (cloud.google.com/tpu/docs, system architecture pages of each generation).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

from instantid_jax.options import OptionError

__all__ = ["CHIPS", "Chip", "TopologyError", "topology_devices"]

GiB = 2**30


class TopologyError(OptionError):
    """A topology that does not exist, or a plan that does not fit it."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip of a generation."""

    hbm_bytes: int
    """What the compiler lets programs use; a little less than the chip has."""
    flops: float
    """Peak of bfloat16 matrix products, operations a second."""
    hbm_bandwidth: float
    """Bytes a second."""
    ici_bandwidth: float
    """Bytes a second that leave a chip over all its links together, one direction."""
    dcn_bandwidth: float
    """Bytes a second that leave a chip for other slices: its host's network, divided by the host's chips."""
    clock: float
    """Cycles a second: peak / (two operations x multipliers)."""
    dimensions: int = 2
    """Of the torus."""
    pod: int = 256
    """Chips of the largest slice."""

    @property
    def flops_per_cycle(self) -> float:
        """Peak operations of a chip in a cycle."""
        return self.flops / self.clock


CHIPS = {
    "v4": Chip(int(30.5 * GiB), 275e12, 1228e9, 300e9, 6.25e9, 1.05e9, dimensions=3, pod=4096),
    "v5e": Chip(int(15.75 * GiB), 197e12, 819e9, 200e9, 3.125e9, 1.5e9),
    "v5p": Chip(int(95.74 * GiB), 459e12, 2765e9, 600e9, 6.25e9, 1.75e9, dimensions=3, pod=8960),
    "v6e": Chip(int(31.25 * GiB), 918e12, 1640e9, 448e9, 6.25e9, 1.75e9),
}
_EXAMPLES = {"v4": "v4:2x2x1", "v5e": "v5e:4x4", "v5p": "v5p:2x2x2", "v6e": "v6e:4x4"}
_KNOWN = ", ".join(f"{name} (as {example})" for name, example in _EXAMPLES.items())


def parse_topology(name: str) -> tuple[str, tuple[int, ...], int]:
    """ "v5e:4x4" to (generation, chips along each axis, slices); "2*v5e:4x4" is two such slices. Raises TopologyError."""
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name)
    if found is None or found.group(2) not in CHIPS:
        raise TopologyError(f"{name!r} is no topology known here; known are {_KNOWN}, and several slices as 2*v5e:4x4")
    slices, generation, shape = int(found.group(1) or 1), found.group(2), tuple(map(int, found.group(3).split("x")))
    wanted = CHIPS[generation].dimensions
    if not all(shape) or not slices:
        raise TopologyError(f"{name!r}: numbers of chips and of slices must be at least 1, as in {_EXAMPLES[generation]}")
    if len(shape) != wanted:
        raise TopologyError(f"{name!r}: a {generation} topology has {wanted} axes, as in {_EXAMPLES[generation]}")
    if math.prod(shape) > CHIPS[generation].pod:
        raise TopologyError(f"{name!r} has {math.prod(shape):,} chips; the largest slice of a {generation} has {CHIPS[generation].pod:,}")
    return generation, shape, slices


def topology_devices(name: str) -> tuple[Chip, list[Any]]:
    """The chip and the devices of a topology, to compile for. Needs libtpu, but no TPU. Raises TopologyError, ValueError."""
    generation, shape, slices = parse_topology(name)
    # libtpu looks for a machine's metadata, and locks itself, unless told that there is none.
    alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}
    for variable, value in alone.items():
        os.environ.setdefault(variable, value)
    try:
        import libtpu  # noqa: F401
    except ModuleNotFoundError as missing:
        raise ValueError('compiling for a TPU needs its compiler: pip install -e ".[tpu]"') from missing
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # both cores are one device, as JAX has them on a v4; the description's default is a device each
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name.split("*")[-1], **options)
    except Exception as error:  # libtpu raises various types with the reason in the text
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise TopologyError(f"{name!r} is no topology of a {generation}, says its compiler ({reason}); one is {_EXAMPLES[generation]}") from error
    return CHIPS[generation], list(described.devices)
