"""Real processes on this machine: they find their place in the environment, and say who is missing."""

import json
from pathlib import Path

import launched
import pytest

WORKER = Path(__file__).with_name("processes_worker.py")


def jobset(count):
    """The environment of JobSet's pods: jobs of two pods each."""
    address = f"localhost:{launched.port()}"
    for i in range(count):
        yield {
            **{"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_COUNT": str(count), "PROCESSES_IN_JOB": "2"},
            **{"JOB_INDEX": str(i // 2), "JOB_COMPLETION_INDEX": str(i % 2), "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        }


def test_four_processes_meet_and_name_those_who_do_not_come(tmp_path):
    argument = {"out": str(tmp_path), "absent": [1, 3]}
    launched.finish(*(launched.start(WORKER, argument, 2, **place) for place in jobset(4)), status=7)
    told = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(4)]
    assert [t["process"] for t in told] == [0, 1, 2, 3] and [t["main"] for t in told] == [True, False, False, False]
    for i, t in enumerate(told):
        assert t["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1} and all(t["along_data"])
        assert t["fed_rows"] == t["own_rows"] == list(range(4 * i, 4 * i + 4)) and t["rows"] == list(range(16))
        assert t["agreed"] == [True, False] and t["stacked"] == [[0], [1], [2], [3]]
        assert "mesh.dcn_data is 2, but there are 1 slices of 8 devices and 4 processes of 2 devices" in t["refused"]
    for i in (0, 2):
        assert told[i]["missing"].startswith("barrier 'the absent': processes 1, 3 of 4 did not come within 3 s")


@pytest.mark.parametrize(("process", "said"), [(0, "process 0: of 2 processes not all came to"), (1, "process 0 is missing: nobody answers at")])
def test_a_process_that_waits_alone_ends_with_one_sentence(process, said, tmp_path):
    place = launched.places(2)[process]
    (output,) = launched.finish(launched.start(WORKER, {"out": str(tmp_path), "absent": [], "timeout": 3}, 1, **place), status=1)
    assert said in output and "within 3 s" in output
    assert len(output.splitlines()) == 1
