"""What can be said of a configuration without looking at data, weights or devices: names, ranges, parts that do not go together."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import shlex
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from instantid_jax.options import Range
from instantid_jax.published import ConfigError, did_you_mean

__all__ = ["check_choices", "check_patterns", "check_ranges", "missing_data", "prepared_folder"]

# Fields by where they lie: (smallest, largest value). None as a value is always allowed where the field allows it.
RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, math.inf),
    "loss.min_snr_gamma": (0, math.inf),
    "loss.clipped_v_limit": (1, math.inf),
    "loss.noise_offset": (0, 1),
    "loss.input_perturbation": (0, 1),
    "loss.timestep_bias_portion": (0, 1),
    "loss.timestep_bias_factor": (0, math.inf),
    "loss.face_weight": (0, math.inf),
    "loss.identity_weight": (0, math.inf),
    "loss.identity_power": (0, math.inf),
    "loss.kl_weight": (0, math.inf),
    "loss.gradient_weight": (0, math.inf),
    "loss.crop": (1, math.inf),
    "loss.shift": (0, math.inf),
    "optimizer.learning_rate": (0, math.inf),
    "optimizer.warmup": (0, math.inf),
    "optimizer.hold": (0, 1),
    "optimizer.final": (0, 1),
    "optimizer.b1": (0, 1),
    "optimizer.b2": (0, 1),
    "optimizer.eps": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.clip_norm": (1e-12, math.inf),
    "optimizer.ema": (0, 1),
    "optimizer.accumulate": (1, math.inf),
    "mesh.data": (1, math.inf),
    "mesh.fsdp": (1, math.inf),
    "mesh.tensor": (1, math.inf),
    "mesh.dcn_data": (1, math.inf),
    "checkpoint.every": (1, math.inf),
    "checkpoint.keep": (1, math.inf),
    "checkpoint.keep_best": (0, math.inf),
    "guard.spike": (1, math.inf),
    "guard.limit": (1, math.inf),
    "log.every": (1, math.inf),
    "log.bucket_count": (1, math.inf),
    "validation.every": (1, math.inf),
    "validation.batches": (1, math.inf),
    "validation.samples_every": (1, math.inf),
    "validation.samples": (1, math.inf),
    "validation.sample_steps": (1, math.inf),
}


def check_choices(config: Any, where: str) -> None:
    """Raises `ConfigError` where a field, here or in a part, is of another type, or is one of some words and another."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            check_choices(value, f"{where}.{field.name}")
        elif typing.get_origin(hint) is Literal and value not in (known := typing.get_args(hint)):
            raise ConfigError(f"{where}.{field.name}: {value!r} is none of {', '.join(map(str, known))}{did_you_mean(str(value), map(str, known))}")
        elif not _fits(value, hint):
            wanted = field.type if isinstance(field.type, str) else getattr(hint, "__name__", str(hint))
            raise ConfigError(f"{where}.{field.name} is {value!r}, a {type(value).__name__}; it must be of the type {wanted}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a type hint of a configuration says. A whole number may stand for a float; True is no number."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(parts) == 2 and parts[1] is ...:
            return all(_fits(one, parts[0]) for one in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def check_ranges(config: Any, where: str) -> None:
    """Raises `ConfigError` where a number of `RANGES` is out of its range."""
    for path, (low, high) in RANGES.items():
        value = config
        for name in path.split("."):
            value = getattr(value, name)
        if value is not None and (problem := Range(low, high).problem(value)):
            raise ConfigError(f"{where}: {path} {problem}")


def check_patterns(where: str, patterns: Iterable[str]) -> None:
    """Raises `ConfigError` for the first of `patterns` that is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as problem:
            raise ConfigError(f"{where}: {pattern!r} is no regular expression ({problem})") from problem


def missing_data(lines: Sequence[str], data: Sequence[str]) -> list[str]:
    """Those lines of `TrainConfig.prepare`, in order, that must run: `data`, or a line that must run, needs a set that they make."""
    wanted, out = {Path(folder) for folder in data}, []
    for line in reversed(lines):
        folder = prepared_folder(line)
        if folder in wanted and not any(folder.glob("**/dataset_info.json")):  # what was cut off has none, and is made again
            out.insert(0, line)
            source = _folders(line).data
            wanted |= {Path(source)} if source else set()
    return out


def prepared_folder(line: str) -> Path:
    """The --out folder of a line of `TrainConfig.prepare`. Raises `ConfigError` where it names none."""
    folder = _folders(line).out
    if not folder:
        raise ConfigError(f"TrainConfig: prepare: the line {line!r} needs --out and a folder")
    return Path(folder)


def _folders(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--out")
    parser.add_argument("--data")
    try:
        return parser.parse_known_args(shlex.split(line))[0]
    except (argparse.ArgumentError, ValueError) as problem:
        raise ConfigError(f"TrainConfig: prepare: the line {line!r} cannot be read ({problem})") from problem
