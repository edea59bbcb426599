"""Adds what frozen encoders compute to the records of a data set, so that a training run need not compute it again.

The autoencoder's posterior (mean and log-variance) is stored, unscaled, of one fixed view of each photo; with `CacheConfig.text` also
the text encoders' output for the plain caption. A large set is done in parts on several machines, which `open_source` joins.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from instantid_jax.checkpoint import load_weights
from instantid_jax.config import ModelConfig, from_json
from instantid_jax.data.builder import write_dataset
from instantid_jax.data.order import uniform
from instantid_jax.data.preparation import ordered_map
from instantid_jax.data.record import CachedLatents, CachedText, DataError, Record, View
from instantid_jax.data.sources import DatasetSource, RecordSource, identity_label
from instantid_jax.data.transforms import assign_buckets, choose_view, decode_photo, render_view
from instantid_jax.models import Network, build_networks
from instantid_jax.paths import flatten
from instantid_jax.text import Tokenizer

__all__ = ["CacheConfig", "CacheJob", "LatentEncoder", "TextEncoder", "cache", "load_encoders", "read_model"]


@dataclass(frozen=True)
class CacheConfig:
    """What is stored."""

    sizes: tuple[tuple[int, int], ...]
    """(height, width) in pixels of the views; each photo takes the one nearest in aspect ratio."""
    batch: int = 8
    """Photos that are encoded together."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored arrays. float16 halves them; latents of a usual autoencoder lose about three decimals."""
    random_crop: bool = False
    """Whether the window is placed at random around the face, by the record's key; else as near to the centre as the face allows."""
    keep_images: bool = True
    """Whether the photos stay in the records."""
    workers: int = 2
    """Threads that decode photos."""
    part: tuple[int, int] = (0, 1)
    """(number, count): which part of the rows this run takes."""

    def __post_init__(self) -> None:
        if not 0 <= self.part[0] < self.part[1]:
            raise DataError(f"CacheConfig: part {self.part[0]} of {self.part[1]} does not exist; parts are counted from 0")


def fingerprint(parameters: Any) -> str:
    """Sixteen hex digits that name a tree of weights."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(parameters).items()):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


class LatentEncoder:
    """Pictures to the autoencoder's posterior; compiles once for each picture size."""

    def __init__(self, network: Network, parameters: Any) -> None:
        self.name = fingerprint(parameters)
        self._parameters = parameters

        @jax.jit
        def encode(parameters: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            posterior = network.bind(parameters).encode((images.astype(jnp.float32) / 127.5 - 1).astype(network.compute.dtype))
            return posterior.mean.astype(jnp.float32), posterior.logvar.astype(jnp.float32)

        self._encode = encode

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, logvar), each float32 [b, h, w, c], of uint8 pictures [b, H, W, 3]."""
        mean, logvar = self._encode(self._parameters, images)
        return np.asarray(mean), np.asarray(logvar)


class TextEncoder:
    """Captions to SDXL's text states (both towers' states before their last layers, side by side) and pooled state."""

    def __init__(self, networks: Sequence[Network], parameters: Sequence[Any], tokenizers: Sequence[Tokenizer]) -> None:
        self.name = "-".join(fingerprint(p) for p in parameters)
        self._networks, self._parameters, self._tokenizers = networks, parameters, tokenizers
        self._run = jax.jit(lambda network, parameters, ids: network.bind(parameters)(ids), static_argnums=0)

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(states float32 [b, 77, c], pooled float32 [b, p])."""
        outputs = [
            self._run(network, parameters, jnp.asarray(tokenizer.encode(captions)))
            for network, parameters, tokenizer in zip(self._networks, self._parameters, self._tokenizers, strict=True)
        ]
        states = np.concatenate([np.asarray(out.hidden[-2], np.float32) for out in outputs], axis=-1)
        return states, np.asarray(outputs[-1].pooled, np.float32)


def read_model(weights: str | Path) -> ModelConfig:
    """What model a folder of converted weights is of. Raises `DataError` where it is none."""
    file = Path(weights) / "config.json"
    if not file.is_file():
        raise DataError(f"{weights}: is not a folder of converted weights (no config.json); make one with `python -m convert_weights import`")
    return from_json(ModelConfig, file.read_text())


