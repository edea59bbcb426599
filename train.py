"""Trains IdentityNet, the image adapter and the resampler against a frozen base, or whatever else a recipe says.

A recipe is a file in configs/; options change single fields of it: python train.py --config configs/instantid.py --steps 1000
A run that was stopped goes on with the same command.
Exit status: 0 finished, 75 stopped by a signal with its state saved, 1 an error, 2 an option that is missing,
unknown, out of its range, or does not go with another.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import tyro

try:
    from instantid_jax.options import OptionError, check_folder, status_of, while_read, wrong_options
    from instantid_jax.parallel.distributed import is_main, join, leave, synchronize
    from instantid_jax.parallel.environment import check_joining
    from instantid_jax.running import keep_compiled, noted_signals
    from instantid_jax.training.checks import missing_data
    from instantid_jax.training.config import TrainConfig
    from instantid_jax.training.loop import BadSteps, Run, train
    from instantid_jax.training.plan import dry_run, explain_sharding
    from instantid_jax.training.recipes import load_recipe
    from instantid_jax.training.state import check_start
except ModuleNotFoundError as missing:
    raise SystemExit(f'train.py: {missing.name} is not installed; training needs: pip install -e ".[train]"') from missing


@dataclasses.dataclass(frozen=True)
class Command:
    """What to do with a recipe, and changes to it."""

    recipe: Annotated[TrainConfig, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Compile the step, print memory and FLOPs, train nothing."""
    aot: str | None = None
    """Compile the step for TPUs that are not at hand, as v5e:4x4, tell memory, FLOPs and collectives, train nothing. Status 4: it does not fit."""
    aot_json: Path | None = None
    """File for the figures of --aot."""
    explain_sharding: bool = False
    """Print path, shape, partition and bytes a device of every weight, and stop."""
    resume_step: int | None = None
    """Go on from this checkpoint instead of the newest."""
    resume_damaged: Literal["stop", "previous"] = "stop"
    """Where the newest checkpoint is damaged: stop, or go on from the one before."""
    distributed: bool = False
    """Join the other processes of a pod or cluster (`jax.distributed`). TPU pods, Slurm and the environment of docs/launch.md say
    where; elsewhere give the three below."""
    coordinator: str | None = None
    """Address "host:port" of process 0."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which one this is, from 0."""


@while_read
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    chosen, rest = first.parse_known_args(arguments)
    if chosen.config is None and {"-h", "--help"} & set(rest):
        print(f"{__doc__}\nEvery recipe's fields are options: python train.py --config FILE --help")
        return 0
    warnings.showwarning = lambda message, *_: print(f"train.py: {message}", file=sys.stderr)
    keep_compiled()
    try:
        with wrong_options():
            default = Command(load_recipe(chosen.config))
        about = f"{__doc__}\nOptions of {chosen.config}, with its values as defaults; --config FILE names another recipe."
        with wrong_options():
            command = tyro.cli(Command, default=default, args=rest, description=about, config=(tyro.conf.AvoidSubcommands,))
        return run(command)
    except (ValueError, OSError, BadSteps) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return leave(status_of(error))


def run(command: Command) -> int:
    """Plans or trains. Raises ValueError, OSError or BadSteps with one clear message."""
    check_joining(command.distributed, command.coordinator, command.processes, command.process)
    if command.distributed:
        join(command.coordinator, command.processes, command.process)
    asked = [f"--{name.replace('_', '-')}" for name in ("explain_sharding", "aot", "dry_run") if getattr(command, name)]
    if len(asked) > 1:
        raise OptionError(f"{' and '.join(asked)} are plans of different kinds; ask for one")
    if command.explain_sharding:
        print(explain_sharding(command.recipe))
        return 0
    if command.aot is not None:
        from instantid_jax.parallel.aot import recipe_plan, tell  # only a plan needs it

        return tell(recipe_plan(command.aot, command.recipe), command.aot_json)
    if command.aot_json is not None:
        raise OptionError("--aot-json goes with --aot")
    if command.dry_run:
        print(dry_run(command.recipe))
        return 0
    check_start(command.recipe.networks, command.recipe.init)
    check_folder(Path(command.recipe.out))
    prepare_data(command.recipe)
    with noted_signals() as stopping:
        return train(Run(command.recipe), resume_step=command.resume_step, damaged=command.resume_damaged, stopping=stopping)


def prepare_data(config: TrainConfig) -> None:
    """Makes the data sets that are missing, by the recipe's own commands. Raises ValueError where that fails."""
    if is_main():
        for line in missing_data(config.prepare, config.data):
            from instantid_jax.data.prepare import main as prepare  # needs more packages than training does

            print(f"preparing data: {line}", flush=True)
            if prepare(shlex.split(line)):
                raise ValueError(f"the data could not be prepared by: python -m instantid_jax.data.prepare {line}")
    synchronize("data", timeout=7 * 24 * 3600)


if __name__ == "__main__":
    raise SystemExit(main())
