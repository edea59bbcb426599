"""The account of a batch: what was asked, made and failed, on disk at every moment.

Every process appends to a file of its own, OUT/ledger/00000.jsonl and so on, one row a picture, each on disk before the next
picture is begun. At the end they become one OUT/ledger.jsonl in the order of the jobs, and OUT/report.json with the sums.
"""

from __future__ import annotations

import collections
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Ledger", "read_rows", "replace_text", "summary"]

FOLDER = "ledger"


class Ledger:
    """The rows of one process; they are only ever added."""

    def __init__(self, out: Path, process: int) -> None:
        folder = out / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{process:05d}.jsonl").open("ab+")
        if self._file.tell():  # a process that was killed may have left half a row
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def add(self, path: str, status: str, **about: Any) -> None:
        """A row for the picture at `path` below the folder; returns when it is on disk."""
        row = {"path": path, "status": status, "time": round(time.time(), 3), **about}
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing is added any more."""
        self._file.close()


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """The newest row of every picture, by its path, of all processes of all runs in this folder. Half rows are passed over."""
    rows: dict[str, dict[str, Any]] = {}
    for file in sorted((out / FOLDER).glob("*.jsonl")):
        for line in file.read_bytes().splitlines():
            try:
                row = json.loads(line)
                path, when = row["path"], row["time"]
            except (ValueError, KeyError, TypeError):
                continue
            if path not in rows or when >= rows[path]["time"]:
                rows[path] = row
    return rows


def summary(out: Path, paths: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """asked = made + failed + missing of the pictures at `paths`, and how often each reason of failure."""
    counts: collections.Counter[str] = collections.Counter()
    reasons: collections.Counter[str] = collections.Counter()
    for path in paths:
        status = rows.get(path, {}).get("status", "missing")
        if status == "made" and not (out / path).is_file():
            status = "missing"
        counts[status] += 1
        if status == "failed":
            reasons[str(rows[path].get("reason"))] += 1
    told = {"asked": len(paths)} | {name: counts[name] for name in ("made", "failed", "missing")}
    return told | {"reasons": dict(sorted(reasons.items()))}


def replace_text(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
