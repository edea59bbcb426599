"""A file of jobs: one JSON object a line, each a person with prompts, seeds and settings, taken apart into single pictures.

    {"face": "anna.jpg", "prompt": ["film noir", "watercolor"], "seed": [0, 1], "steps": 20}

The fields are options of ``sample.py``, with underscores; what a line leaves out is as on the command line. Paths begin at the file's folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

from instantid_jax.config import ModelConfig
from instantid_jax.options import OptionError
from instantid_jax.pipeline import check_call
from instantid_jax.prompts import prompts_of
from instantid_jax.published import did_you_mean
from instantid_jax.request import in_options
from instantid_jax.sample_options import NOT_FOR_JOBS, RUN_OPTIONS, SampleOptions

__all__ = ["JobError", "Picture", "in_fields", "read_jobs"]

COMMON = ("weights", "weights_dtype", "lora", "lora_scale", "allow_unknown_lora_keys", "controlnet", "analyzer", "analyzer_root", "dtype")
"""Options that are the same for all jobs: on the command line alone."""

_LONGEST = 200
"""Bytes of a folder's name, of the 255 that file systems take."""
_HINTS = {
    name: hint for name, hint in typing.get_type_hints(SampleOptions).items() if name not in (*RUN_OPTIONS, *COMMON, *NOT_FOR_JOBS, "num_images")
}
_KINDS: dict[Any, tuple[type | tuple[type, ...], str]] = {
    Path: (str, "a path"),
    str: (str, "a text"),
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    float | str: ((int, float, str), "a number or a text"),
}


class JobError(OptionError):
    """A line that cannot be used; the message names file and line."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture that is asked for."""

    line: int
    """Of the file, from 1."""
    person: str
    """Name of the folder that it lies in."""
    options: SampleOptions
    """With one prompt and one seed; nothing is left to defaults."""


def read_jobs(path: Path, given: SampleOptions, config: ModelConfig) -> list[Picture]:
    """All pictures that the lines ask for, in their order: prompts, and of each the seeds.

    `given` holds the command line's options, `config` is the model's. Raises `JobError` for the first line that is wrong: nothing
    is read but the file itself, so photos are not looked at.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold other separators as they are
    except UnicodeDecodeError as error:
        raise JobError(f"{path}: is no UTF-8 text ({error})") from error
    pictures: list[Picture] = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            pictures += _pictures(number, _fields(text), path.parent, given, config)
        except ValueError as error:
            raise JobError(f"{path}, line {number}: {in_fields(str(error))}") from error
    if not pictures:
        raise JobError(f"{path}: holds no jobs; write one JSON object a line")
    return pictures


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that names nothing twice: JSON itself would take the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"names {next(name for name in names if names.count(name) > 1)!r} twice")
    return fields


def _fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text, object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is no JSON object ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"is no JSON object but {text.strip()[:40]}")
    known = (*_HINTS, "person")
    for name in fields:
        if name in COMMON or name in RUN_OPTIONS:
            raise ValueError(f"{name} is the same for all jobs; give it on the command line")
        if name == "num_images":
            raise ValueError("num_images is not for jobs; list the seeds: [0, 1, 2]")
        if name not in known:
            raise ValueError(f"has an unknown field {name!r}{did_you_mean(name, known)}")
    return fields


def _pictures(number: int, fields: dict[str, Any], folder: Path, given: SampleOptions, config: ModelConfig) -> list[Picture]:
    if "prompt" in fields and "prompt_file" in fields:
        raise ValueError("has prompt and prompt_file; give one of them")
    if "prompt" in fields or "prompt_file" in fields:  # what the line has counts first
        given = dataclasses.replace(given, prompt=None, prompt_file=None)
    person, prompts, seeds = fields.pop("person", None), fields.pop("prompt", given.prompt), fields.pop("seed", given.seed)
    values = {name: _value(name, value, _HINTS[name], folder) for name, value in fields.items()}
    options = dataclasses.replace(given, **values).filled()
    if not options.face:
        raise ValueError("has no face: name a photo, several of one person, or a stored face")
    options.check()
    pictures, own_seeds = [], _several("seed", seeds, int)
    texts = [None] if options.prompt_file is not None else _several("prompt", options.prompt if prompts is None else prompts, str)
    for text in texts:
        for _, asked in prompts_of(dataclasses.replace(options, prompt=text, seed=-1)).asked:
            for seed in own_seeds if asked.seed == -1 else [asked.seed]:
                if not 0 <= seed < 2**32:
                    raise ValueError(f"seed must be between 0 and {2**32 - 1}, not {seed}")
                pictures.append(Picture(number, _folder(person, options.face[0]), dataclasses.replace(asked, seed=seed)))
    check_call(config, nets=1 + len(options.controlnet), **pictures[0].options.call())
    return pictures


def _several(name: str, value: Any, kind: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{name} is an empty list")
    return [_one(name, item, kind) for item in values]


def _one(name: str, value: Any, kind: Any) -> Any:
    allowed, what = _KINDS[kind]
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name} must be {what}, not {value!r}")
    return value


def _value(name: str, value: Any, hint: Any, folder: Path) -> Any:
    """A field's value as the option's type."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = functools.reduce(operator.or_, (kind for kind in kinds if kind is not type(None)))
    if typing.get_origin(kind) is Literal:
        known = typing.get_args(kind)
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}{did_you_mean(str(value), known)}")
        return value
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        found = tuple(_several(name, value, inner))
        return tuple(folder / item for item in found) if inner is Path else found
    checked = _one(name, value, kind)
    return folder / checked if kind is Path else float(checked) if kind in (float, float | str) and not isinstance(checked, str) else checked


def _folder(person: Any, face: Path) -> str:
    """The folder of a person's pictures: the name that is given, or the first photo's, in letters that every file system takes."""
    name = face.stem if person is None else _one("person", person, str)
    plain = re.sub(r"[^\w.-]+", "_", name).strip("._")
    if not plain:
        raise ValueError(f"person must have letters or digits to name a folder, not {name!r}")
    return plain.encode()[:_LONGEST].decode(errors="ignore")


def in_fields(message: str) -> str:
    """A message about options or arguments in the words of the file: "--control-image" as "control_image"."""
    return re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda found: found[1].replace("-", "_"), in_options(message))
