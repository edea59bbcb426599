"""Checkpoints of a run: the whole state in Orbax, written in the background, there whole or not at all.

Beside the arrays lie, in the checkpoint's own metadata, the position in the data, the loss history of the guard, the
resolved configuration, and a fingerprint of every array: what is read back is what was written, to the bit, on any mesh.
An old checkpoint is deleted only after a newer one is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from instantid_jax.checkpoint import quiet_orbax
from instantid_jax.parallel.distributed import is_main, synchronize
from instantid_jax.training.config import CheckpointConfig
from instantid_jax.training.fingerprint import fingerprints

__all__ = ["CheckpointError", "Checkpoints", "Restored"]

_policies = ocp.training.preservation_policies


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used; the message names it and what to do."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read."""

    step: int
    state: Any
    extra: dict[str, Any]
    """What `save` was given beside the state."""


class Checkpoints:
    """The checkpoints under one folder. Every process of a run makes one and calls its methods in the same order."""

    def __init__(self, folder: str | Path, config: CheckpointConfig):
        self.folder = Path(folder).absolute()
        keep: list[Any] = [_policies.LatestN(max(config.keep, 1))]
        if config.keep_best:
            best = _policies.BestN(get_metric_fn=lambda metrics: -float(metrics["value"]), n=config.keep_best, keep_checkpoints_without_metrics=False)
            keep.append(best)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with quiet_orbax():
                make: Any = ocp.training.Checkpointer
                self._orbax: Any = make(self.folder, preservation_policy=_policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True)
        except OSError as problem:
            raise CheckpointError(f"{self.folder} cannot be used for checkpoints ({_first_line(problem)})") from problem

    @property
    def steps(self) -> list[int]:
        """Steps whose folders have a checkpoint's name, complete or damaged, oldest first."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def save(self, step: int, state: Any, extra: Mapping[str, Any], value: float | None = None) -> None:
        """Begins to write `state` in the background; it may be donated or changed as soon as this returns.

        `extra` is JSON; `value` is the validation metric, lower being better. Raises `CheckpointError` where the step is
        there already, or where this or the previous save fails.
        """
        arrays, text = _named(state), json.dumps(dict(extra))
        about = {"text": text, "sha256": _digest(text), "fingerprints": fingerprints(arrays)}
        metrics = None if value is None else {"value": float(value)}
        with self._failing(f"checkpoint {self.folder / str(step)} cannot be written"), quiet_orbax():
            self._orbax.save_async(step, arrays, force=True, metrics=metrics, custom_metadata=about)

    def wait(self) -> None:
        """Returns when everything is written. Raises `CheckpointError` for what went wrong in the background."""
        with self._failing(f"a checkpoint in {self.folder} could not be written"), quiet_orbax():
            self._orbax.wait()

    def close(self) -> None:
        """Waits for the writing and ends it."""
        with self._failing(f"a checkpoint in {self.folder} could not be written"), quiet_orbax():
            self._orbax.close()

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as problem:  # Orbax passes on whatever the file system or its threads raise
            raise CheckpointError(f"{what} ({_first_line(problem)}); earlier checkpoints are untouched") from problem

    def restore(self, like: Any, *, step: int | None = None, damaged: str = "stop", last: int | None = None) -> Restored | None:
        """The newest checkpoint (or that of `step`) in the shapes and places of `like`; None where there is none.

        `like` is a tree of `ShapeDtypeStruct`s with shardings, which may be other than when the checkpoint was written.
        A checkpoint that cannot be read raises `CheckpointError`; with `damaged="previous"` the one before is taken.
        One beyond step `last` is refused before it is read.
        Newer ones than the one that was taken are moved aside: the run that goes on will write those steps again.
        What is still being written counts: it is waited for.
        """
        self.wait()
        steps = self.steps
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}")
        for number in [step] if step is not None else reversed(steps):
            if last is not None and number > last:
                earlier = [f"--resume-step {s}" for s in steps if s <= last][-1:]
                ways = ", ".join([f"ask for {number} or more", *earlier, "or give another --out"])
                raise CheckpointError(f"{self.folder} is at step {number} already, beyond the {last} steps asked for: {ways}")
            try:
                found = self._read(number, like)
            except _Damaged as problem:
                earlier = [s for s in steps if s < number]
                if damaged != "previous" or not earlier or step is not None:
                    hint = (
                        f"; --resume-damaged previous goes on from step {earlier[-1]}"
                        if earlier and step is None
                        else "; move it elsewhere to begin anew, or give another --out"
                    )
                    raise CheckpointError(f"checkpoint {self.folder / str(number)} is damaged ({problem}){hint}") from problem
                _say(f"checkpoint {self.folder / str(number)} is damaged ({problem}); going on from step {earlier[-1]}")
                continue
            self._set_aside([s for s in steps if s > number])
            return found
        return None

    def _read(self, step: int, like: Any) -> Restored:
        wanted, folder = _named(like), self.folder / str(step)
        with quiet_orbax(), _damaging(folder):
            self._orbax.reload()
            found = self._orbax.metadata(step)
            if found.metadata is None or not isinstance(found.custom_metadata or {}, Mapping):
                raise ValueError("its metadata cannot be read")
            there, about = dict(found.metadata), dict(found.custom_metadata or {})
        extra = _extra(about)
        _compare(folder, there, wanted)
        with quiet_orbax(), _damaging(folder):
            arrays = self._orbax.load(step, wanted)
        for name, number in fingerprints(arrays).items() if "fingerprints" in about else ():
            if about["fingerprints"].get(name) != number:
                raise _Damaged(f"{name} is not what was saved")
        return Restored(step, jax.tree.structure(like).unflatten([arrays[name] for name in wanted]), extra)

    def _set_aside(self, steps: list[int]) -> None:
        """Moves checkpoints to the folder "set_aside" beside theirs. They are not deleted: that is for people to do."""
        if not steps:
            return
        aside = self.folder.with_name("set_aside")
        if is_main():
            aside.mkdir(exist_ok=True)
            for step in steps:
                number = sum(1 for path in aside.iterdir() if path.name.split("-")[0] == str(step))
                os.replace(self.folder / str(step), aside / f"{step}-{number + 1}")
        synchronize("checkpoints set aside")
        with quiet_orbax():
            self._orbax.reload()
        _say(f"moved the later checkpoints of steps {', '.join(map(str, steps))} to {aside}")


class _Damaged(Exception):
    pass


_DAMAGE = (KeyError, ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What Orbax, TensorStore and JSON raise for files that are cut, missing, swapped or have a flipped bit."""


