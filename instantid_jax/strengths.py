"""Strengths over the steps, the layers and the places of a picture, written as a number, a list or a short text.

    0.8                                       the same everywhere
    [1, 0.8, 0.5]                             one value for each step
    1 until 0.5 then 0.2                      1 in the first half of the steps, then 0.2
    linear(1, 0.3), cosine(0.2, 1)            from the first value to the last, straight or along half a cosine
    0 until 0.2 then linear(1, 0)             a curve takes what is left of the steps
    down=0.8, mid=1, up=linear(1, 0)          by layers of the UNet, coarse or fine: up, up0, up0.1
    0.8, up0.1=0                              everywhere 0.8, but in one layer
    inside: 1; outside: linear(0, 0.5)        by place: where the control mask is white, and where it is black

The grammar, which `_Parser` follows rule by rule:

    strength = layers | "inside" ":" layers ";" "outside" ":" layers ;
    layers   = schedule { "," layer "=" schedule } | layer "=" schedule { "," layer "=" schedule } ;
    layer    = "mid" | ( "down" | "up" ) [ digits [ "." digits ] ] ;
    schedule = "[" number { "," number } "]" | piece { "until" number "then" piece } ;
    piece    = number | ( "linear" | "cosine" ) "(" number "," number ")" ;

A call of the networks belongs to the first piece whose `until` it does not reach beyond: call i of n where (i + 1) / n <= until, as in
diffusers' `control_guidance_end`. A curve has its first value at the first call of its piece and its last at the last one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from instantid_jax.config import UNetConfig
from instantid_jax.models.adapter import site_numbers
from instantid_jax.published import did_you_mean

__all__ = [
    "Layers",
    "Piece",
    "Schedule",
    "Strength",
    "StrengthError",
    "adapter_places",
    "control_places",
    "multiplied",
    "number_or_text",
    "read_strength",
]

LOW, HIGH = -10.0, 10.0
"""Between these lies every strength."""
CURVES = ("linear", "cosine")
_LAYER = re.compile(r"(?P<block>(?P<part>down|up)(?:\d+)?)(?:\.\d+)?|mid")
_TOKEN = re.compile(
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<word>[A-Za-z_]+(?:\d+(?:\.\d+)?)?)|(?P<sign>[()\[\],=:;])|(?P<other>\S)", re.ASCII
)


class StrengthError(ValueError):
    """A strength that cannot be read or does not fit the model or the steps; the message says what is wrong and where."""


class Piece(NamedTuple):
    """From `first` to `last`; a number has both alike."""

    curve: str
    first: float
    last: float

    def values(self, count: int) -> np.ndarray:
        """Of `count` calls, float64; of a single one the first."""
        x = np.arange(count) / max(count - 1, 1)
        return self.first + (self.last - self.first) * (x if self.curve == "linear" else (1 - np.cos(np.pi * x)) / 2)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A strength over the steps: pieces, or one value for each step."""

    pieces: tuple[Piece, ...] = ()
    bounds: tuple[float, ...] = ()
    """Where each piece but the last ends, as a part of the whole run."""
    listed: tuple[float, ...] = ()

    def values(self, steps: Sequence[int]) -> np.ndarray:
        """Of every call of the networks, float64 [calls]; `steps` says to which step each belongs (`Plan.steps`)."""
        if self.listed:
            if len(self.listed) != (count := steps[-1] + 1):
                raise StrengthError(f"the list has {len(self.listed)} values for {count} steps; give one for each step")
            return np.asarray(self.listed)[list(steps)]
        ends = np.arange(1, len(steps) + 1) / len(steps)
        piece_of = np.searchsorted(self.bounds, ends) if self.bounds else np.zeros(len(steps), int)
        return np.concatenate([piece.values(int(np.sum(piece_of == i))) for i, piece in enumerate(self.pieces)])


