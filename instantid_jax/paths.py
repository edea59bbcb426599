"""Trees of arrays seen as flat dictionaries with "/" paths, and the few things one does with paths.

A parameter tree is a nested dict whose leaves are arrays; ``flatten`` turns it into ``{"down_blocks/1/attentions/0/...": array}``.
Everything that speaks of parameters by name (conversion, sharding rules, freezing, checkpoints) speaks in these paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Tree = dict[str, Any]

__all__ = [
    "STACKED",
    "PathError",
    "first_match",
    "flatten",
    "map_paths",
    "partition",
    "select",
    "stack_layers",
    "stacked_layer",
    "stacked_path",
    "unflatten",
    "unstack_layers",
]


class PathError(ValueError):
    """A path or pattern that does not fit the tree it is used on."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to ``{path: leaf}``, in the order of the nested dicts."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`. Raises `PathError` where one path is both a leaf and a branch."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *branches, name = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise PathError(f"{path!r}: {branch!r} is both a leaf and a branch")
        if name in node:
            raise PathError(f"{path!r} is given twice or is both a leaf and a branch")
        node[name] = leaf
    return tree


def map_paths(function: Callable[[str, Any], T], tree: Mapping[str, Any]) -> Tree:
    """Applies ``function(path, leaf)`` to every leaf."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def first_match(rules: Sequence[tuple[str, T]], path: str) -> T | None:
    """The value of the first rule whose regular expression is found in `path`, or None."""
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    return None


def select(tree: Mapping[str, Any], patterns: Iterable[str]) -> Tree:
    """The part of the tree whose paths match any of the patterns. Raises `PathError` for a pattern that matches nothing."""
    flat = flatten(tree)
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {path for path in flat if re.search(pattern, path)}
        if not hits:
            raise PathError(f"pattern {pattern!r} matches none of {len(flat)} paths, of which the first is {next(iter(flat), '(none)')!r}")
        chosen |= hits
    return unflatten({path: leaf for path, leaf in flat.items() if path in chosen})


def partition(tree: Mapping[str, Any], patterns: Iterable[str]) -> tuple[Tree, Tree]:
    """(what matches, what does not); the two together are the whole tree."""
    chosen = flatten(select(tree, patterns))
    rest = {path: leaf for path, leaf in flatten(tree).items() if path not in chosen}
    return unflatten(chosen), unflatten(rest)


# Lists of equal layers live in memory as one layer whose arrays have a leading depth axis, so that `jax.lax.scan` traces
# and compiles the layer once. On disk every layer keeps its own name.
STACKED = ("transformer_blocks", "layers")
_STACK = re.compile(r"(^|/)(" + "|".join(STACKED) + r")/")
_LAYER = re.compile(r"(^|/)(" + "|".join(STACKED) + r")/(\d+)/")


def stacked_path(path: str) -> tuple[str, int | None]:
    """Splits an on-disk path into the in-memory path and the index along the depth axis (None where not stacked)."""
    found = _LAYER.search(path)
    if found is None:
        return path, None
    return f"{path[: found.start(3)]}{path[found.end(3) + 1 :]}", int(found.group(3))


def stacked_layer(path: str) -> bool:
    """Whether an in-memory path lies inside a stack of layers, so that its arrays have a leading depth axis."""
    return _STACK.search(path) is not None


def stack_layers(flat: Mapping[str, Any], stack: Callable[[Sequence[Any]], Any]) -> dict[str, Any]:
    """On-disk paths to in-memory paths; `stack` joins the layers' arrays along a new first axis.

    Raises `PathError` where a layer is missing from a list.
    """
    out: dict[str, Any] = {}
    layers: dict[str, dict[int, Any]] = {}
    for path, leaf in flat.items():
        target, index = stacked_path(path)
        if index is None:
            out[target] = leaf
        else:
            layers.setdefault(target, {})[index] = leaf
            out.setdefault(target, None)
    for target, by_index in layers.items():
        missing = [i for i in range(max(by_index) + 1) if i not in by_index]
        if missing:
            raise PathError(f"{target!r}: layers {missing} of {max(by_index) + 1} are missing")
        out[target] = stack([by_index[i] for i in range(len(by_index))])
    return out


def unstack_layers(flat: Mapping[str, Any], row: Callable[[Any, int], Any] | None = None) -> dict[str, Any]:
    """The inverse of `stack_layers`; ``row(leaf, i)`` takes layer i out of a stacked leaf (default ``leaf[i]``)."""
    out: dict[str, Any] = {}
    for path, leaf in flat.items():
        found = _STACK.search(path)
        if found is None:
            out[path] = leaf
            continue
        for i in range(leaf.shape[0]):
            out[f"{path[: found.end()]}{i}/{path[found.end() :]}"] = leaf[i] if row is None else row(leaf, i)
    return out
