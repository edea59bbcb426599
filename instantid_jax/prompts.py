"""Which prompts the options ask for: rows of a file, alternatives, styles. Each becomes options of its own, ready to be drawn.

    prompt,negative_prompt,seed,style
    "a person with {red|blond} hair",smiling,7,Watercolor

A file of prompts is CSV with a first line of column names. An empty cell is as on the command line.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from instantid_jax.published import did_you_mean
from instantid_jax.sample_options import SampleOptions
from instantid_jax.strengths import StrengthError, number_or_text
from instantid_jax.text import Style, expand, find_style, packaged_styles, read_styles

__all__ = ["PER_PROMPT", "Asked", "PromptFileError", "Prompts", "prompts_of"]

PER_PROMPT = ("prompt", "negative_prompt", "style", "seed", "guidance_scale", "identitynet_scale", "ip_adapter_scale")
"""Options in which two prompts of a run may differ."""

_MAX_BYTES, _MAX_PROMPTS = 1 << 24, 4096


class PromptFileError(ValueError):
    """A file of prompts that cannot be used; the message names file, line and column."""


class Asked(NamedTuple):
    """One prompt that is asked for."""

    label: str
    """What sets it apart from the others, for the sheet."""
    options: SampleOptions
    """With the prompt as it is drawn: no alternatives, the style in it; `style` names that one."""


class Prompts(NamedTuple):
    """All of them, in their order: rows of the file, of each the combinations, of each the styles."""

    asked: list[Asked]
    columns: int
    """Of a sheet on which they lie in rows."""


def prompts_of(s: SampleOptions) -> Prompts:
    """The prompts of options that `SampleOptions.filled` gave, of one at least. Raises ValueError for what is wrong with them."""
    files = tuple(style for path in s.style_file for style in read_styles(path))
    styles = functools.partial(find_style, styles=(*packaged_styles(), *files))
    rows = [(s, "")] if s.prompt_file is None else list(_rows(s.prompt_file, s, styles))
    asked, columns = [], 1
    for own, where in rows:
        try:
            found, negative, named = expand(own.prompt or "", s.wildcards), _negative(own), [styles(name) for name in own.style]
        except ValueError as error:
            if where:
                raise PromptFileError(f"{where}: {error}") from error
            raise
        if len(rows) == 1:
            columns = len(named) if len(named) > 1 else len({one.chosen[-1:] for one in found})
        for one in found:
            for style in named or [Style("")]:
                told = [style.name] * (len(named) > 1) + [text.strip() or "-" for text in one.chosen or ([one.text] if len(rows) > 1 else [])]
                prompt, negatives = style.apply(one.text, negative)
                chosen = {"prompt": prompt, "negative_prompt": negatives, "style": (style.name,) if named else (), "prompt_file": None}
                asked.append(Asked(", ".join(told), dataclasses.replace(own, **chosen)))
    if len(asked) > _MAX_PROMPTS:
        raise ValueError(f"{len(asked)} prompts are asked for; at most {_MAX_PROMPTS} are drawn")
    return Prompts(asked, columns)


def _negative(s: SampleOptions) -> str | None:
    found = [None] if s.negative_prompt is None else [one.text for one in expand(s.negative_prompt, s.wildcards)]
    if len(found) > 1:
        raise ValueError("negative_prompt has alternatives, which are for the prompt")
    return found[0]


def _whole(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise ValueError
    return value


def _guidance(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise ValueError
    return value


_CELLS: dict[str, tuple[Callable[[str], Any], str]] = {
    "prompt": (str, "a text"),
    "negative_prompt": (str, "a text"),
    "seed": (_whole, f"a whole number from 0 to {2**32 - 1}"),
    "style": (lambda text: (text,), "a name"),
    "guidance_scale": (_guidance, "a number from 0 to 100"),
    "identitynet_scale": (number_or_text, "a strength"),
    "ip_adapter_scale": (number_or_text, "a strength"),
}


def _rows(path: Path, s: SampleOptions, styles: Callable[[str], Any]) -> Iterator[tuple[SampleOptions, str]]:
    """Options of every row, and "FILE, line N: " for what is found wrong with them later."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise PromptFileError(f"{path}: is larger than {_MAX_BYTES >> 20} MB")
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                yield from _table(path, reader, s, styles)
            except csv.Error as error:
                raise PromptFileError(f"{path}, line {reader.line_num}: cannot be read as CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise PromptFileError(f"{path}: is no UTF-8 text ({error})") from error
    except OSError as error:
        raise PromptFileError(f"{path}: {error.strerror or error}") from error


def _table(path: Path, reader: Any, s: SampleOptions, styles: Callable[[str], Any]) -> Iterator[tuple[SampleOptions, str]]:
    columns = [name.strip() for name in next(reader, [])]
    for name in columns:
        if name not in _CELLS:
            raise PromptFileError(f"{path}, line 1: has an unknown column {name!r}{did_you_mean(name, _CELLS)} (known: {', '.join(_CELLS)})")
        if columns.count(name) > 1:
            raise PromptFileError(f"{path}, line 1: has the column {name} twice")
    if "prompt" not in columns:
        raise PromptFileError(f"{path}, line 1: has no column prompt; the first line names the columns: {', '.join(_CELLS)}")
    count, line = 0, reader.line_num + 1
    for cells in reader:
        first, line = line, reader.line_num + 1  # of a row that goes over several lines the first
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}, line {first}"
        if len(cells) != len(columns):
            raise PromptFileError(f"{where}: has {len(cells)} cells for {len(columns)} columns; texts with commas go into quotes")
        values = {}
        for name, cell in zip(columns, cells, strict=True):
            if not cell.strip() and name != "prompt":
                continue
            try:
                values[name] = _CELLS[name][0](cell.strip())
                if name == "style":
                    styles(cell)
                if name == "prompt" and not values[name]:
                    raise ValueError
            except ValueError as error:
                why = str(error) if name == "style" or isinstance(error, StrengthError) else f"must be {_CELLS[name][1]}, not {cell!r}"
                raise PromptFileError(f"{where}, column {name}: {why}") from error
        count += 1
        yield dataclasses.replace(s, **values), where
    if not count:
        raise PromptFileError(f"{path}: holds no prompts, only the names of the columns")
