"""Records to batches: deterministic, resumable, and the same global order for any number of processes.

Everything about a sample follows from (seed, position): which record, its crop, its caption, what is dropped, whose embedding
is taken. `position` k is row ``k % global_batch`` of step ``k // global_batch``; process p of P makes rows p G/P to (p + 1) G/P
of each global batch. A batch is a dict of arrays, leading axis b = G/P, sizes fixed within an aspect bucket:

    image            uint8   [b, H, W, 3]    absent with cached latents
    latent_mean      float32 [b, h, w, c]    with cached latents only: the autoencoder's posterior, unscaled
    latent_logvar    float32 [b, h, w, c]
    keypoint_image   uint8   [b, H, W, 3]    absent with keypoint_style="none"
    keypoints        float32 [b, 5, 2]       x, y in output pixels
    face_box         float32 [b, 4]          x0, y0, x1, y1 in output pixels, cut off at the edges
    input_ids        int32   [b, 77]         first tokenizer; the empty caption's where the text is dropped
    input_ids_2      int32   [b, 77]         second tokenizer
    text_states      float32 [b, n, c]       with cached text only; zeros where the text is dropped
    text_pooled      float32 [b, p]
    embedding        float32 [b, d]          times the record's scale; zeros where the identity is dropped
    sizes            float32 [b, 6]          SDXL's time ids: original h, w, crop top, left, target h, w
    text_dropped     bool    [b]
    identity_dropped bool    [b]
    index            int64   [b]             place of the record in the source
    position         int64   [b]             place in the global order
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.data.order import CAPTION, CROP_X, CROP_Y, DROP, OTHER, REFERENCE, BatchOrder, Buckets, pick, uniform
from instantid_jax.data.record import DataError, Record, View
from instantid_jax.data.resident import Resident, check_embedder
from instantid_jax.data.sources import RecordSource, SameIdentity
from instantid_jax.data.transforms import assign_buckets, choose_view, decode_photo, move_box, move_points, render_view, time_ids
from instantid_jax.options import Range

__all__ = ["BatchIterator", "LoaderConfig", "make_loader"]

Batch = dict[str, Any]

STYLES = ("five", "dense", "none")
_END = 1 << 52  # positions that exist: more than any run reaches


_SHARE = Range(0, 1)
_CONTENT_ROWS = 1024
_RANGES = {
    **dict.fromkeys(("drop_text", "drop_identity", "drop_both", "paired_reference", "identity_caption"), _SHARE),
    "global_batch": Range(1),
    "resolution": Range(8),
    "keypoint_scale": Range(0, above=True, below=True),
    "num_threads": Range(0),
    "prefetch": Range(0),
}


class Encoder(Protocol):
    """What is asked of a tokenizer (`instantid_jax.text.Tokenizer`)."""

    def encode(self, texts: Sequence[str], /) -> np.ndarray: ...


@dataclass(frozen=True)
class LoaderConfig:
    """How records become batches. `make_loader` raises `DataError` for what does not fit."""

    seed: int = 0
    """Decides the order of records and everything random about a sample."""
    global_batch: int = 96
    """Samples a step over all processes."""
    resolution: int = 1024
    """Side in pixels of the square output, where `buckets` is empty."""
    buckets: tuple[tuple[int, int], ...] = ()
    """Output sizes (height, width); every global batch has one of them. `transforms.aspect_buckets` makes a usual set."""
    random_crop: bool = True
    """Whether the window is placed at random around the face; else as near to the centre as the face allows."""
    drop_text: float = 0.0
    """Share of samples without text. The paper drops nothing; IP-Adapter drops 5 % each of text, identity and both."""
    drop_identity: float = 0.0
    """Share of samples without identity: a zero embedding."""
    drop_both: float = 0.0
    """Share of samples without either; the three shares are of all samples and exclude each other."""
    paired_reference: float = 0.0
    """Share of samples conditioned on another photo of the same person, among records that have one."""
    identity_caption: float = 0.0
    """Share of captions with words for the person's looks (0: plain captions, 1: always), among records that have such a caption."""
    keypoint_style: str = "five"
    """"five" points and their limbs, "dense" adds the record's landmarks, "none" makes no picture."""
    keypoint_scale: float = 1.0
    """Size of dots and limbs relative to the published drawing, which suits a thousand pixels (limbs 8 px wide, dots 20 px).
    Training takes it from `ModelConfig.keypoint_scale`."""
    cached_latents: bool = False
    """Whether latents out of the records replace pictures; the crop is then the one that was encoded."""
    cached_text: bool = False
    """Whether the text encoders' stored output is given beside the token ids."""
    in_memory: bool = False
    """Whether all records are read at the start and batches are cut out of arrays: the same ones, and a hundred times as many a second. For
    cached latents of one size, in sets that fit the memory."""
    num_threads: int = 4
    """Threads that read and decode, each a batch at a time; 0 works in the caller's thread."""
    prefetch: int = 4
    """Batches that are made ahead; at least one a thread."""

    def __post_init__(self) -> None:
        for name, allowed in _RANGES.items():
            if problem := allowed.problem(getattr(self, name)):
                raise DataError(f"LoaderConfig: {name} {problem}")
        if self.drop_text + self.drop_identity + self.drop_both > 1 + 1e-9:
            raise DataError("LoaderConfig: drop_text, drop_identity and drop_both exclude each other, so they must sum to at most 1")
        if self.keypoint_style not in STYLES:
            raise DataError(f"LoaderConfig: keypoint_style is one of {', '.join(STYLES)}, got {self.keypoint_style!r}")
        if self.cached_text and self.identity_caption:
            raise DataError("LoaderConfig: cached text is of the plain caption, so identity_caption must be 0 with cached_text")
        if self.in_memory and (not self.cached_latents or self.cached_text or self.buckets):
            raise DataError("LoaderConfig: in_memory needs cached_latents=True, and neither cached_text nor buckets")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The output sizes (height, width)."""
        return self.buckets or ((self.resolution, self.resolution),)


class _Tokens:
    """Token ids of captions, each tokenised once; one call at a time, as tokenizers are not made for threads."""

    def __init__(self, tokenizers: Sequence[Encoder]) -> None:
        self._tokenizers = tuple(tokenizers)
        self._lock = threading.Lock()
        self._cached = functools.lru_cache(maxsize=65_536)(self._encode)

    def __call__(self, caption: str) -> tuple[np.ndarray, ...]:
        return self._cached(caption)

    def _encode(self, caption: str) -> tuple[np.ndarray, ...]:
        with self._lock:
            return tuple(np.asarray(tokenizer.encode([caption])[0], np.int32) for tokenizer in self._tokenizers)


class _Samples:
    """The sample at any position of the global order."""

    def __init__(self, source: RecordSource, config: LoaderConfig, tokenizers: Sequence[Encoder]) -> None:
        self.source, self.config = source, config
        self._tokens = _Tokens(tokenizers)
        self.order = BatchOrder(_bucket_records(source, config), config.global_batch, config.seed)
        self._same = SameIdentity(source.index.identity) if config.paired_reference else None
        self._dim = source[self.order.index(0)].embeddings.shape[1]

    def __call__(self, position: int) -> Batch:
        config, position = self.config, int(position)
        index = self.order.index(position)
        record = self.source[index]
        target = config.sizes[self.order.bucket(position // config.global_batch)]
        view = self._view(record, target, position)
        no_text, no_identity = _dropped(config, position)
        sample: Batch = _geometry(record, view) | {
            "embedding": np.zeros(self._dim, np.float32) if no_identity else self._embedding(record, index, position),
            "text_dropped": np.bool_(no_text),
            "identity_dropped": np.bool_(no_identity),
            "index": np.int64(index),
            "position": np.int64(position),
        }
        sample["input_ids"], sample["input_ids_2"] = self._tokens("" if no_text else self._caption(record, position))
        if config.cached_text:
            sample |= _text(record, no_text)
        if config.cached_latents:
            assert record.latents is not None  # `_view` has looked
            sample["latent_mean"] = record.latents.mean.astype(np.float32)
            sample["latent_logvar"] = record.latents.logvar.astype(np.float32)
        else:
            photo = decode_photo(record.image, record.key, max(view.resized_h, view.resized_w))
            sample["image"] = render_view(photo, record.size, view)
        if config.keypoint_style != "none":
            sample["keypoint_image"] = self._drawing(record, sample["keypoints"], view)
        return sample

    def resident(self) -> Resident:
        """The same samples out of memory."""

        def parts(record: Record) -> Batch:
            view = self._view(record, self.config.sizes[0], 0)
            made = _geometry(record, view)
            if self.config.keypoint_style != "none":
                made["keypoint_image"] = self._drawing(record, made["keypoints"], view)
            return made

        return Resident(self.source, self.config, self.order, self._same, self._tokens, parts)

    def _view(self, record: Record, target: tuple[int, int], position: int) -> View:
        if self.config.cached_latents:
            if record.latents is None:
                raise DataError(f"record {record.key!r}: has no cached latents; run `prepare cache`, or train with cached_latents=False")
            return record.latents.view
        draws = None
        if self.config.random_crop:
            draws = uniform(self.config.seed, position, CROP_Y), uniform(self.config.seed, position, CROP_X)
        return choose_view(record.size, target, record.face_box, draws)

    def _caption(self, record: Record, position: int) -> str:
        wanted = record.caption_identity and uniform(self.config.seed, position, CAPTION) < self.config.identity_caption
        return record.caption_identity if wanted else record.caption

    def _embedding(self, record: Record, index: int, position: int) -> np.ndarray:
        """The person's embedding, of this photo or of another one, times its scale."""
        config = self.config
        row, giver = 0, record
        if self._same is not None and uniform(config.seed, position, REFERENCE) < config.paired_reference:
            extra, others = len(record.embeddings) - 1, int(self._same.others(index))
            if extra + others:
                choice = pick(extra + others, config.seed, position, OTHER)
                if choice < extra:
                    row = 1 + choice
                else:
                    giver = self.source[int(self._same.other(index, choice - extra))]
        embedding = giver.embeddings[row]
        check_embedder(giver, self._dim, record.embedder)
        return (embedding * np.float32(giver.embedding_scale)).astype(np.float32)

    def _drawing(self, record: Record, keypoints: np.ndarray, view: View) -> np.ndarray:
        landmarks = None
        if self.config.keypoint_style == "dense":
            if record.landmarks is None:
                raise DataError(f"record {record.key!r}: has no landmarks beside the five keypoints; use keypoint_style='five'")
            landmarks = move_points(record.landmarks, record.size, view)
        return draw_keypoints((view.w, view.h), keypoints, self.config.keypoint_scale, landmarks)


