"""Several processes on this machine, as a cluster would start them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Compiling less well takes half as long, and rounds as any other order of sums does.
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(script: Path, argument: object, devices: int, *, flags: str = QUICKLY, **variables: str) -> subprocess.Popen[str]:
    """`script` with its argument as JSON, on so many simulated devices."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}", **variables}
    command = [sys.executable, str(script), json.dumps(argument)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def places(count: int) -> list[dict[str, str]]:
    """The environment of each of so many processes."""
    address = f"localhost:{port()}"
    return [{"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_COUNT": str(count), "JAX_PROCESS_ID": str(i)} for i in range(count)]


def finish(*processes: subprocess.Popen[str], status: int = 0) -> list[str]:
    """What they said, when all have ended with `status`."""
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), "\n".join(outputs)
    return outputs
