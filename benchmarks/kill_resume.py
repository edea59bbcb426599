"""Kills trainings with SIGKILL at random moments, resumes them, and counts how many came back bit for bit.

    python benchmarks/kill_resume.py --kills 200

One training runs undisturbed. Others are killed again and again, at moments drawn evenly over starting, training and saving,
and started anew until they reach the last step. Then parameters, optimizer state and moving average must have the undisturbed
run's bits, and every batch that any attempt fetched must have held the undisturbed run's records at that step. A run
that differs counts all of its kills as failures. After every kill the newest complete checkpoint may not be lost: a run that has
had one never starts from step 0 again.

The exit status is 0 only if every kill came back.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import random
import sys
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "training")]

STEPS, EVERY = 24, 3
PART = {"recognize": "quick", "denoise": "whole"}


@dataclasses.dataclass
class Outcome:
    """What came of all attempts so far."""

    kills: int = 0
    good: int = 0
    runs: int = 0
    restarts_from_zero: int = 0


def worker(out: str, weights: str, objective: str, cache: str, training: Event) -> None:
    """One attempt: trains `out` from where it stands to the last step, and leaves a digest of the final state."""
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    import small

    from instantid_jax.training.loop import Run, train

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "console.txt").open("a") as console, contextlib.redirect_stdout(console), contextlib.redirect_stderr(console):
        config = small.PARTS[PART[objective]](
            folder / "run", weights, steps=STEPS, checkpoint__every=EVERY, loader__num_threads=2, loader__paired_reference=0.5
        )
        run = Run(config, source=small.source(24))
        _note_batches(run, folder / "order.jsonl", training)
        status = train(run)
        if status == 0:
            (folder / "digest.json").write_text(json.dumps(_digests(run.state)))
    sys.exit(status)


def _note_batches(run: Any, path: Path, training: Event) -> None:
    """Writes what is in every batch, and says when training has begun."""
    place, plain = path.open("a"), run.global_batch

    def noting(batch: Any) -> Any:
        row = {"position": int(batch["position"][0]), "index": batch["index"].tolist()}
        place.write(json.dumps(row) + "\n")
        place.flush()
        training.set()
        return plain(batch)

    run.global_batch = noting


def _digests(state: Any) -> dict[str, str]:
    import jax
    import numpy as np

    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for path, leaf in leaves}


def order_of(folder: Path) -> dict[int, set[tuple[int, ...]]]:
    """The records of every batch that any attempt fetched, by its position; a last line that the kill cut off is passed over."""
    found: dict[int, set[tuple[int, ...]]] = {}
    for line in (folder / "order.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            found.setdefault(row["position"], set()).add(tuple(row["index"]))
    return found


class Trainings:
    """Attempts in processes of their own, forked from one that has imported everything but started nothing of JAX."""

    def __init__(self, folder: Path, objective: str):
        self.folder, self.objective = folder, objective
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["small", "instantid_jax.training.loop"])

    def start(self, out: Path) -> tuple[Any, Event]:
        training = self.context.Event()
        arguments = (str(out), str(self.folder / "weights"), self.objective, str(self.folder / "cache"), training)
        process = self.context.Process(target=worker, args=arguments)
        process.start()
        return process, training


def undisturbed(trainings: Trainings, name: str) -> tuple[Path, float, float]:
    """A whole run: (its folder, seconds until training begins, seconds from there to the end)."""
    out, began = trainings.folder / name, time.monotonic()
    process, training = trainings.start(out)
    while process.is_alive() and not training.wait(0.1):
        pass
    middle = time.monotonic()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the undisturbed run failed:\n{(out / 'console.txt').read_text()}")
    return out, middle - began, time.monotonic() - middle


def disturbed(trainings: Trainings, out: Path, limit: int, spans: tuple[float, float], dice: random.Random) -> tuple[int, int, bool]:
    """Kills and restarts a run until it ends, at most `limit` times: (kills, restarts from step 0 that should not have been, finished)."""
    kills = lost = 0
    while True:
        had_one = _complete(out)
        process, training = trainings.start(out)
        if kills < limit:
            if dice.random() < 0.15:  # somewhere in the start
                process.join(dice.uniform(0, spans[0]))
            else:
                while process.is_alive() and not training.wait(0.02):
                    pass
                process.join(dice.uniform(0, 0.75 * spans[1]))
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
                continue
        process.join()
        console = (out / "console.txt").read_text()
        lost += had_one and console.rsplit("training from step", 1)[-1].startswith(" 0 ")
        if process.exitcode:
            print(f"{out.name} failed with {process.exitcode}:\n{console[-2000:]}")
        return kills, lost, process.exitcode == 0


def _complete(out: Path) -> bool:
    folder = out / "run" / "checkpoints"
    return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


def compare(out: Path, reference: Path) -> list[str]:
    """What differs from the undisturbed run: leaves of the state, and batches."""
    mine, theirs = (json.loads((folder / "digest.json").read_text()) for folder in (out, reference))
    wrong = [name for name in theirs.keys() | mine.keys() if mine.get(name) != theirs.get(name)]
    order, wanted = order_of(out), order_of(reference)
    return wrong + [f"batch at position {p}" for p in wanted.keys() | order.keys() if order.get(p) != wanted.get(p)]


def measure(kills: int, seed: int, objective: str, folder: Path) -> Outcome:
    """Runs it all."""
    import small

    small.write_weights(folder / "weights", small.PARTS[PART[objective]]("unused", "unused"))
    trainings, dice, outcome = Trainings(folder, objective), random.Random(seed), Outcome()
    undisturbed(trainings, "first")  # fills the compilation cache
    reference, *spans = undisturbed(trainings, "undisturbed")
    print(f"undisturbed: {STEPS} steps, {spans[0]:.1f} s to start, {spans[1]:.1f} s to train; a checkpoint every {EVERY} steps", flush=True)
    while outcome.kills < kills:
        out = folder / f"killed-{outcome.runs}"
        count, lost, finished = disturbed(trainings, out, kills - outcome.kills, (spans[0], spans[1]), dice)
        wrong = compare(out, reference) if finished else ["it did not finish"]
        outcome.runs += 1
        outcome.kills += count
        outcome.good += 0 if wrong or lost else count
        outcome.restarts_from_zero += lost
        print(f"run {outcome.runs}: killed {count} times, {'equal bit for bit' if not wrong else 'NOT equal: ' + ', '.join(wrong[:5])}", flush=True)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    about = "what is trained: the recogniser of latents, which starts quickly, or InstantID at its smallest"
    parser.add_argument("--objective", choices=("recognize", "denoise"), default="recognize", help=about)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = measure(chosen.kills, chosen.seed, chosen.objective, Path(folder))
    print(f"{outcome.good} of {outcome.kills} kills came back bit for bit, in {outcome.runs} runs")
    return 0 if outcome.good == outcome.kills else 1


if __name__ == "__main__":
    raise SystemExit(main())
