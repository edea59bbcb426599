"""The folder that a command writes: it appears whole or not at all, and never in the place of anything but its own kind.

A folder of converted weights is known by its manifest, an exported one by `MARKER`. Only such a folder, with nothing in it
that these commands did not write, is replaced; everything else that is not empty is left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from convert_weights.manifest import NAME, ManifestError, read_manifest
from convert_weights.source import ConversionError

__all__ = ["MARKER", "check_out", "new_folder", "write_marker"]

MARKER = "instantid_jax-export.json"
"""The file by which a folder that `export` wrote is known; it lists what else lies beside it."""


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool = False, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, or vanishes where anything goes wrong.

    `sources` are the files and folders that are read meanwhile. Raises `ConversionError` as `check_out` does.
    """
    check_out(out, overwrite, sources)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    staging, old = (out.with_name(f".{out.name}.{what}-{os.getpid()}") for what in ("partial", "old"))
    staging.mkdir()
    try:
        yield staging
        if out.exists():
            out.rename(old)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def check_out(out: Path, overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """Raises `ConversionError` where writing to `out` would touch a source, or anything that these commands did not write."""
    target = out.resolve()
    for source in sources:
        place = source.resolve()
        if target == place or target in place.parents or (place.is_dir() and place in target.parents):
            how = "is" if target == place else "contains" if target in place.parents else "lies inside"
            raise ConversionError(f"--out {out} {how} {source}, which is read; choose another --out")
    if not target.exists():
        return
    if not target.is_dir():
        raise ConversionError(f"--out {out} is a file; name a folder")
    if not any(target.iterdir()):
        return
    own = _own_entries(target)
    if own is None:
        raise ConversionError(f"{out} exists, is not empty, and was not written by this program; choose another --out")
    foreign = sorted(entry.name for entry in target.iterdir() if entry.name not in own)
    if foreign:
        raise ConversionError(f"{out} also holds {foreign[0]!r}, which this program did not write; move it away or choose another --out")
    if not overwrite:
        raise ConversionError(f"{out} exists and is not empty; choose another --out, or give --overwrite")


def write_marker(folder: Path) -> None:
    """Marks a folder as exported, with all that now is in it."""
    entries = sorted(entry.name for entry in folder.iterdir())
    (folder / MARKER).write_text(json.dumps({"entries": entries}, indent=1) + "\n", encoding="utf-8")


def _own_entries(folder: Path) -> set[str] | None:
    """What import or export put into this folder, or None where it bears neither's mark."""
    if (folder / MARKER).is_file():
        try:
            return {MARKER, *json.loads((folder / MARKER).read_text(encoding="utf-8"))["entries"]}
        except (ValueError, LookupError, TypeError):
            return None
    try:
        manifest = read_manifest(folder)
    except ManifestError:
        return None
    return {NAME, *manifest.networks, *(name.split("/")[0] for name in manifest.files)}
