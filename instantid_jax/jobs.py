"""Many pictures from a file of jobs: spread over devices and processes, resumable, accounted for.

A picture lies at OUT/<person>/<seed>-<key>.png, where the key is a hash of everything that decides it, weights and photos too. So
the same command goes on where it was stopped, and with a changed file or other weights makes what is new. The pictures are the
files that ``sample.py`` alone writes with the same settings.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from instantid_jax.config import ModelConfig
from instantid_jax.defaults import DEFAULT_WEIGHTS
from instantid_jax.denoise import Inputs
from instantid_jax.face import AnalyzerError, FaceError, Identity, load_analyzer
from instantid_jax.job_file import Picture, in_fields, read_jobs
from instantid_jax.ledger import Ledger, read_rows, replace_text, summary
from instantid_jax.lora import Lora
from instantid_jax.options import OptionError, check_folder
from instantid_jax.output import file_digest, read_settings, run_settings, save_picture, suffix_of, weights_digest
from instantid_jax.parallel.distributed import agreed, flag_raised, is_main, join, raise_flag, stacked, synchronize
from instantid_jax.parallel.environment import check_joining
from instantid_jax.pipeline import PipelineError, check_call
from instantid_jax.references import check_files, read_identity
from instantid_jax.request import Request
from instantid_jax.running import EXIT_INTERRUPTED, EXIT_PARTLY, lease, noted_signals
from instantid_jax.sample_options import SampleOptions
from instantid_jax.sampling import conditions_of, inputs_of, model_config, open_pipeline, settings_of
from instantid_jax.spread import Spread

__all__ = ["run_jobs"]

_PATIENCE = 7 * 24 * 3600.0  # seconds that a process that is ready waits for one that still draws
_PLACES = ("model", "weights", "controlnet", "lora", "analyzer_root")  # settings that say where something lies, not what it is
_OWN_PLACE = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EINVAL, errno.EILSEQ}
"""Errors of one file's place. Others, a full disk among them, are errors of all pictures."""
_TELL = 10.0  # seconds between two lines of progress


class _Task(NamedTuple):
    """A picture and its place on disk."""

    picture: Picture
    key: str
    path: str
    """Below the folder."""

    @property
    def about(self) -> dict[str, Any]:
        """What its row in the ledger says of it."""
        s = self.picture.options
        return {"key": self.key, "line": self.picture.line, "person": self.picture.person, "prompt": s.prompt, "seed": s.seed}


class _Prepared(NamedTuple):
    """A picture that can be drawn."""

    task: _Task
    request: Request
    inputs: Inputs


def run_jobs(given: SampleOptions, loras_for: Callable[[ModelConfig], Sequence[Lora]]) -> int:
    """Draws what ``--jobs`` asks for. Returns the exit status: 0 all made, 3 some failed, 75 stopped by a signal.

    `loras_for` reads the LoRAs of all pictures for the model. Raises ValueError or OSError with one clear sentence for what concerns all
    pictures: the file, the options, the weights, the folder.
    """
    assert given.jobs is not None
    check_joining(given.distributed, given.coordinator, given.processes, given.process)
    if given.distributed:
        join(given.coordinator, given.processes, given.process)
    if given.num_images != 1:
        raise OptionError("--num-images is not for --jobs; list the seeds in the file")
    if several := next((name for name in ("people", "view", "blend", "compare") if getattr(given, name)), None):
        raise OptionError(f"--{several} is not for --jobs, whose pictures show one person in one pose each")
    if alone := next((name for name in ("init_image", "refine_face", "keep_face_vector") if getattr(given, name)), None):
        raise OptionError(f"--{alone.replace('_', '-')} is not for --jobs; run sample.py once for each picture")
    check_files([given.jobs])
    check_folder(given.out)
    config = model_config(given)
    pictures, loras = read_jobs(given.jobs, given, config), loras_for(config)
    tasks = _tasks(pictures, config, loras)
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(noted_signals())
        if is_main():
            stack.enter_context(lease(given.out, "drawing"))
        synchronize("jobs begin")
        began = time.time()
        ledger = Ledger(given.out, jax.process_index())
        with contextlib.closing(ledger):
            _Drawing(given, config, loras, ledger, stopping).run(tasks[jax.process_index() :: jax.process_count()])
        synchronize("jobs end", timeout=_PATIENCE)
        stopped = agreed(bool(stopping))
        status = _report(given.out, tasks, stopped, time.time() - began) if is_main() else 0
        return int(stacked(np.asarray([status], np.int32))[0, 0])