@dataclasses.dataclass(frozen=True)
class Layers:
    """A strength over steps and layers."""

    rest: Schedule | None
    """Of the layers that are not named."""
    named: tuple[tuple[str, Schedule], ...] = ()

    def values(self, steps: Sequence[int], places: Sequence[str]) -> np.ndarray:
        """Float64 [calls, 1] where no layers are named, else [calls, places]; `places` are the layers' finest names."""
        found = {name: schedule.values(steps) for name, schedule in self.named}
        rest = None if self.rest is None else self.rest.values(steps)
        if not found and rest is not None:
            return rest[:, None]
        coarser = [_names(place) for place in places]
        known = dict.fromkeys(name for names in coarser for name in reversed(names))
        for name in found:
            if name not in known:
                blocks = ", ".join(name for name in known if "." not in name)
                raise StrengthError(
                    f"there is no layer {name!r} here{did_you_mean(name, known)}; there are {blocks}, and finer ones such as {places[0]}"
                )
        columns = []
        for place, names in zip(places, coarser, strict=True):
            column = next((found[name] for name in names if name in found), rest)
            if column is None:
                raise StrengthError(f"nothing is said of {place}; name it, or begin with a strength for the rest: '0.8, {next(iter(found))}=1'")
            columns.append(column)
        return np.stack(columns, axis=1)


