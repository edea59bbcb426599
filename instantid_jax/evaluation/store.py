"""A cache on disk whose keys are hashes of everything that decides a value, so that what was interrupted or repeated goes on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

__all__ = ["Store", "digest", "digest_tree"]


def digest(*parts: Any) -> str:
    """A hash of arrays (type, shape and bytes) and of anything that JSON can say."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype.str}{part.shape}".encode())
            state.update(np.ascontiguousarray(part).tobytes())
        else:
            state.update(json.dumps(part, sort_keys=True).encode())
        state.update(b"\0")
    return state.hexdigest()


def digest_tree(tree: Any) -> str:
    """A hash of a tree of arrays with their paths, such as a model's weights."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return digest(*(part for path, leaf in leaves for part in (jax.tree_util.keystr(path), np.asarray(leaf))))


class Store:
    """Named arrays by key, one file a key; a file is complete or absent. Without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key[2:]}.npz"

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """What was put, or None. A damaged file counts as absent, since it can be made again."""
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                return {name: np.asarray(arrays[name]) for name in arrays.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def put(self, key: str, arrays: Mapping[str, Any]) -> None:
        """Keeps arrays under a key."""
        path = self._path(key)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        named: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
        with part.open("wb") as file:
            np.savez(file, **named)
        os.replace(part, path)
