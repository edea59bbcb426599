"""Prepares training data: pictures with captions in, ArrayRecord files of a `tensorflow-datasets` data set out.

    python -m instantid_jax.data.prepare folder --folder photos --out data
    python -m instantid_jax.data.prepare manifest --manifest photos.jsonl --out data
    python -m instantid_jax.data.prepare webdataset --folder shards --out data --beam-runner DirectRunner
    python -m instantid_jax.data.prepare portraits --out data
    python -m instantid_jax.data.prepare cache --data data --weights weights --resolution 1024 --out cached
    python -m instantid_jax.data.prepare inspect data

Every input is written or refused with a reason; the table at the end balances, and quarantine/ names each refused input.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from instantid_jax.data.builder import is_remote
from instantid_jax.data.filters import Examiner, FilterConfig
from instantid_jax.data.inputs import FolderReader, ManifestReader, Reader, WebDatasetReader
from instantid_jax.data.record import DataError
from instantid_jax.data.sources import RecordSource, splits_of
from instantid_jax.data.transforms import aspect_buckets, assign_buckets
from instantid_jax.face.analyzer import load_analyzer
from instantid_jax.options import OptionError, Range, check_command, check_folder, check_options, status_of, while_read, wrong_options

__all__ = ["main"]


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


@dataclass(frozen=True, kw_only=True)
class _Preparing:
    """What every way of preparing shares."""

    out: str
    """Folder for the data set, its quarantine and its report."""
    analyzer: Literal["opencv", "antelopev2"] = "opencv"
    """Face backend; it must be the one that the model is trained for and sampled with."""
    analyzer_root: Path | None = None
    """Folder of the antelopev2 model files."""
    embedding_scale: float = 1.0
    """What embeddings are multiplied with in training, stored with each record."""
    workers: int = 2
    """Threads, where Beam is not used."""
    num_shards: int | None = None
    """Files a split; by default chosen so that they have up to 1 GiB."""
    beam_runner: str | None = None
    """Run on Apache Beam: DirectRunner, DataflowRunner, FlinkRunner, SparkRunner ..."""
    beam_options: tuple[str, ...] = ()
    """Beam's flags without their dashes, such as project=p region=r temp_location=gs://b/t."""
    index: bool = True
    """Build the loader's index at the end. It reads all rows once; a very large set does it later, with `index`."""

    def prepare(self, reader: Reader, filters: FilterConfig, splits: tuple[str, ...], holdout: float) -> int:
        """Runs, prints the account, and returns the exit status."""
        from instantid_jax.data.preparation import EmptySplit, prepare

        if not is_remote(self.out):
            check_folder(Path(self.out))
        start = time.monotonic()
        make = functools.partial(load_analyzer, self.analyzer, self.analyzer_root)
        make()  # a missing model is one sentence now, not a refusal of every input later
        examiner = Examiner(filters, make, self.embedding_scale, splits, holdout)
        try:
            report = prepare(
                reader, examiner, self.out, workers=self.workers, num_shards=self.num_shards,
                beam_runner=self.beam_runner, beam_options=[f"--{option}" for option in self.beam_options], index=self.index,
                tell=lambda line: print(line, file=sys.stderr, flush=True),
            )  # fmt: skip
        except EmptySplit as error:
            _print(error.lines)
            raise
        _print([*report.lines(), f"{report.dataset} written in {time.monotonic() - start:.1f} s"])
        return 0


@dataclass(frozen=True, kw_only=True)
class _Photos(_Preparing):
    """Options for photos from elsewhere."""

    filters: FilterConfig = field(default_factory=FilterConfig)
    splits: tuple[str, ...] = ("train",)
    """Splits that exist; an input that names another one is refused."""
    holdout: float = 0.0
    """Share of persons (of photos, where persons are unknown) that go to the split "test" among inputs that name no split."""
    licence: str = ""
    """Licence of inputs that name none."""

    def read(self, reader: Reader) -> int:
        """Prepares what the reader gives."""
        splits = self.splits if not self.holdout or "test" in self.splits else (*self.splits, "test")
        return self.prepare(reader, self.filters, splits, self.holdout)


@dataclass(frozen=True, kw_only=True)
class Folder(_Photos):
    """From a folder of pictures, each with a .txt (its caption) or .json (fields) of the same name beside it."""

    folder: str
    """The folder; sub-folders are read too."""
    identity_from_folder: bool = False
    """Whether the pictures in a sub-folder show one person."""
    source: str = ""
    """Where the photos come from, put before the file names."""

    def run(self) -> int:
        """Prepares."""
        return self.read(FolderReader(self.folder, self.identity_from_folder, self.source, self.licence))


