"""Samples of a data set that lies in memory: what `loader` makes one at a time, cut out of arrays a whole batch at a time.

A record of cached latents takes little room (about 20 KB at 64 pixels), and reading and parsing it again every epoch costs more than a
small model's step on an accelerator. Everything that does not depend on the position is therefore made once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from instantid_jax.data.order import CAPTION, DROP, OTHER, REFERENCE, BatchOrder, uniforms
from instantid_jax.data.record import DataError, Record
from instantid_jax.data.sources import RecordSource, SameIdentity

__all__ = ["Resident", "Shares", "check_embedder"]

Batch = dict[str, Any]


class Shares(Protocol):
    """What is asked of a `LoaderConfig`."""

    @property
    def seed(self) -> int: ...
    @property
    def drop_text(self) -> float: ...
    @property
    def drop_identity(self) -> float: ...
    @property
    def drop_both(self) -> float: ...
    @property
    def paired_reference(self) -> float: ...
    @property
    def identity_caption(self) -> float: ...
    @property
    def num_threads(self) -> int: ...


class Resident:
    """All records of `source`, and batches at any positions of the global order."""

    def __init__(
        self,
        source: RecordSource,
        config: Shares,
        order: BatchOrder,
        same: SameIdentity | None,
        tokens: Callable[[str], tuple[np.ndarray, ...]],
        parts: Callable[[Record], Batch],
    ) -> None:
        """`parts` makes the arrays of a record that are the same at every position. Raises `DataError` for records that do not fit together."""
        self._config, self._order, self._same = config, order, same
        count, numbers = len(source), _Numbers()
        self._caption, self._looks = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self._columns: dict[str, np.ndarray] = {}
        embeddings: list[np.ndarray] = []
        embedder = None
        with ThreadPoolExecutor(max(config.num_threads, 1)) as pool:
            for i, (record, made) in enumerate(pool.map(lambda i: _with_parts(source[i], parts), range(count))):
                embedder = embedder or record.embedder
                check_embedder(record, embeddings[0].shape[1] if embeddings else record.embeddings.shape[1], embedder)
                embeddings.append((record.embeddings * np.float32(record.embedding_scale)).astype(np.float32))
                self._caption[i] = numbers[record.caption]
                self._looks[i] = numbers[record.caption_identity or record.caption]
                for name, array in made.items():
                    if i == 0:
                        self._columns[name] = np.empty((count, *array.shape), array.dtype)
                    self._columns[name][i] = array
        self._embeddings = np.concatenate(embeddings)
        rows = np.array([len(e) for e in embeddings])
        self._extra, self._first = rows - 1, np.cumsum(rows) - rows
        self._empty = numbers[""]
        ids = [tokens(caption) for caption in numbers]
        self._ids = [np.stack([row[tower] for row in ids]) for tower in range(2)]

    def __call__(self, positions: np.ndarray) -> Batch:
        """The batch of samples at `positions` [b]."""
        config, positions = self._config, np.asarray(positions, np.int64)
        index = np.array([self._order.index(int(position)) for position in positions])
        draw = uniforms(config.seed, positions, DROP)
        both, text = draw < config.drop_both, draw < config.drop_both + config.drop_text
        no_identity = both | (~text & (draw < config.drop_both + config.drop_text + config.drop_identity))
        looks = uniforms(config.seed, positions, CAPTION) < config.identity_caption
        caption = np.where(text, self._empty, np.where(looks, self._looks[index], self._caption[index]))
        embedding = self._embeddings[self._givers(index, positions)]
        embedding[no_identity] = 0
        batch = {name: column[index] for name, column in self._columns.items()}
        for name in ("latent_mean", "latent_logvar"):
            batch[name] = batch[name].astype(np.float32)
        return batch | {
            "input_ids": self._ids[0][caption],
            "input_ids_2": self._ids[1][caption],
            "embedding": embedding,
            "text_dropped": text,
            "identity_dropped": no_identity,
            "index": index,
            "position": positions,
        }

    def _givers(self, index: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Rows of the embeddings: of the photo itself, or of another one of the person."""
        rows, seed = self._first[index], self._config.seed
        if self._same is None:
            return rows
        extra = self._extra[index]
        total = extra + self._same.others(index)
        paired = (uniforms(seed, positions, REFERENCE) < self._config.paired_reference) & (total > 0)
        choice = np.minimum((uniforms(seed, positions, OTHER) * total).astype(np.int64), total - 1)
        elsewhere = paired & (choice >= extra)
        rows = np.where(paired & ~elsewhere, rows + 1 + choice, rows)
        rows[elsewhere] = self._first[self._same.other(index[elsewhere], (choice - extra)[elsewhere])]
        return rows


class _Numbers(dict[str, int]):
    """Numbers texts in the order in which they are asked for."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


def _with_parts(record: Record, parts: Callable[[Record], Batch]) -> tuple[Record, Batch]:
    latents = record.latents
    assert latents is not None  # `LoaderConfig` and the buckets have looked
    return record, {"latent_mean": latents.mean, "latent_logvar": latents.logvar} | parts(record)


def check_embedder(record: Record, dim: int, embedder: str) -> None:
    """Raises `DataError` where a record's embeddings are not of `dim` values by `embedder`."""
    if record.embeddings.shape[1] != dim or record.embedder != embedder:
        raise DataError(
            f"record {record.key!r}: its embedding has {record.embeddings.shape[1]} values by {record.embedder!r}, where {dim} by "
            f"{embedder!r} are expected; a data set must be made with one face analyzer"
        )
