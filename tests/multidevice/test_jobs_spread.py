"""Jobs drawn on eight simulated devices, and by two processes, are the very files that sample.py writes for each alone."""

import json
from pathlib import Path

import launched
import pytest

# On a CPU the order of some sums follows the number of XLA's threads: one a core or simulated device, whichever are more, or NPROC.
THREADS = {"NPROC": "8"}
WORKER = Path(__file__).with_name("jobs_worker.py")
EXAMPLE = launched.ROOT / "docs" / "jobs.jsonl"


def made(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.glob("*/*.png")}


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The example of the documentation on eight devices, and some of its pictures alone in the same process, on one."""
    folder = tmp_path_factory.mktemp("eight")
    jobs = ["--jobs", str(EXAMPLE), "--steps", "2", "--out", str(folder / "jobs")]
    lines = [json.loads(line) for line in EXAMPLE.read_text().splitlines()]
    alone = []
    for number, (line, prompt, seed) in enumerate(
        [(lines[0], lines[0]["prompt"][1], 1), (lines[1], lines[1]["prompt"], 9), (lines[2], lines[2]["prompt"], 0)]
    ):
        given = {"face": EXAMPLE.parent / line["face"], "prompt": prompt, "seed": seed, "steps": 2, "out": folder / f"alone{number}"}
        given |= {"pose": EXAMPLE.parent / line["pose"]} if "pose" in line else {}
        given |= {name: line[name] for name in ("negative_prompt", "guidance_scale", "identitynet_scale") if name in line}
        alone.append([text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))])
    (output,) = launched.finish(launched.start(WORKER, [jobs, *alone], 8, **THREADS))
    assert json.loads(output.splitlines()[-1]) == [0, 0, 0, 0]
    return folder


def test_the_example_makes_the_files_that_sample_makes_alone(eight):
    files = made(eight / "jobs")
    assert len(files) == 8 and {path.split("/")[0] for path in files} == {"person_1", "second", "person_17"}
    for number, (folder, seed) in enumerate([("person_1", 1), ("second", 9), ("person_17", 0)]):
        alone = (eight / f"alone{number}" / f"{seed:06d}.png").read_bytes()
        assert alone in [content for path, content in files.items() if path.startswith(f"{folder}/{seed:06d}-")]
    told = json.loads((eight / "jobs" / "report.json").read_text())
    assert [told[name] for name in ("asked", "made", "failed", "missing", "devices")] == [8, 8, 0, 0, 8]


def test_two_processes_share_the_work_and_one_bad_photo_stops_neither(eight, tmp_path):
    text = EXAMPLE.read_text().replace("../instantid_jax", str(launched.ROOT / "instantid_jax"))
    (tmp_path / "jobs.jsonl").write_text(text + '{"face": "gone.png", "prompt": "x"}\n')
    jobs = ["--jobs", str(tmp_path / "jobs.jsonl"), "--steps", "2", "--out", str(tmp_path / "out"), "--distributed"]
    outputs = launched.finish(*(launched.start(WORKER, [jobs], 2, **THREADS, **place) for place in launched.places(2)))
    assert [json.loads(output.splitlines()[-1]) for output in outputs] == [[3], [3]]
    assert made(tmp_path / "out") == made(eight / "jobs")
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [told[name] for name in ("asked", "made", "failed", "missing", "processes", "devices")] == [9, 8, 1, 0, 2, 4]
    rows = [(tmp_path / "out" / "ledger" / f"0000{i}.jsonl").read_text().splitlines() for i in (0, 1)]
    assert [len(own) for own in rows] == [5, 4]