@dataclass(frozen=True, kw_only=True)
class Manifest(_Photos):
    """From a JSON-lines file: one object a picture, with image, caption and more (docs/data.md lists the fields)."""

    manifest: str
    """The file."""
    rename: tuple[tuple[str, str], ...] = ()
    """Fields that have other names: pairs of the name in the file and the name here."""
    ignore: tuple[str, ...] = ()
    """Fields that are passed over; any other that is unknown is refused."""
    source: str = ""
    """Source of rows that name none."""

    def run(self) -> int:
        """Prepares."""
        return self.read(ManifestReader(self.manifest, self.rename, self.source, self.licence, self.ignore))


@dataclass(frozen=True, kw_only=True)
class WebDataset(_Photos):
    """From tar shards as img2dataset writes them."""

    folder: str
    """The folder of the shards."""
    pattern: str = "*.tar"
    """Which files in it are shards."""

    def run(self) -> int:
        """Prepares."""
        return self.read(WebDatasetReader(self.folder, self.pattern, self.licence))


@dataclass(frozen=True, kw_only=True)
class Portraits(_Preparing):
    """From the procedural heads: labelled people with exact keypoints, and nobody's photo."""

    image_size: int = 64
    """Side of the pictures in pixels."""
    train: int = 3000
    """People in the split "train"."""
    validation: int = 64
    """People in "validation", at most 1000."""
    test: int = 64
    """People in "test", at most 1000."""
    views: int = 4
    """Portraits of each person."""
    skip: int = 0
    """People of each split who are passed over: a set can be made in parts, which training takes together."""
    embed_size: int = 128
    """Side in pixels of the rendering that is embedded; 0 takes the picture itself."""

    def run(self) -> int:
        """Prepares. Only portraits whose face the analyzer does not find are refused."""
        from instantid_jax.data.portrait_records import PortraitReader
        from instantid_jax.data.portraits import PortraitWorld

        people = tuple((split, count) for split, count in (("train", self.train), ("validation", self.validation), ("test", self.test)) if count)
        with wrong_options():
            reader = PortraitReader(PortraitWorld(image_size=self.image_size), people, self.views, self.embed_size, skip=self.skip)
        filters = FilterConfig(min_side=0, min_face_share=0.0, min_det_score=0.0, duplicates="none")
        return self.prepare(reader, filters, reader.splits, 0.0)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Adds the autoencoder's latents, and on request text states, to a data set; writes a new one."""

    data: Path
    """Folder of the data set."""
    out: Path
    """Folder for the new one."""
    weights: Path
    """Folder that `python -m convert_weights import` wrote; its autoencoder and text encoders are used."""
    resolution: int = 1024
    """Side in pixels of the square views, or of the square with the same number of pixels."""
    buckets: bool = False
    """Whether views have the usual set of aspect ratios instead of being square."""
    text: bool = False
    """Also store the text states of captions: 77 x 2048 numbers a record for SDXL."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored numbers."""
    batch: int = 8
    """Photos that are encoded together."""
    keep_images: bool = True
    """Keep the photos in the new set."""
    random_crop: bool = False
    """Place the window at random around the face."""
    workers: int = 2
    """Threads that decode photos."""
    part: tuple[int, int] = (0, 1)
    """Number and count: take only this part of the rows. Parts go to different --out folders and are named together in training."""

    def run(self) -> int:
        """Encodes and writes."""
        from instantid_jax.data.cache import CacheConfig, cache, load_encoders, read_model

        with wrong_options():
            sizes = aspect_buckets(self.resolution) if self.buckets else ((self.resolution, self.resolution),)
            config = CacheConfig(sizes, self.batch, self.dtype, self.random_crop, self.keep_images, self.workers, self.part)
        grid = read_model(self.weights).vae.downscale
        if self.resolution % grid:
            raise OptionError(f"--resolution must be a multiple of the autoencoder's {grid} pixels, at least {grid}, got {self.resolution}")
        check_folder(self.out)
        start = time.monotonic()
        folder = cache(splits_of(self.data), str(self.out), config, *load_encoders(self.weights, self.text))
        print(f"{folder} written in {time.monotonic() - start:.1f} s")
        return 0


