"""What a folder of converted weights says of itself: where every tensor came from, and hashes to hold it against."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert_weights.source import ConversionError
from instantid_jax import __version__
from instantid_jax.config import IdentityNetConfig, ModelConfig, from_json

FORMAT, FORMAT_VERSION, TABLE_VERSION = "instantid_jax weights", 1, 1
NAME = "manifest.json"


class ManifestError(ConversionError):
    """A folder whose manifest is missing, damaged or of another version."""


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """One parameter. Shapes and `sha256` are of the published layout, so that unchanged tensors keep their hash."""

    published: str
    """Name in diffusers' or InstantID's files."""
    shape: tuple[int, ...]
    dtype: str
    """As stored here."""
    sha256: str
    """Of the stored values in the published layout."""
    source: str
    """Name in the file it came from."""
    source_dtype: str
    source_sha256: str
    """Of the whole source tensor, which may hold several parameters."""

    @property
    def exact(self) -> bool:
        """Whether the values are the source's, bit for bit."""
        return self.dtype == self.source_dtype


@dataclasses.dataclass(frozen=True)
class NetworkRecord:
    """One network: the files it came from ({name: sha256}), what they held beside it, and its tensors."""

    files: Mapping[str, str]
    source_tensors: int
    ignored: Mapping[str, str]
    parameters: int
    bytes: int
    tensors: Mapping[str, TensorRecord]

    @property
    def dtypes(self) -> str:
        """The stored types, for people."""
        return ", ".join(sorted({t.dtype for t in self.tensors.values()}))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The whole folder. `kind` is "model" or "controlnet"; `files` are hashes of tokenizers and configurations."""

    kind: str
    networks: Mapping[str, NetworkRecord]
    files: Mapping[str, str]
    notes: Sequence[str] = ()
    created_by: str = f"instantid_jax {__version__}"

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json``; the same import gives the same bytes."""
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "table_version": TABLE_VERSION}
        (folder / NAME).write_text(json.dumps(header | dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Reads a folder's manifest. Raises `ManifestError` where it is missing, damaged or of another version."""
    path = folder / NAME
    if not path.is_file():
        raise ManifestError(f"{folder} is not a folder of converted weights (no {NAME})")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        header = content.pop("format"), content.pop("format_version"), content.pop("table_version")
        networks = {name: _network(record) for name, record in content.pop("networks").items()}
        manifest = Manifest(networks=networks, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ManifestError(f"{path} is damaged ({problem}); convert or copy the weights again") from problem
    if header != (FORMAT, FORMAT_VERSION, TABLE_VERSION):
        found, known = f"{header[0]!r}, version {header[1]}.{header[2]}", f"{FORMAT_VERSION}.{TABLE_VERSION}"
        raise ManifestError(f"{path} is of {found}; this package reads version {known}: convert again")
    return manifest


def _network(record: dict[str, Any]) -> NetworkRecord:
    tensors = {path: TensorRecord(**{**t, "shape": tuple(t["shape"])}) for path, t in record.pop("tensors").items()}
    return NetworkRecord(tensors=tensors, **record)


def read_config(folder: Path, manifest: Manifest) -> ModelConfig | IdentityNetConfig:
    """The configuration beside the manifest. Raises `ManifestError` where it is missing or damaged."""
    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ManifestError(f"{folder} has no config.json; convert or copy the weights again") from None
    try:
        return from_json(ModelConfig if manifest.kind == "model" else IdentityNetConfig, text)
    except ValueError as problem:
        raise ManifestError(f"{folder / 'config.json'} is damaged ({problem}); convert or copy the weights again") from problem
