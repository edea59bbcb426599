"""Starts a command on many machines: python -m instantid_jax.launch {tpu-vm,xpk,jobset,slurm} [options] -- COMMAND

Prints what would be run or submitted, and does it only with --run. Example:
python -m instantid_jax.launch slurm --nodes 2 --gpus 8 -- python train.py --config configs/instantid.py --distributed

Exit status: 0 printed or done, 1 an error, 2 a wrong option; with --run that of what was run.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from typing import Annotated

import tyro

from instantid_jax.launch.recipes import JobSet, Launch, LaunchError, Slurm, TpuVm, Xpk
from instantid_jax.options import status_of, while_read

Recipe = (
    Annotated[TpuVm, tyro.conf.subcommand("tpu-vm")]
    | Annotated[Xpk, tyro.conf.subcommand("xpk")]
    | Annotated[JobSet, tyro.conf.subcommand("jobset")]
    | Annotated[Slurm, tyro.conf.subcommand("slurm")]
)


@while_read
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    cut = given.index("--") if "--" in given else len(given)
    recipe = tyro.cli(Recipe, args=given[:cut], description=__doc__, prog="python -m instantid_jax.launch")  # pyright: ignore[reportCallIssue, reportArgumentType]
    command = given[cut + 1 :]
    try:
        if not command:
            raise LaunchError("no command: write it behind --, as in: -- python train.py --config configs/instantid.py --distributed")
        launch: Launch = recipe.launch(command)
        if "--distributed" not in command and any(word.endswith(("train.py", "sample.py")) for word in command):
            print("launch: the command has no --distributed, so every process would work alone", file=sys.stderr)
        return _run(launch) if recipe.run else _tell(launch)
    except (LaunchError, OSError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return status_of(error)


def _tell(launch: Launch) -> int:
    if launch.document is None:
        print(shlex.join(launch.command))
    else:
        print(launch.document, end="")
        print(f"launch: with --run this goes to: {shlex.join(launch.command)}", file=sys.stderr)
    return 0


def _run(launch: Launch) -> int:
    try:
        return subprocess.run(launch.command, input=launch.document, text=True, check=False).returncode
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{launch.command[0]} is not installed here, or not on the PATH") from error


if __name__ == "__main__":
    raise SystemExit(main())
