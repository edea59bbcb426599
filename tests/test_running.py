"""One process in a folder at a time."""

import subprocess
import sys

from instantid_jax.running import lease


def test_two_processes_of_one_folder(tmp_path):
    code = (
        "import sys, pathlib; from instantid_jax.running import lease, LeaseError\n"
        "try:\n    lease(pathlib.Path(sys.argv[1]), 'drawing').__enter__()\nexcept LeaseError as e:\n    print(e)\nelse:\n    print('free')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]

    def told():
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with lease(tmp_path / "run"):
        assert "another process is drawing in" in told()
    assert told() == "free\n"