def _geometry(record: Record, view: View) -> Batch:
    """Positions in the view's picture, and its micro-conditions."""
    return {
        "keypoints": move_points(record.keypoints, record.size, view),
        "face_box": move_box(record.face_box, record.size, view),
        "sizes": time_ids(record.size, view),
    }


def _dropped(config: LoaderConfig, position: int) -> tuple[bool, bool]:
    """(without text, without identity): three exclusive shares of one uniform draw."""
    draw = uniform(config.seed, position, DROP)
    if draw < config.drop_both:
        return True, True
    if draw < config.drop_both + config.drop_text:
        return True, False
    return False, draw < config.drop_both + config.drop_text + config.drop_identity


def _text(record: Record, dropped: bool) -> Batch:
    if record.text is None:
        raise DataError(f"record {record.key!r}: has no cached text states; run `prepare cache --text`, or train with cached_text=False")
    arrays = {"text_states": record.text.states, "text_pooled": record.text.pooled}
    return {name: np.zeros(a.shape, np.float32) if dropped else a.astype(np.float32) for name, a in arrays.items()}


def _bucket_records(source: RecordSource, config: LoaderConfig) -> Buckets:
    """Which records belong to which output size. Raises `DataError` where cached latents are of other sizes."""
    sizes, index = config.sizes, source.index
    if not config.cached_latents:
        assignment = assign_buckets(index.size, sizes) if len(sizes) > 1 else np.zeros(len(index), np.int16)
        return Buckets(assignment, len(sizes))
    assignment = np.full(len(index), -1, np.int16)
    for number, size in enumerate(sizes):
        assignment[(index.view[:, 0] == size[0]) & (index.view[:, 1] == size[1])] = number
    strangers = np.flatnonzero(assignment < 0)
    if len(strangers):
        h, w = index.view[strangers[0]]
        found = f"latents of {h} x {w} pixels" if h else "no latents"
        raise DataError(
            f"{len(strangers)} of {len(index)} records have other latents than of {', '.join(f'{a} x {b}' for a, b in sizes)} pixels; "
            f"the first, {strangers[0]}, has {found}. Run `prepare cache` for these sizes, or name the cached sizes in `buckets`"
        )
    return Buckets(assignment, len(sizes))