@dataclass(frozen=True, kw_only=True)
class Index:
    """Builds the loader's index of a data set, where preparing left it out."""

    data: Annotated[Path, tyro.conf.Positional]
    """Folder of the data set."""
    workers: int = 1
    """Processes, each of which reads a part of the rows."""

    def run(self) -> int:
        """Builds what is missing."""
        _print(f"{split}: {len(source.build_index(self.workers))} rows" for split, source in splits_of(self.data).items())
        return 0


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Shows what a data set holds."""

    data: Annotated[Path, tyro.conf.Positional]
    """Folder of the data set."""
    rows: int = 1
    """Records of each split that are shown in full."""

    def run(self) -> int:
        """Prints."""
        for split, source in splits_of(self.data).items():
            _print(_describe(split, source))
            for i in range(min(self.rows, len(source))):
                _print(_describe_record(source, i))
        return 0


def _describe(split: str, source: RecordSource) -> list[str]:
    index = source.index
    sides = np.asarray(index.size).min(axis=1)
    lines = [
        f"{split}: {len(source):,} records, shorter side {sides.min()} to {sides.max()} pixels (median {int(np.median(sides))})",
        f"  persons: {len(np.unique(np.asarray(index.identity)[np.asarray(index.identity) != 0])):,} labelled, "
        f"{np.count_nonzero(np.asarray(index.identity) == 0):,} photos without a label",
    ]
    buckets = aspect_buckets(1024)
    counts = Counter(assign_buckets(index.size, buckets).tolist())
    lines.append("  aspect (h x w of 1024^2): " + ", ".join(f"{buckets[b][0]} x {buckets[b][1]}: {n:,}" for b, n in counts.most_common(6)))
    views = Counter(map(tuple, np.asarray(index.view).tolist()))
    lines.append("  cached latents: " + ", ".join(f"{n:,} of {h} x {w} pixels" if h else f"{n:,} without" for (h, w), n in views.most_common(6)))
    return lines


def _describe_record(source: RecordSource, i: int) -> list[str]:
    record = source[i]
    lines = [f"  [{i}] {record.key}: {record.size[0]} x {record.size[1]} pixels, {len(record.image):,} bytes, score {record.det_score:.2f}"]
    norm = float(np.linalg.norm(record.embeddings[0]))
    lines.append(f"      embedding {list(record.embeddings.shape)} by {record.embedder}, norm {norm:.2f}, scale {record.embedding_scale:g}")
    texts = ("caption", "caption_identity", "identity", "source", "licence")
    lines += [f"      {name}: {getattr(record, name)!r}" for name in texts if getattr(record, name)]
    lines += [f"      labels: {dict(record.labels)}"] if record.labels else []
    if record.latents is not None:
        lines.append(
            f"      latents {list(record.latents.mean.shape)} {record.latents.mean.dtype} of {record.latents.view} by {record.latents.encoder}"
        )
    if record.text is not None:
        lines.append(f"      text states {list(record.text.states.shape)}, pooled {list(record.text.pooled.shape)} by {record.text.encoder}")
    return lines


COMMANDS = ("folder", "manifest", "webdataset", "portraits", "cache", "index", "inspect")
Command = (
    Annotated[Folder, tyro.conf.subcommand("folder")]
    | Annotated[Manifest, tyro.conf.subcommand("manifest")]
    | Annotated[WebDataset, tyro.conf.subcommand("webdataset")]
    | Annotated[Portraits, tyro.conf.subcommand("portraits")]
    | Annotated[Cache, tyro.conf.subcommand("cache")]
    | Annotated[Index, tyro.conf.subcommand("index")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


_COUNTS = ("batch", "workers", "num_shards", "resolution", "image_size", "views")
_RANGES = {
    **{name: Range(1) for name in _COUNTS},
    **{name: Range(0) for name in ("train", "validation", "test", "skip", "embed_size", "rows")},
    "holdout": Range(0, 1),
    "embedding_scale": Range(0, above=True, below=True),
}


@while_read
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 2 for a wrong option, 130 when interrupted, 1 for what else fails."""
    check_command("prepare", arguments, COMMANDS)
    command = tyro.cli(Command, args=arguments, prog="python -m instantid_jax.data.prepare", description=__doc__)  # type: ignore[call-overload]
    try:
        check_options(command, {name: allowed for name, allowed in _RANGES.items() if hasattr(command, name)})
        return command.run()
    except (DataError, OSError, ValueError, ImportError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return status_of(error)
    except KeyboardInterrupt:
        print("prepare: interrupted; the data set is not complete, and the same command makes it anew", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
