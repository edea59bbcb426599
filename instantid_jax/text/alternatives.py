"""Alternatives in prompts: every combination is a prompt of its own.

    {red|blond} hair          two prompts; braces may hold braces, and an empty text
    __places__                one prompt for each line of places.txt in the folder of wildcards

Braces without a bar between them are text, as is a brace or bar after a backslash, which then vanishes. Wildcards are read only
where a folder is named; their lines may hold alternatives and other wildcards. Empty lines and lines that begin with # do not count.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from instantid_jax.published import did_you_mean

__all__ = ["MAX_COMBINATIONS", "AlternativeError", "Combination", "expand", "literal"]

MAX_COMBINATIONS = 4096
"""More prompts than that of one text are refused."""

_WILDCARD = re.compile(r"__([A-Za-z0-9]+(?:[-_][A-Za-z0-9]+)*)__")
_LEXEME = re.compile(r"\\[{}|]|[{}|]|[^\\{}|]+|\\")


class AlternativeError(ValueError):
    """A prompt whose alternatives cannot be read; the message says what and where."""


class Combination(NamedTuple):
    """One of the prompts."""

    text: str
    chosen: tuple[str, ...]
    """What was taken of each group of alternatives, from the left; groups within groups are told as part of the outer one."""


def literal(text: str) -> str:
    """A text that `expand` gives back as it is (where no wildcards are named)."""
    return re.sub(r"([{}|])", r"\\\1", text)


def expand(text: str, wildcards: Path | None = None) -> list[Combination]:
    """Every combination, the last group changing fastest. Raises `AlternativeError`."""
    parts = _Reader(text, wildcards, ()).parts(closing=False)
    return [Combination("".join(piece for piece, _ in row), tuple(piece for piece, is_choice in row if is_choice)) for row in _rows(parts, text)]


def _rows(parts: list[list[str] | str], text: str) -> Iterable[tuple[tuple[str, bool], ...]]:
    count = 1
    for part in parts:
        count *= 1 if isinstance(part, str) else len(part)
    if count > MAX_COMBINATIONS:
        raise AlternativeError(f"{_short(text)} asks for {count} prompts; at most {MAX_COMBINATIONS} are drawn")
    return itertools.product(*([(part, False)] if isinstance(part, str) else [(one, True) for one in part] for part in parts))


class _Reader:
    """Reads one text from left to right. `within` are the wildcards whose lines are being read."""

    def __init__(self, text: str, wildcards: Path | None, within: tuple[str, ...]) -> None:
        self.text, self.wildcards, self.within = text, wildcards, within
        self.lexemes, self.at, self.depth = _LEXEME.findall(text), 0, 0

    def parts(self, closing: bool) -> list[list[str] | str]:
        """Texts and groups of alternatives up to the end, or with `closing` up to a bar or closing brace of the group around."""
        parts: list[list[str] | str] = []
        while self.at < len(self.lexemes):
            lexeme = self.lexemes[self.at]
            if closing and lexeme in "|}":
                break
            self.at += 1
            if lexeme == "{":
                parts += self._group()
            elif len(lexeme) == 2 and lexeme[0] == "\\":
                parts.append(lexeme[1])
            else:
                parts += self._text(lexeme)
        return parts

    def _group(self) -> list[list[str] | str]:
        self.depth += 1
        if self.depth > 16:
            raise AlternativeError(f"{_short(self.text)} has more than 16 braces within each other")
        branches = [self.parts(closing=True)]
        while self.at < len(self.lexemes) and self.lexemes[self.at] == "|":
            self.at += 1
            branches.append(self.parts(closing=True))
        closed = self.at < len(self.lexemes)
        self.at += closed
        self.depth -= 1
        if len(branches) == 1:  # no bar: braces as they are
            return ["{", *branches[0], *(["}"] if closed else [])]
        if not closed:
            raise AlternativeError(f"{_short(self.text)} has a '{{' with alternatives that no '}}' closes; for a brace itself write \\{{")
        return [[row for branch in branches for row in self._texts(branch)]]

    def _texts(self, parts: list[list[str] | str]) -> list[str]:
        return ["".join(piece for piece, _ in row) for row in _rows(parts, self.text)]

    def _text(self, text: str) -> list[list[str] | str]:
        if self.wildcards is None:
            return [text]
        pieces = _WILDCARD.split(text)
        return [self._lines(piece) if number % 2 else piece for number, piece in enumerate(pieces) if piece]

    def _lines(self, name: str) -> list[str]:
        assert self.wildcards is not None
        if name in self.within:
            raise AlternativeError(f"wildcard __{name}__ has itself among its lines ({' -> '.join((*self.within, name))})")
        lines = []
        for line in _read_wildcard(self.wildcards, name):
            reader = _Reader(line, self.wildcards, (*self.within, name))
            lines += reader._texts(reader.parts(closing=False))
        return lines


@functools.lru_cache(maxsize=256)
def _read_wildcard(folder: Path, name: str) -> tuple[str, ...]:
    path = folder / f"{name}.txt"
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise AlternativeError(f"{folder} is no folder of wildcards") from error
        known = [found.stem for found in folder.glob("*.txt")]
        raise AlternativeError(f"{path}: there is no such wildcard{did_you_mean(name, known)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise AlternativeError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    kept = tuple(line for line in lines if line and not line.startswith("#"))
    if not kept:
        raise AlternativeError(f"{path}: holds no lines to choose from")
    return kept


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