@dataclasses.dataclass(frozen=True)
class Strength:
    """A strength over steps, layers and the two sides of a control mask."""

    inside: Layers
    outside: Layers | None = None
    """Where the mask is black; None is zero."""

    def table(self, steps: Sequence[int], places: Sequence[str], sides: int = 1) -> np.ndarray:
        """Float32 [calls, sides, 1 or places]: with 2 sides inside and outside. Raises `StrengthError` for what does not fit."""
        nothing = Layers(Schedule((Piece("linear", 0.0, 0.0),)))
        both = [layers.values(steps, places) for layers in (self.inside, self.outside or nothing)[:sides]]
        return np.stack(np.broadcast_arrays(*both), axis=1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Product(Strength):
    """Two strengths multiplied, step by step and layer by layer."""

    times: Strength = dataclasses.field(kw_only=True)

    def table(self, steps: Sequence[int], places: Sequence[str], sides: int = 1) -> np.ndarray:
        """As of `Strength`; where one of the two says nothing of the outside, it is zero there."""
        return super().table(steps, places, sides) * self.times.table(steps, places, sides)


def multiplied(first: Any, second: Any) -> Strength:
    """The product of two strengths, each as `read_strength` takes it. Raises `StrengthError`."""
    one = read_strength(first)
    return Product(one.inside, one.outside, times=read_strength(second))


def read_strength(value: Any) -> Strength:
    """A strength from a number, a list of numbers, one for each step, or a text. Raises `StrengthError`."""
    if isinstance(value, Strength):
        return value
    if isinstance(value, str):
        return _Parser(value).strength()
    if isinstance(value, list | tuple | np.ndarray) and np.ndim(value) == 1 and len(value):
        return Strength(Layers(Schedule(listed=tuple(_number(v) for v in value))))
    return Strength(Layers(Schedule((_constant(_number(value)),))))


_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def number_or_text(text: str) -> float | str:
    """A strength as options hold it, of a text that a user gives: a number where it is one. Raises `StrengthError`."""
    value: float | str = float(text) if _DECIMAL.fullmatch(text.strip()) else text
    read_strength(value)
    return value


def adapter_places(config: UNetConfig) -> list[str]:
    """The finest name of every layer of the image adapter, in the published order: down1.0 is the first attention of the second block."""
    paths = [re.fullmatch(r"(down|up|mid)_blocks?(?:/(\d+))?/attentions/(\d+)/.*", path) for path in site_numbers(config).values()]
    return ["mid" if path[1] == "mid" else f"{path[1]}{path[2]}.{path[3]}" for path in paths if path]


def control_places(config: UNetConfig) -> list[str]:
    """The finest name of each of IdentityNet's residuals, the middle's last; down0.0 is that of its first convolution."""
    last = len(config.block_out_channels) - 1
    counts = [config.layers_per_block + (i == 0) + (i != last) for i in range(last + 1)]
    return [*(f"down{i}.{j}" for i, count in enumerate(counts) for j in range(count)), "mid"]


def _names(place: str) -> list[str]:
    """A layer's names, the finest first: up0.1, up0, up."""
    found = _LAYER.fullmatch(place)
    return list(dict.fromkeys((place, found["block"], found["part"]))) if found and found["part"] else [place]


def _constant(value: float) -> Piece:
    return Piece("linear", value, value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise StrengthError(f"must be a finite number, a list with one for each step, or a text such as 'linear(1, 0.3)', not {value!r}")
    if not math.isfinite(value):
        raise StrengthError(f"must be a finite number, not {value!r}")
    if not LOW <= value <= HIGH:
        raise StrengthError(f"must be between {LOW:g} and {HIGH:g}, not {value:g}")
    return float(value)


class _Parser:
    """Recursive descent over the grammar above, one method a rule."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = [(str(m.lastgroup), m[0], m.start()) for m in _TOKEN.finditer(text)] + [("end", "", len(text))]
        self.at = 0

    def strength(self) -> Strength:
        if self._next() == "inside":
            self._take("inside", ":")
            inside = self._layers()
            self._take(";", "outside", ":")
            found = Strength(inside, self._layers())
        else:
            found = Strength(self._layers())
        self._take("")
        return found

    def _layers(self) -> Layers:
        rest = None if self._names_a_layer() else self._schedule()
        named: dict[str, Schedule] = {}
        while (rest is None and not named) or self._skip(","):
            name = self._layer()
            if name in named:
                raise self._wrong(f"{name} is named twice", -1)
            self._take("=")
            named[name] = self._schedule()
        return Layers(rest, tuple(named.items()))

    def _names_a_layer(self) -> bool:
        kind, word, _ = self.tokens[self.at]
        return kind == "word" and (_LAYER.fullmatch(word) is not None or self.tokens[self.at + 1][1] == "=")

    def _layer(self) -> str:
        kind, word, _ = self.tokens[self.at]
        if kind != "word" or not _LAYER.fullmatch(word):
            raise self._wrong("a layer is needed: down, mid or up, or finer, as up0 or up0.1")
        self.at += 1
        return word

    def _schedule(self) -> Schedule:
        if self._skip("["):
            listed = [self._strength_number()]
            while self._skip(","):
                listed.append(self._strength_number())
            self._take("]")
            return Schedule(listed=tuple(listed))
        pieces, bounds = [self._piece()], []
        while self._skip("until"):
            bound = self._number()
            if not (bounds[-1] if bounds else 0) < bound < 1:
                raise self._wrong("after until stands a part of the steps between 0 and 1, larger than the one before", -1)
            bounds.append(bound)
            self._take("then")
            pieces.append(self._piece())
        return Schedule(tuple(pieces), tuple(bounds))

    def _piece(self) -> Piece:
        kind, word, _ = self.tokens[self.at]
        if kind == "number":
            return _constant(self._strength_number())
        if word not in CURVES:
            meant = did_you_mean(word, (*CURVES, "inside")) if word else ""
            raise self._wrong(f"a strength is needed: a number, or linear(from, to) or cosine(from, to){meant}")
        self.at += 1
        self._take("(")
        first = self._strength_number()
        self._take(",")
        last = self._strength_number()
        self._take(")")
        return Piece(word, first, last)

    def _strength_number(self) -> float:
        value = self._number()
        if not LOW <= value <= HIGH:
            raise self._wrong(f"a strength must be between {LOW:g} and {HIGH:g}", -1)
        return value

    def _number(self) -> float:
        kind, text, _ = self.tokens[self.at]
        if kind != "number":
            raise self._wrong("a number is needed")
        self.at += 1
        return float(text)

    def _next(self) -> str:
        return self.tokens[self.at][1]

    def _skip(self, wanted: str) -> bool:
        self.at += (found := self._next() == wanted)
        return found

    def _take(self, *wanted: str) -> None:
        for token in wanted:
            if not self._skip(token):
                raise self._wrong(f"{token!r} is needed" if token else "nothing more is understood")

    def _wrong(self, what: str, back: int = 0) -> StrengthError:
        _, token, start = self.tokens[self.at + back]
        where = f"at {token!r}, character {start + 1}" if token else "at the end"
        return StrengthError(f"{self.text!r}: {what} ({where})")