@contextlib.contextmanager
def _damaging(folder: Path) -> Iterator[None]:
    """Within it, what damaged files raise is `_Damaged`. What healthy ones may meet, such as too little memory, is passed on as it is,
    and a lack of permission is a `CheckpointError`; Orbax may have wrapped both.
    """
    try:
        yield
    except PermissionError as problem:
        raise _forbidden(folder, problem.filename or folder) from problem
    except _DAMAGE as problem:
        cause: BaseException | None = problem
        while cause is not None:
            if isinstance(cause, PermissionError):
                raise _forbidden(folder, cause.filename or folder) from problem
            if isinstance(cause, MemoryError | jax.errors.JaxRuntimeError) or (isinstance(cause, OSError) and not isinstance(cause, _DAMAGE)):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        closed = next((path for path in (folder, *folder.rglob("*")) if path.exists() and not os.access(path, os.R_OK)), None)
        if closed is not None:
            raise _forbidden(folder, closed) from problem
        raise _Damaged(_first_line(problem)) from problem


def _forbidden(folder: Path, path: Any) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder} is not this user's to read: permission denied for {path}; change its permissions or owner")


def _say(text: str) -> None:
    if is_main():
        print(text, flush=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _extra(about: Mapping[str, Any]) -> dict[str, Any]:
    """What was saved beside the state. Raises `_Damaged` where it is not as it was written."""
    if "data" in about:  # before fingerprints were kept
        return dict(about)
    if _digest(about.get("text", "")) != about.get("sha256"):
        raise _Damaged("the data position and settings in its metadata are not what was saved")
    return json.loads(about["text"])


def _first_line(problem: BaseException) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)[:300]


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, e.g. "parameters/unet/conv_in/kernel" or "optimizer/1/0/mu/unet/conv_in/kernel"."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _compare(where: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` with a diff where a checkpoint is of another model or optimizer."""
    lines = [f"  only in the checkpoint: {name} {tuple(there[name].shape)}" for name in there if name not in wanted]
    lines += [f"  only in this run: {name} {tuple(np.shape(wanted[name]))}" for name in wanted if name not in there]
    for name in there.keys() & wanted.keys():
        old, new = (f"{tuple(x.shape)} {np.dtype(x.dtype).name}" for x in (there[name], wanted[name]))
        if old != new:
            lines.append(f"  {name}: {old} in the checkpoint, {new} in this run")
    if lines:
        rest = f"\n  and {len(lines) - 12} more" if len(lines) > 12 else ""
        listed = "\n".join(sorted(lines)[:12])
        raise CheckpointError(f"checkpoint {where} is of another model, stage or optimizer:\n{listed}{rest}\nuse its own config, or another --out")