def load_encoders(weights: str | Path, text: bool, dtype: str = "float32") -> tuple[LatentEncoder, TextEncoder | None]:
    """The encoders out of a folder of converted weights; those of text on request. Raises `DataError` where it is none."""
    folder = Path(weights)
    networks = build_networks(read_model(folder))

    def parameters(name: str) -> Any:
        return networks[name].from_disk(load_weights(folder / name, dtype=dtype, later=True), name)

    latents = LatentEncoder(networks["vae"], parameters("vae"))
    if not text:
        return latents, None
    towers = ("text_encoder", "text_encoder_2")
    tokenizers = [Tokenizer.from_directory(folder / name) for name in ("tokenizer", "tokenizer_2")]
    return latents, TextEncoder([networks[t] for t in towers], [parameters(t) for t in towers], tokenizers)


class CacheJob:
    """Rewrites the splits of a data set with encoder output; a `builder.Job`."""

    def __init__(self, sources: Mapping[str, RecordSource], config: CacheConfig, latents: LatentEncoder, text: TextEncoder | None = None) -> None:
        self.sources, self.config, self._latents, self._text = sources, config, latents, text

    def rows(self, split: str) -> range:
        """The rows of a split that this part takes."""
        number, count = self.config.part
        total = len(self.sources[split])
        return range(total * number // count, total * (number + 1) // count)

    def records(self) -> dict[str, Iterator[Record]]:
        """See `builder.Job`. Records are encoded a batch of one size at a time and come in another order than they are read."""
        return {split: self._split(split) for split in self.sources if len(self.rows(split))}

    def beam_records(self, pipeline: Any, /) -> dict[str, Any]:
        """Not offered: the encoders want an accelerator, not many workers."""
        raise DataError("encoder output is not cached on Beam; run `prepare cache` with --part on each machine that has an accelerator")

    def _split(self, split: str) -> Iterator[Record]:
        source = self.sources[split]
        waiting: dict[tuple[int, int], list[tuple[Record, View, np.ndarray]]] = {}
        for item in ordered_map(lambda i: self._render(source[i]), self.rows(split), self.config.workers):
            full = waiting.setdefault((item[1].h, item[1].w), [])
            full.append(item)
            if len(full) == self.config.batch:
                yield from self._encode(full)
                full.clear()
        for rest in waiting.values():
            yield from self._encode(rest)

    def _render(self, record: Record) -> tuple[Record, View, np.ndarray]:
        sizes = self.config.sizes
        target = sizes[int(assign_buckets(np.array([record.size]), sizes)[0])]
        label = identity_label(record.key)
        draws = (uniform(label, 0, 0), uniform(label, 0, 1)) if self.config.random_crop else None
        view = choose_view(record.size, target, record.face_box, draws)
        if not record.image:
            raise DataError(f"record {record.key!r}: has no photo to encode; cache from the data set that still has them")
        return record, view, render_view(decode_photo(record.image, record.key), record.size, view)

    def _encode(self, items: list[tuple[Record, View, np.ndarray]]) -> Iterator[Record]:
        """Records with latents; a short batch is filled up, so that its size compiles nothing new."""
        if not items:
            return
        dtype, padding = self.config.dtype, self.config.batch - len(items)
        images = np.stack([image for _, _, image in items] + [items[-1][2]] * padding)
        mean, logvar = self._latents(images)
        captions = [record.caption for record, _, _ in items] + [""] * padding
        states, pooled = self._text(captions) if self._text else (None, None)
        for i, (record, view, _) in enumerate(items):
            latents = CachedLatents(mean[i].astype(dtype), logvar[i].astype(dtype), view, self._latents.name)
            text = record.text
            if self._text and states is not None and pooled is not None:
                text = CachedText(states[i].astype(dtype), pooled[i].astype(dtype), self._text.name)
            yield dataclasses.replace(record, latents=latents, text=text, image=record.image if self.config.keep_images else b"")


def cache(sources: Mapping[str, RecordSource], out: str, config: CacheConfig, latents: LatentEncoder, text: TextEncoder | None = None) -> Path:
    """Writes the data set with encoder output below `out` and returns its folder. Raises `DataError` where rows are missing in the end."""
    job = CacheJob(sources, config, latents, text)
    folder = Path(write_dataset(job, out))
    for split in job.records():
        written, expected = DatasetSource(folder, split), len(job.rows(split))
        if len(written) != expected:
            raise DataError(f"{folder}: {len(written)} of {expected} records of {split!r} were written; do not use this data set")
        _ = written.index
    return folder
