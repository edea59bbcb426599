"""What each way of starting runs or submits. Everything here is text; `__main__` prints or runs it.

Sources: `gcloud compute tpus tpu-vm ssh`, `xpk workload create`, the JobSet API jobset.x-k8s.io/v1alpha2 and Slurm's sbatch(1), srun(1).
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import tyro
import yaml

from instantid_jax.options import OptionError
from instantid_jax.parallel.environment import PORT
from instantid_jax.running import EXIT_INTERRUPTED, EXIT_PARTLY

__all__ = ["JobSet", "Launch", "LaunchError", "Slurm", "TpuVm", "Xpk"]

_WORKERS = "workers"
_HOPELESS = [2, EXIT_PARTLY]  # exit statuses that the same command would end with again
_ANNOTATION = "jobset.sigs.k8s.io"
Env = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


class LaunchError(OptionError):
    """Options that describe nothing that can be started."""


class Launch(NamedTuple):
    """What would be run."""

    command: list[str]
    document: str | None = None
    """What is handed to it on standard input."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuVm:
    """On every host of one TPU VM slice, over ssh. The hosts find each other by themselves."""

    name: str
    """Of the TPU VM."""
    zone: str
    project: str | None = None
    """Google Cloud project; gcloud's own by default."""
    folder: str | None = None
    """Folder on the hosts in which the command runs."""
    env: Env = ()
    """Environment variable as KEY=VALUE; may be repeated."""
    run: bool = False
    """Run it, instead of printing what would be run."""

    def launch(self, command: Sequence[str]) -> Launch:
        """``gcloud compute tpus tpu-vm ssh --worker=all``."""
        text = _shell(command, _variables(self.env), self.folder)
        if not self.zone:
            raise LaunchError("--zone is empty; name the zone of the TPU VM, such as us-central2-b")
        where = ["--zone", self.zone, *(["--project", self.project] if self.project else [])]
        return Launch(["gcloud", "compute", "tpus", "tpu-vm", "ssh", _host_name(self.name), *where, "--worker=all", f"--command={text}"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Xpk:
    """On TPU slices of a GKE cluster, through xpk."""

    cluster: str
    workload: str
    """Name of the workload."""
    tpu_type: str
    """Such as v5litepod-16."""
    docker_image: str
    """Image with the code and its dependencies."""
    num_slices: int = 1
    max_restarts: int = 3
    """How often a run that was stopped or failed begins again; it goes on from its checkpoint or ledger."""
    zone: str | None = None
    project: str | None = None
    env: Env = ()
    """Environment variable as KEY=VALUE; may be repeated."""
    run: bool = False
    """Run it, instead of printing what would be run."""

    def launch(self, command: Sequence[str]) -> Launch:
        """``xpk workload create``."""
        _at_least(1, num_slices=self.num_slices)
        if not re.fullmatch(r"[a-z0-9]+-(\d+|\d+(x\d+)+)", self.tpu_type):
            raise LaunchError(f"--tpu-type is written as v5litepod-16, not {self.tpu_type!r}")
        _at_least(0, max_restarts=self.max_restarts)
        told = ["--cluster", self.cluster, "--workload", _host_name(self.workload), "--tpu-type", self.tpu_type]
        told += ["--num-slices", str(self.num_slices), "--docker-image", self.docker_image]
        if self.max_restarts:
            told += ["--max-restarts", str(self.max_restarts), "--restart-on-user-code-failure"]
        for name, value in (("--zone", self.zone), ("--project", self.project)):
            told += [name, value] if value else []
        for name, value in _variables(self.env).items():
            told += ["--env", f"{name}={value}"]
        return Launch(["xpk", "workload", "create", *told, "--command", _shell(command, {}, None)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSet:
    """On Kubernetes with JobSet (GKE has it): slices x pods, one process a pod."""

    name: str
    image: str
    """Image with the code and its dependencies."""
    slices: int = 1
    """Jobs of the set: TPU slices, or groups of machines that belong together."""
    pods: int = 1
    """Pods in each: the hosts of a slice."""
    tpu: str | None = None
    """GKE's name of the TPU, such as tpu-v5-lite-podslice."""
    topology: str | None = None
    """Of each TPU slice, such as 4x4."""
    chips: int = 4
    """TPU chips a pod."""
    gpus: int = 0
    """NVIDIA GPUs a pod, where there is no TPU."""
    claim: str | None = None
    """PersistentVolumeClaim with data and results, which all processes must see."""
    mount: str = "/data"
    """Where it is mounted."""
    namespace: str = "default"
    max_restarts: int = 3
    """How often a run that was stopped or failed begins again; it goes on from its checkpoint or ledger."""
    grace: int = 300
    """Seconds between SIGTERM and the end, to save the state."""
    env: Env = ()
    """Environment variable as KEY=VALUE; may be repeated."""
    run: bool = False
    """Submit it, instead of printing what would be submitted."""

    def launch(self, command: Sequence[str]) -> Launch:
        """A JobSet for ``kubectl apply``."""
        _at_least(1, slices=self.slices, pods=self.pods, chips=self.chips)
        _at_least(0, gpus=self.gpus, max_restarts=self.max_restarts, grace=self.grace)
        if (self.tpu is None) != (self.topology is None):
            raise LaunchError("--tpu and --topology go together")
        if self.tpu and self.gpus:
            raise LaunchError("--gpus goes without --tpu")
        if self.topology is not None:
            self._check_topology(self.topology)
        for name, value in (("namespace", self.namespace), ("claim", self.claim), ("tpu", self.tpu)):
            if value is not None and not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", value):
                raise LaunchError(f"--{name} must be lower-case letters, digits and hyphens, not {value!r}")
        if not re.fullmatch(r"\S+", self.image):
            raise LaunchError(f"--image is written as registry/name:tag, not {self.image!r}")
        if not self.mount.startswith("/"):
            raise LaunchError(f"--mount must be an absolute path, not {self.mount!r}")
        document = yaml.safe_dump(self.document(list(command)), sort_keys=False, allow_unicode=True, width=120)
        return Launch(["kubectl", "apply", "--filename=-"], document)

    def _check_topology(self, topology: str) -> None:
        if not re.fullmatch(r"\d+(x\d+){1,2}", topology):
            raise LaunchError(f"--topology is written as 4x4 or 2x2x4, not {topology!r}")
        there, asked = math.prod(map(int, topology.split("x"))), self.pods * self.chips
        if there != asked:
            raise LaunchError(f"a slice of {topology} has {there} chips, but --pods {self.pods} x --chips {self.chips} are {asked}; match them")

    def document(self, command: list[str]) -> dict[str, Any]:
        """The JobSet as nested dicts."""
        name = _host_name(self.name, longest=40)  # pods are called name-workers-0-0, at most 63 letters
        metadata: dict[str, Any] = {"name": name, "namespace": self.namespace}
        if self.tpu:
            metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        hopeless = {"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": _HOPELESS}}
        job = {
            "parallelism": self.pods,
            "completions": self.pods,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": [hopeless]},
            "template": {"spec": self._pod(command)},
        }
        failure = {
            "maxRestarts": self.max_restarts,
            "rules": [{"name": "hopeless", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        }
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": metadata,
            "spec": {"failurePolicy": failure, "replicatedJobs": [{"name": _WORKERS, "replicas": self.slices, "template": {"spec": job}}]},
        }

    def _pod(self, command: list[str]) -> dict[str, Any]:
        variables = [{"name": name, "value": _plain(value)} for name, value in _variables(self.env).items()]
        container: dict[str, Any] = {"name": "main", "image": self.image, "command": [_plain(word) for word in command]}
        container |= {"env": self._places() + variables, "ports": [{"containerPort": PORT}]}
        pod: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": self.grace}
        if self.tpu:
            container["resources"] = {"limits": {"google.com/tpu": self.chips}}
            pod["nodeSelector"] = {"cloud.google.com/gke-tpu-accelerator": self.tpu, "cloud.google.com/gke-tpu-topology": self.topology}
        elif self.gpus:
            container["resources"] = {"limits": {"nvidia.com/gpu": self.gpus}}
        if self.claim:
            container["volumeMounts"] = [{"name": "shared", "mountPath": self.mount}]
            pod["volumes"] = [{"name": "shared", "persistentVolumeClaim": {"claimName": self.claim}}]
        return pod | {"containers": [container]}

    def _places(self) -> list[dict[str, Any]]:
        """What `parallel.environment` reads; on TPUs nothing, as GKE tells JAX. Kubernetes itself sets JOB_COMPLETION_INDEX."""
        if self.tpu:
            return []
        fixed = {
            "JAX_COORDINATOR_ADDRESS": f"{self.name}-{_WORKERS}-0-0.{self.name}",
            "JAX_COORDINATOR_PORT": str(PORT),
            "JAX_PROCESS_COUNT": str(self.slices * self.pods),
            "PROCESSES_IN_JOB": str(self.pods),
        }
        index = {"fieldRef": {"fieldPath": f"metadata.annotations['{_ANNOTATION}/job-index']"}}
        return [{"name": name, "value": value} for name, value in fixed.items()] + [{"name": "JOB_INDEX", "valueFrom": index}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm:
    """As a batch job of Slurm: one process for each GPU, or one a node without; they find each other by themselves."""

    name: str = "instantid"
    """Of the job."""
    nodes: int = 1
    gpus: int = 0
    """GPUs, and so processes, a node."""
    time: str | None = None
    """Limit, such as 12:00:00."""
    partition: str | None = None
    account: str | None = None
    folder: str | None = None
    """Folder in which the command runs; that of the submission by default."""
    warning: int = 300
    """Seconds before the limit at which SIGTERM comes, to save the state."""
    requeue: bool = True
    """Whether a run that was stopped by a signal and saved its state goes back into the queue."""
    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Another option of sbatch, as it is written in a script: --option=--mem=64G; may be repeated."""
    env: Env = ()
    """Environment variable as KEY=VALUE; may be repeated."""
    run: bool = False
    """Submit it, instead of printing what would be submitted."""

    def launch(self, command: Sequence[str]) -> Launch:
        """A script for ``sbatch``."""
        _at_least(1, nodes=self.nodes)
        _at_least(0, gpus=self.gpus, warning=self.warning)
        if self.time is not None and not re.fullmatch(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}", self.time):
            raise LaunchError(f"--time is written as 90 (minutes), 12:00:00 or 2-12:00, not {self.time!r}")
        told = {"job-name": self.name, "nodes": self.nodes, "ntasks-per-node": self.gpus or 1}
        told |= {"gpus-per-node": self.gpus} if self.gpus else {}
        told |= {name: getattr(self, name) for name in ("time", "partition", "account") if getattr(self, name)}
        told |= {"signal": f"TERM@{self.warning}"}
        lines = [f"--{name}={shlex.quote(_line(name, str(value)))}" for name, value in told.items()]
        lines += ["--requeue"] if self.requeue else ["--no-requeue"]
        if wrong := next((text for text in self.option if not text.startswith("-")), None):
            raise LaunchError(f"--option is an option of sbatch, such as --option=--mem=64G, not {wrong!r}")
        lines += [_line("option", text) for text in self.option]
        script = ["#!/bin/bash", *(f"#SBATCH {line}" for line in lines), "set -euo pipefail"]
        script += [f"export {name}={shlex.quote(value)}" for name, value in _variables(self.env).items()]
        script += [f"cd {_place(self.folder)}"] if self.folder else []
        script += ["status=0", f"srun --kill-on-bad-exit=0 {shlex.join(command)} || status=$?"]
        # The first process that leaves with status 75 must not have the others killed, who are leaving too: srun tells the highest status.
        if self.requeue:
            script += [f'if [ "$status" -eq {EXIT_INTERRUPTED} ]; then', '  scontrol requeue "$SLURM_JOB_ID"', "fi"]
        return Launch(["sbatch"], "\n".join([*script, 'exit "$status"', ""]))


def _shell(command: Sequence[str], variables: dict[str, str], folder: str | None) -> str:
    """One line for a shell."""
    before = f"cd {_place(folder)} && " if folder else ""
    given = "".join(f"{name}={shlex.quote(value)} " for name, value in variables.items())
    return f"{before}{given}{shlex.join(command)}"


def _place(folder: str) -> str:
    """A folder for a shell, which knows its own home where the folder begins with "~/"."""
    return f"~/{shlex.quote(folder[2:])}" if folder.startswith("~/") else shlex.quote(folder)


def _variables(texts: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise LaunchError(f"--env must be KEY=VALUE, not {text!r}")
        found[name] = value
    return found


def _host_name(name: str, longest: int = 63) -> str:
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > longest:
        raise LaunchError(f"the name {name!r} must be at most {longest} lower-case letters, digits and hyphens, a letter first and no hyphen last")
    return name


def _plain(text: str) -> str:
    """A text in which Kubernetes replaces nothing: to it $(NAME) is a variable, and $$ one dollar."""
    return text.replace("$", "$$")


def _line(name: str, text: str) -> str:
    if "\n" in text or "\r" in text:
        raise LaunchError(f"--{name} must be one line, not {text!r}")
    return text


def _at_least(low: int, **values: int) -> None:
    for name, value in values.items():
        if value < low:
            raise LaunchError(f"--{name.replace('_', '-')} must be at least {low}, not {value}")
