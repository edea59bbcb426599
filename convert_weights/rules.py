"""The correspondence of published tensors and parameters as data, used in both directions.

A `Row` pairs two name templates and the layout transform between their arrays. A `Table` is rows in order, of which the
first that fits counts. `plan` asks a table for the source of every parameter of a network; `account` then holds the plan
against what a file has, and every tensor must be used exactly once.

Templates: ``{i}`` is a number, ``{name}`` one component, ``{path}`` any number of components, in the side's own separator.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from convert_weights.source import ConversionError
from instantid_jax.published import nearest

Shape = tuple[int, ...]


class MappingError(ConversionError):
    """Tensors and parameters that do not correspond; the message lists all of them."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A reordering of axes: `forward` from the published array to ours, `inverse` back. Both are views, and exact."""

    axes: tuple[int, ...] | None = None
    """Our axes in terms of the published ones; None keeps the array as it is."""
    pointwise: bool = False
    """The published array has two trailing axes of length one (a 1x1 convolution), which are dropped; it may lack them."""
    part: tuple[int, int] | None = None
    """(k, n): of n equal parts along the first published axis, the k-th."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        """The published array in our layout."""
        if self.part is not None:
            rows = x.shape[0] // self.part[1]
            x = x[self.part[0] * rows : (self.part[0] + 1) * rows]
        if self.pointwise and x.ndim == 4:
            x = x.reshape(x.shape[:2])
        return x if self.axes is None else x.transpose(self.axes)

    def inverse(self, x: np.ndarray) -> np.ndarray:
        """Our array in the published layout; of a `part`, that part alone (`join` puts parts together)."""
        if self.axes is not None:
            x = x.transpose(np.argsort(self.axes))
        return x[..., None, None] if self.pointwise else x

    def source_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The published shapes that become `shape`, the usual one first."""
        published = self.inverse(np.broadcast_to(np.uint8(0), shape)).shape
        if self.part is not None:
            published = (published[0] * self.part[1], *published[1:])
        return (published, published[:2]) if self.pointwise else (published,)


KEEP = Layout()
LINEAR = Layout(axes=(1, 0))
CONV = Layout(axes=(2, 3, 1, 0))
POINTWISE = Layout(pointwise=True)


def thirds(k: int) -> Layout:
    """The k-th of the three matrices that OpenCLIP stores one above the other (query, key, value)."""
    return Layout(part=(k, 3))


_FIELDS = {"i": r"\d+", "name": r"[^{sep}]+", "path": r".+?"}