def _contents(source: RecordSource) -> str:
    """A digest of a thousand rows of the index, evenly spread: another data set with as many records is told from this one."""
    index = source.index
    rows = np.unique(np.linspace(0, len(index) - 1, _CONTENT_ROWS).astype(np.int64))
    return hashlib.sha256(index.size[rows].tobytes() + index.view[rows].tobytes() + index.identity[rows].tobytes()).hexdigest()[:16]


class BatchIterator(grain.DatasetIterator):
    """Endless batches of one process. The state is the next global position, the same number in every process and for any number of them.

    `close` stops its threads.
    """

    def __init__(self, samples: _Samples, rows: np.ndarray, start_position: int) -> None:
        super().__init__()
        self._samples, self._rows = samples, rows
        self._inner: Any = None
        self._resident: Resident | None = None
        self._go_to(start_position)

    def __next__(self) -> Batch:
        self._assert_not_closed()
        if self._inner is None:
            self._inner = self._open()
        batch = next(self._inner)
        self._position += self._samples.config.global_batch
        return batch

    @property
    def position(self) -> int:
        """The global position that the next batch of all processes starts with."""
        return self._position

    def bucket(self, step: int) -> tuple[int, int]:
        """(height, width) in pixels of global batch number `step`."""
        return self._samples.config.sizes[self._samples.order.bucket(step)]

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs, as JSON values; equal in all processes."""
        return {"position": self._position, **self._fingerprint()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, with any number of processes. Raises `DataError` where order or data are not the same."""
        for name, value in self._fingerprint().items():
            if name in state and state[name] != value:
                raise DataError(
                    f"the saved data position belongs to {name}={state[name]!r}, but this loader has {name}={value!r}, which gives another "
                    f"order; use the saved value, or start the loader at a position of your choice with start_position"
                )
        self._go_to(int(state["position"]))

    def close(self) -> None:
        """Stops reading ahead and ends its threads; safe to call twice."""
        if self._inner is not None:
            self._inner.close()
            self._inner = None
        super().close()

    def _fingerprint(self) -> dict[str, Any]:
        config = self._samples.config
        sizes, source = [list(size) for size in config.sizes], self._samples.source
        return {"seed": config.seed, "global_batch": config.global_batch, "records": len(source), "sizes": sizes, "contents": _contents(source)}

    def _go_to(self, position: int) -> None:
        batch = self._samples.config.global_batch
        if position < 0 or position % batch:
            raise DataError(f"start_position must be a multiple of the global batch of {batch} and at least 0, got {position}")
        if self._inner is not None:
            self._inner.close()
            self._inner = None
        self._position = position

    def _open(self) -> Any:
        config = self._samples.config
        whole, rows = config.global_batch, self._rows
        options = grain.ReadOptions(
            num_threads=config.num_threads, prefetch_buffer_size=max(config.prefetch, config.num_threads) if config.num_threads else 0
        )
        if config.in_memory:
            resident = self._resident = self._resident or self._samples.resident()
            steps = grain.MapDataset.range(self._position // whole, _END // whole)
            return iter(steps.map(lambda step: resident(int(step) * whole + rows)).to_iter_dataset(options))
        own = grain.MapDataset.range(self._position // whole * len(rows), _END // whole * len(rows))
        batches = own.map(lambda i: int(i // len(rows) * whole + rows[i % len(rows)])).map(self._samples).batch(len(rows))
        return iter(batches.to_iter_dataset(options))


def make_loader(
    source: RecordSource,
    config: LoaderConfig,
    tokenizers: tuple[Encoder, Encoder],
    process_index: int = 0,
    process_count: int = 1,
    start_position: int = 0,
    rows: np.ndarray | None = None,
) -> BatchIterator:
    """The batches of one process, from global position `start_position` (a multiple of the global batch) on.

    A process has part `process_index` of `process_count` equal parts of every global batch, or these `rows` of it.
    Raises `DataError` where the global batch does not divide among the processes, or the source does not have what `config` asks for.
    """
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index must be at least 0 and below the {process_count} processes, got {process_index}")
    if config.global_batch % process_count:
        raise DataError(f"global_batch must be a multiple of the {process_count} processes, got {config.global_batch}")
    size = config.global_batch // process_count
    own = np.arange(process_index * size, (process_index + 1) * size) if rows is None else np.asarray(rows)
    return BatchIterator(_Samples(source, config, tokenizers), own, start_position)