def _tasks(pictures: list[Picture], config: ModelConfig, loras: Sequence[Lora]) -> list[_Task]:
    """Every picture once, with its key and place."""
    digest = functools.cache(_content)
    found: dict[str, _Task] = {}
    for picture in pictures:
        s = picture.options
        about = {name: value for name, value in settings_of(s, loras).items() if name not in _PLACES}
        about |= {"weights": weights_digest(s.weights or DEFAULT_WEIGHTS), "controlnet": [weights_digest(folder) for folder in s.controlnet]}
        about |= {"analyzer": s.analyzer or config.face_analyzer}
        about |= {kind: [digest(path) for path in paths] for kind, paths in inputs_of(s).items()}
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        path = f"{picture.person}/{s.seed:06d}-{key[:12]}{suffix_of(about)}"
        found.setdefault(path, _Task(picture, key, path))
    return list(found.values())


def _content(path: Path) -> str:
    """Hash of a file; of one that cannot be read its name, as its picture will fail."""
    try:
        return file_digest(path)
    except OSError:
        return f"unreadable: {path}"


class _Drawing:
    """One process's work: prepares picture after picture, and draws them as soon as there is one for every device."""

    def __init__(self, given: SampleOptions, config: ModelConfig, loras: Sequence[Lora], ledger: Ledger, stopping: list[int]) -> None:
        self.given, self.config, self.loras, self.ledger, self.stopping = given, config, loras, ledger, stopping
        self.out = given.out
        self.pipe: Any = None
        self.spread: Any = None
        self.analyzer = functools.cache(lambda: load_analyzer(given.analyzer or config.face_analyzer, given.analyzer_root))
        self.people: dict[Hashable, Identity | ValueError | OSError] = {}
        self.told, self.count, self.done, self.failed = 0.0, 0, 0, 0

    def run(self, tasks: list[_Task]) -> None:
        """Makes what is not there yet, until told to stop."""
        rows = read_rows(self.out)
        wanted = [task for task in tasks if not self._is_made(task, rows.get(task.path))]
        self.count = len(wanted)
        self._tell(f"{len(tasks) - len(wanted)} of {len(tasks)} pictures are there already")
        waiting: dict[Hashable, list[_Prepared]] = {}
        for task in wanted:
            if self._is_stopped():
                break
            prepared = self._prepare(task)
            if prepared is None:
                continue
            batch = waiting.setdefault(Spread.kind(prepared.request, prepared.inputs), [])
            batch.append(prepared)
            if len(batch) == self.spread.width:
                self._draw(batch)
                batch.clear()
        for batch in waiting.values():
            if batch and not self._is_stopped():
                self._draw(batch)
        self._is_stopped()

    def _is_made(self, task: _Task, row: dict[str, Any] | None) -> bool:
        """Whether the picture is there and whole. One without a row, of a process that was killed between the two, gets its row."""
        path = self.out / task.path
        if not path.is_file():
            return False
        if row is not None and row["status"] == "made" and row.get("bytes") == path.stat().st_size:
            return True
        try:
            settings = read_settings(path)
        except (ValueError, OSError):
            return False  # it is made again in its place
        if settings.get("seed") != task.picture.options.seed:
            return False
        self.ledger.add(task.path, "made", **task.about, bytes=path.stat().st_size, adopted=True)
        return True

    def _prepare(self, task: _Task) -> _Prepared | None:
        """The picture ready to be drawn; None where something about it is wrong, which the ledger then says."""
        s, config = task.picture.options, self.config
        try:
            check_files([*s.control_image, *s.control_model, *filter(None, (s.control_mask,))])
            pose = self._person((s.pose,), None, s.pose_face_index) if s.pose else None
            identity = self._person(s.face, config.resampler.embedding_dim, s.face_index, s.face_combine, s.face_weight or None)
            conditions, call = conditions_of(s, config.keypoint_scale, pose or identity), s.call()
        except AnalyzerError:
            raise  # no picture can be made without it
        except (ValueError, OSError) as error:
            return self._fail(task, getattr(error, "code", type(error).__name__), in_fields(str(error)))
        if self.pipe is None:
            self.pipe = open_pipeline(self.given, self.loras)
            self.spread = Spread(self.pipe)
        try:
            request = check_call(config, nets=1 + len(s.controlnet), **call)
            inputs = self.pipe.prepare(request, conditions["image"], identity.embedding, conditions["control_mask"])
        except PipelineError as error:
            return self._fail(task, "refused", in_fields(str(error)))
        return _Prepared(task, request, inputs)

    def _person(self, paths: tuple[Path, ...], embedding_dim: int | None, face_index: int | None, *combined: Any) -> Identity:
        """Whom the photos show; they are looked at once. The arguments are `read_identity`'s."""
        key = paths, embedding_dim, face_index, *combined
        if key not in self.people:
            try:
                check_files(paths)
                self.people[key] = read_identity(paths, self.analyzer, embedding_dim, face_index, *combined)
            except AnalyzerError:
                raise
            except (FaceError, OSError) as error:
                self.people[key] = error
        found = self.people[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _draw(self, batch: list[_Prepared]) -> None:
        """Draws and writes pictures of one kind. Those that are too large, or whose files have impossible places, are failures of their own."""
        try:
            drawn = self.spread.draw(batch[0].request, [prepared.inputs for prepared in batch])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            for task, _, _ in batch:
                self._fail(task, "too_large", "does not fit into the device's memory; ask for a smaller picture, or see docs/speed.md")
            return
        for (task, _, _), pictures in zip(batch, drawn, strict=True):
            if not np.isfinite(pictures).all():
                self._fail(task, "not_finite", "the networks gave values that are not finite; use --dtype float32 or bfloat16, or check the weights")
                continue
            image, s, path = Image.fromarray(np.round(pictures[0] * 255).astype(np.uint8)), task.picture.options, self.out / task.path
            try:
                save_picture(image, path, run_settings(image.size, inputs_of(s), settings_of(s, self.loras)) | {"seed": s.seed})
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno not in _OWN_PLACE:
                    raise
                self._fail(task, "unwritable", f"cannot be written: {in_fields(str(error))}")
                continue
            self.ledger.add(task.path, "made", **task.about, bytes=path.stat().st_size)
            self.done += 1
        self._tell(None)

    def _is_stopped(self) -> bool:
        """Whether to stop. A process that was told so tells the others, who look here too."""
        if self.stopping:
            raise_flag("stop")
        elif flag_raised("stop"):
            self.stopping.append(0)
        return bool(self.stopping)

    def _fail(self, task: _Task, reason: str, message: str) -> None:
        self.ledger.add(task.path, "failed", **task.about, reason=reason, message=message)
        self.failed += 1
        print(f"line {task.picture.line}, {task.picture.person}, seed {task.picture.options.seed}: {message}", file=sys.stderr, flush=True)

    def _tell(self, text: str | None) -> None:
        now = time.monotonic()
        if text is not None or now - self.told > _TELL or self.done + self.failed == self.count:
            self.told = now
            progress = f"{self.done} of {self.count} made" + (f", {self.failed} failed" if self.failed else "")
            print(f"process {jax.process_index()}: {text or progress}", flush=True)


def _report(out: Path, tasks: list[_Task], stopped: bool, seconds: float) -> int:
    """Writes the ledger of all processes and the sums; returns the exit status."""
    rows = read_rows(out)
    told = summary(out, [task.path for task in tasks], rows)
    listed = [rows.get(task.path) or {"path": task.path, "status": "missing", **task.about} for task in tasks]
    replace_text(out / "ledger.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in listed))
    told |= {"interrupted": stopped, "seconds": round(seconds, 1), "processes": jax.process_count(), "devices": jax.device_count()}
    replace_text(out / "report.json", json.dumps(told, indent=1) + "\n")
    print(f"{told['asked']} asked: {told['made']} made, {told['failed']} failed, {told['missing']} missing; {out / 'report.json'}", flush=True)
    if stopped and told["missing"]:
        return EXIT_INTERRUPTED
    return EXIT_PARTLY if told["failed"] or told["missing"] else 0
