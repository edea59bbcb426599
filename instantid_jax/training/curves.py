"""Draws the curves of a run from its log: the training loss, and what validation tells.

    python -m instantid_jax.training.curves runs/portraits_quick

writes RUN/curves.png. One panel a quantity; the gaps say by how much the plain loss grows with the wrong person and the wrong pose.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from instantid_jax.options import while_read

__all__ = ["draw", "read_curves"]

Curves = dict[str, list[tuple[int, float]]]
SHOWN = ("train/loss", "validation/loss", "validation/wrong_pose_gap", "validation/wrong_person_gap")


@dataclass(frozen=True)
class Settings:
    """Draws the curves of a run."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    out: Path | None = None
    """The picture; by default RUN/curves.png."""


def read_curves(run: Path) -> Curves:
    """(step, value) pairs by "kind/name"; of a step that was done twice, after a resume, the later one counts. Raises ValueError."""
    log = run / "log.jsonl"
    if not log.is_file():
        raise ValueError(f"{run} holds no log.jsonl: name the folder of a training run")
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for number, line in enumerate(log.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            kind, step = row["kind"], int(row["step"])
        except (ValueError, KeyError, TypeError) as problem:
            raise ValueError(f"{log}, line {number}: no record of a training run ({problem})") from problem
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "kind"):
                found[f"{kind}/{name}"][step] = float(value)
    return {name: sorted(values.items()) for name, values in found.items()}


def draw(curves: Curves, out: Path) -> None:
    """One panel for each of `SHOWN` that the run has, as a PNG. Raises ValueError where it has none."""
    from matplotlib.figure import Figure

    shown = [name for name in SHOWN if curves.get(name)]
    if not shown:
        raise ValueError("the run has logged nothing yet")
    figure = Figure(figsize=(4 * len(shown), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.plot(*zip(*curves[name], strict=True))
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if "gap" in name:
            axes.axhline(0, color="black", linewidth=0.8)
    figure.savefig(out, dpi=100, metadata={"Software": None})


@while_read
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    settings = tyro.cli(Settings, args=arguments, description=__doc__)
    out = settings.out or settings.run / "curves.png"
    try:
        draw(read_curves(settings.run), out)
    except (ValueError, OSError) as error:
        print(f"curves: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