@functools.cache
def _pattern(template: str, separator: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    fields = [f"(?P<{field}>{_FIELDS[field].replace('{sep}', re.escape(separator))})" for field in parts[1::2]]
    return re.compile("".join(re.escape(text) + field for text, field in zip(parts[::2], [*fields, ""], strict=True)))


@dataclasses.dataclass(frozen=True)
class Row:
    """One correspondence: published name, our name, layout. `rank` is our array's number of axes where it matters."""

    source: str
    target: str
    layout: Layout = KEEP
    rank: int | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows in order of precedence. `separator` stands between the components of our names ("." for mere renamings)."""

    rows: Sequence[Row]
    separator: str = "/"
    aliases: Sequence[tuple[str, str]] = ()
    """(pattern, replacement): older spellings of published names, put right before anything else."""
    ignored: Sequence[tuple[str, str]] = ()
    """(pattern, reason): published tensors that are knowingly left out."""

    def to_source(self, target: str, rank: int) -> tuple[str, Layout] | None:
        """The published name and the layout of one of our names, or None."""
        return self._rename(target, rank, lambda r: (r.target, self.separator), lambda r: (r.source, "."))

    def to_target(self, source: str, rank: int) -> tuple[str, Layout] | None:
        """Our name and the layout of a published name, whose array has `rank` axes in our layout, or None."""
        return self._rename(source, rank, lambda r: (r.source, "."), lambda r: (r.target, self.separator))

    def _rename(
        self, name: str, rank: int, given: Callable[[Row], tuple[str, str]], wanted: Callable[[Row], tuple[str, str]]
    ) -> tuple[str, Layout] | None:
        for row in self.rows:
            template, separator = given(row)
            found = _pattern(template, separator).fullmatch(name) if row.rank in (None, rank) else None
            if found is not None:
                result, other = wanted(row)
                return result.format(**{field: text.replace(separator, other) for field, text in found.groupdict().items()}), row.layout
        return None

    def spelling(self, name: str) -> str:
        """Today's spelling of a published name."""
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name

    def reason_to_ignore(self, name: str) -> str | None:
        """Why a tensor is left out, or None where it must be used."""
        return next((reason for pattern, reason in self.ignored if re.search(pattern, name)), None)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Where one parameter comes from. `rename` goes from the file's array to the published one, `layout` on to ours."""

    target: str
    shape: Shape
    published: str
    layout: Layout
    source: str
    rename: Layout = KEEP

    def forward(self, x: np.ndarray) -> np.ndarray:
        """The file's array in our layout, as a view."""
        return self.layout.forward(self.rename.forward(x))

    def source_shapes(self) -> tuple[Shape, ...]:
        """Shapes that the file's array may have, the usual one first."""
        return tuple(s for published in self.layout.source_shapes(self.shape) for s in self.rename.source_shapes(published))


def plan(table: Table, shapes: Mapping[str, Shape], renames: Table | None = None) -> list[Assignment]:
    """The source of every parameter, from its name and shape alone.

    `renames` translates published names further, to those of another layout of the same weights.
    Raises `MappingError` for a parameter that no row describes.
    """
    assignments: list[Assignment] = []
    lost: list[str] = []
    for target, shape in shapes.items():
        found = table.to_source(target, len(shape))
        rank = len(found[1].source_shapes(shape)[0]) if found else 0
        renamed = renames.to_source(found[0], rank) if found and renames else found and (found[0], KEEP)
        if found is None or renamed is None:
            lost.append(target)
            continue
        assignments.append(Assignment(target, tuple(shape), found[0], found[1], renamed[0], renamed[1]))
    if lost:
        raise MappingError(f"no row of the table describes {', '.join(lost)}")
    return assignments


class HasShape(Protocol):
    """What accounting needs to know of a tensor."""

    @property
    def shape(self) -> Shape: ...


@dataclasses.dataclass(frozen=True)
class Account:
    """A plan that a file fulfils: which of its names gives what, and which were knowingly left out."""

    assignments: Sequence[Assignment]
    names: Mapping[str, str]
    """Source name as the plan spells it -> name in the file."""
    ignored: Mapping[str, str]
    """Name in the file -> reason."""


def account(network: str, assignments: Sequence[Assignment], tensors: Mapping[str, HasShape], table: Table) -> Account:
    """Holds a plan against a file's tensors: every one used exactly once, every parameter filled exactly once.

    Raises `MappingError` that lists the missing, unused and mis-shaped names, each with its nearest match.
    """
    ignored = {name: reason for name in tensors if (reason := table.reason_to_ignore(name)) is not None}
    names: dict[str, str] = {}
    problems: dict[str, list[str]] = {"missing": [], "unused": [], "mis-shaped": [], "used twice": []}
    for name in tensors:
        if name not in ignored:
            spelling = table.spelling(name)
            if spelling in names:
                problems["used twice"].append(f"{name} and {names[spelling]} are the same tensor")
            names[spelling] = name
    wanted = {a.source for a in assignments}
    problems["used twice"] += _repeated(assignments)
    missing, unused = sorted(wanted - names.keys()), sorted(names.keys() - wanted)
    for title, these, those in (("missing", missing, unused), ("unused", unused, missing)):
        problems[title] = [name + _nearest(name, those) for name in these]
    for a in assignments:
        if a.source in names and tuple(tensors[names[a.source]].shape) not in a.source_shapes():
            found, needed = tuple(tensors[names[a.source]].shape), a.source_shapes()[0]
            problems["mis-shaped"].append(f"{names[a.source]} is {list(found)} where {list(needed)} is needed")
    if any(problems.values()):
        raise MappingError(f"{network}: the tensors do not fit the network: {_summary(problems)}")
    return Account(assignments, names, ignored)


def _repeated(assignments: Sequence[Assignment]) -> list[str]:
    """Sources asked for more than once, other than in their different parts."""
    parts: dict[str, list[tuple[int, int] | None]] = {}
    for a in assignments:
        parts.setdefault(a.source, []).append(a.rename.part)
    wrong = []
    for source, used in parts.items():
        whole: list[Any] = [None] if used[0] is None else [(k, used[0][1]) for k in range(used[0][1])]
        if sorted(used, key=str) != sorted(whole, key=str):
            wrong.append(f"{source} fills {len(used)} parameters")
    return wrong


def _nearest(name: str, others: Sequence[str]) -> str:
    close = nearest(name, others[:400], cutoff=0.75)
    return f" (nearest: {close})" if close else ""


def _summary(problems: Mapping[str, list[str]], limit: int = 40) -> str:
    parts = []
    for title, lines in problems.items():
        if lines:
            more = f" and {len(lines) - limit} more" if len(lines) > limit else ""
            parts.append(f"{title} ({len(lines)}): {'; '.join(lines[:limit])}{more}")
    return "\n  ".join(["", *parts])


def join(assignments: Iterable[Assignment], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of a plan: parameters by path to the source's tensors by name; parts are put together again."""
    whole: dict[str, np.ndarray] = {}
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for a in assignments:
        x = a.rename.inverse(a.layout.inverse(arrays[a.target]))
        if a.rename.part is None:
            whole[a.source] = x
        else:
            parts.setdefault(a.source, []).append((a.rename.part[0], x))
    joined = {name: np.concatenate([x for _, x in sorted(rows, key=lambda row: row[0])]) for name, rows in parts.items()}
    return whole | joined
