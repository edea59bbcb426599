"""What would be started is well formed, well quoted, and tells the processes what they look for."""

import json
import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from instantid_jax.launch.__main__ import main
from instantid_jax.parallel.environment import place_of

SCHEMA = json.loads(Path(__file__).with_name("jobset.schema.json").read_text())
ROOT = Path(__file__).parents[2]
# Everything that a shell, YAML or Kubernetes could take for something else.
NASTY = [
    "python",
    "train.py",
    "--distributed",
    "it's",
    'a "b" $HOME $(date) `id`',
    "x\\y",
    "",
    "no",
    "1e3",
    "*",
    "é; rm -rf x",
    "--config=a b",
    "line\nbreak",
]
JOBSET = ["jobset", "--name", "faces", "--image", "repo/image:1"]
TPU = ["--tpu", "tpu-v5-lite-podslice", "--topology", "4x4"]


def launched(capsys, *arguments, command=NASTY, status=0):
    assert main([*arguments, "--", *command]) == status
    return capsys.readouterr()


def jobset(capsys, *arguments, **about):
    document = yaml.safe_load(launched(capsys, *JOBSET, *arguments, **about).out)
    jsonschema.validate(document, SCHEMA, cls=jsonschema.Draft202012Validator)
    return document


def container(document):
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


def kubernetes(text):
    """What a container gets of a text: $$ is one dollar, and $(NAME) a variable."""
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", text)
    return text.replace("$$", "$")


def test_a_jobset_is_one_and_keeps_the_command(capsys):
    document = jobset(capsys, "--slices", "2", "--pods", "3", "--gpus", "8", "--claim", "data", "--env", "A=$(B) 'c'", "--env", "YES=no")
    spec = document["spec"]["replicatedJobs"][0]
    assert (spec["replicas"], spec["template"]["spec"]["parallelism"], spec["template"]["spec"]["completions"]) == (2, 3, 3)
    main_container = container(document)
    assert [kubernetes(word) for word in main_container["command"]] == NASTY
    given = {variable["name"]: variable.get("value") for variable in main_container["env"]}
    assert kubernetes(given["A"]) == "$(B) 'c'" and given["YES"] == "no"
    assert main_container["resources"] == {"limits": {"nvidia.com/gpu": 8}} and main_container["volumeMounts"][0]["mountPath"] == "/data"
    policy = spec["template"]["spec"]["podFailurePolicy"]["rules"][0]
    assert policy["onExitCodes"]["values"] == [2, 3] and document["spec"]["failurePolicy"]["maxRestarts"] == 3


def test_the_pods_of_a_jobset_find_their_places(capsys):
    document = jobset(capsys, "--slices", "2", "--pods", "3")
    places = []
    for job in range(2):
        for pod in range(3):
            downward = {"metadata.annotations['jobset.sigs.k8s.io/job-index']": str(job)}
            found = {"JOB_COMPLETION_INDEX": str(pod)}  # Kubernetes sets it in every pod of an indexed job
            for variable in container(document)["env"]:
                found[variable["name"]] = variable["value"] if "value" in variable else downward[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            places.append(place_of(found))
    assert places == [("faces-workers-0-0.faces:1234", 6, i) for i in range(6)]


def test_tpu_slices_are_asked_for_and_left_to_jax(capsys):
    document = jobset(capsys, "--slices", "2", "--pods", "4", *TPU)
    assert container(document)["env"] == [] and container(document)["resources"] == {"limits": {"google.com/tpu": 4}}
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "4x4"}
    assert document["metadata"]["annotations"] == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}


def test_the_schema_refuses_what_is_no_jobset(capsys):
    document = jobset(capsys)
    for path, value in (
        (("apiVersion",), "jobset.x-k8s.io/v1"),
        (("spec", "replicas"), 2),
        (("metadata", "name"), "A_b"),
        (("spec", "replicatedJobs"), []),
    ):
        broken = json.loads(json.dumps(document))
        place = broken
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


def test_a_tpu_vm_runs_the_command_on_every_host(capsys, tmp_path):
    arguments = ["tpu-vm", "--name", "pod", "--zone", "us-east5-b", "--project", "p", "--folder", "a b", "--env", "X=1 2", "--env", "Y='"]
    words = shlex.split(launched(capsys, *arguments).out)
    assert words[:-1] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone", "us-east5-b", "--project", "p", "--worker=all"]
    text = words[-1].removeprefix("--command=")
    (tmp_path / "a b").mkdir()
    assert ran(tmp_path, text, "python") == {"words": NASTY[1:], "folder": str(tmp_path / "a b"), "X": "1 2", "Y": "'"}


def test_xpk_creates_a_workload(capsys, tmp_path):
    arguments = [
        "xpk",
        "--cluster",
        "c",
        "--workload",
        "w",
        "--tpu-type",
        "v5litepod-16",
        "--docker-image",
        "i",
        "--num-slices",
        "2",
        "--env",
        "A=b c",
    ]
    words = shlex.split(launched(capsys, *arguments).out)
    head = "xpk workload create --cluster c --workload w --tpu-type v5litepod-16 --num-slices 2 --docker-image i --max-restarts 3"
    assert words == [*head.split(), "--restart-on-user-code-failure", "--env", "A=b c", "--command", words[-1]]
    assert ran(tmp_path, words[-1], "python")["words"] == NASTY[1:]


def tool(folder, name, code):
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env python3\nimport json, os, sys\n{code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def ran(folder, script, name, status=0, expected=0, **variables):
    """Runs a script with a tool of that name that tells how it was called."""
    told = "told = {'words': sys.argv[1:], 'folder': os.getcwd(), **{k: os.environ[k] for k in ('X', 'Y') if k in os.environ}}\n"
    tool(folder, name, f"{told}open({str(folder / 'told.json')!r}, 'w').write(json.dumps(told)); sys.exit({status})")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    environment = {**os.environ, **variables, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash"], input=script, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == expected
    return json.loads((folder / "told.json").read_text())


SLURM = ["slurm", "--name", "two words", "--nodes", "2", "--gpus", "8", "--time", "12:00:00", "--option=--mem=64G", "--env", "X=a b"]


@pytest.mark.parametrize("status", [0, 1, 75])
def test_a_slurm_script_runs_and_goes_back_into_the_queue_when_it_was_stopped(status, capsys, tmp_path):
    script = launched(capsys, *SLURM, "--folder", str(tmp_path)).out
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        *("--job-name='two words'", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=12:00:00"),
        *("--signal=TERM@300", "--requeue", "--mem=64G"),
    ]
    tool(tmp_path, "scontrol", f"open({str(tmp_path / 'queue')!r}, 'w').write(' '.join(sys.argv[1:]))")
    told = ran(tmp_path, script, "srun", status, status, SLURM_JOB_ID="17")
    assert told == {"words": ["--kill-on-bad-exit=0", *NASTY], "folder": str(tmp_path), "X": "a b"}
    assert (tmp_path / "queue").is_file() == (status == 75)
    if status == 75:
        assert (tmp_path / "queue").read_text() == "requeue 17"


def test_slurm_tasks_are_what_jax_looks_for(monkeypatch):
    from jax._src.clusters import SlurmCluster

    variables = {"SLURM_JOB_ID": "17", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place_of(os.environ) is None and SlurmCluster.is_env_present()
    assert (SlurmCluster.get_process_count(), SlurmCluster.get_process_id(), SlurmCluster.get_local_process_id()) == (16, 9, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*JOBSET, "--slices", "0"], "--slices must be at least 1, not 0"),
        ([*JOBSET, "--tpu", "x"], "--tpu and --topology go together"),
        ([*JOBSET, *TPU, "--gpus", "1"], "--gpus goes without --tpu"),
        ([*JOBSET, "--mount", "data"], "--mount must be an absolute path"),
        ([*JOBSET, "--env", "A"], "--env must be KEY=VALUE, not 'A'"),
        ([*JOBSET, "--env", "A-B=1"], "--env must be KEY=VALUE"),
        (["jobset", "--name", "Faces", "--image", "i"], "the name 'Faces' must be at most 40 lower-case letters"),
        ([*JOBSET, "--namespace", "N S"], "--namespace must be lower-case letters, digits and hyphens, not 'N S'"),
        ([*JOBSET, "--claim", "Mine"], "--claim must be lower-case letters"),
        (["jobset", "--name", "faces", "--image", "bad image"], "--image is written as registry/name:tag, not 'bad image'"),
        (["slurm", "--option", "foo"], "--option is an option of sbatch, such as --option=--mem=64G, not 'foo'"),
        (["slurm", "--partition", "a\nb"], "--partition must be one line"),
        (["slurm", "--time", "banana"], "--time is written as 90 (minutes), 12:00:00 or 2-12:00, not 'banana'"),
        (["tpu-vm", "--name", "faces", "--zone", ""], "--zone is empty"),
        (
            ["xpk", "--cluster", "c", "--workload", "w", "--docker-image", "i", "--tpu-type", "big"],
            "--tpu-type is written as v5litepod-16, not 'big'",
        ),
        ([*JOBSET, "--tpu", "x", "--topology", "banana"], "--topology is written as 4x4 or 2x2x4, not 'banana'"),
        ([*JOBSET, "--tpu", "x", "--topology", "4x4", "--pods", "1"], "a slice of 4x4 has 16 chips, but --pods 1 x --chips 4 are 4"),
    ],
)
def test_what_cannot_be_started_is_refused(arguments, message, capsys):
    assert message in launched(capsys, *arguments, status=2).err


def test_a_folder_in_the_home_of_the_hosts_is_left_to_their_shells(capsys):
    told = launched(capsys, "tpu-vm", "--name", "faces", "--zone", "z", "--folder", "~/my code").out
    assert "cd ~/" in told and "my code" in told and "'~" not in told


def test_without_a_command_or_distributed_it_says_so(capsys):
    assert main(["slurm"]) == 2
    assert "no command: write it behind --" in capsys.readouterr().err
    assert "has no --distributed" in launched(capsys, "slurm", command=["python", "train.py"]).err
    with pytest.raises(SystemExit) as end:
        main(["slurm", "--nods", "2", "--", "x"])
    assert end.value.code == 2


def test_run_hands_over_and_returns_its_status(capsys, tmp_path, monkeypatch):
    tool(tmp_path, "sbatch", f"open({str(tmp_path / 'script')!r}, 'w').write(sys.stdin.read()); sys.exit(5)")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    shown = launched(capsys, "slurm").out
    launched(capsys, "slurm", "--run", status=5)
    assert (tmp_path / "script").read_text() == shown
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "kubectl is not installed here" in launched(capsys, *JOBSET, "--run", status=1).err


def test_the_commands_of_the_documentation_are_understood(capsys):
    text = (ROOT / "docs" / "launch.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("python -m instantid_jax.launch")]
    assert {shlex.split(line)[3] for line in lines} == {"tpu-vm", "xpk", "jobset", "slurm"}
    for line in lines:
        words = shlex.split(line.split(" > ")[0])
        assert main(words[3:]) == 0
        assert "has no --distributed" not in capsys.readouterr().err
