"""The `tensorflow-datasets` builder: records into ArrayRecord files, on one machine or on Apache Beam, without TensorFlow.

TFDS orders the rows by a hash of their keys, so both ways give the same rows in the same order.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import writer as tfds_writer

from instantid_jax.data.record import DataError, Record, to_example
from instantid_jax.data.sources import quiet_tfds

__all__ = ["BeamRecordBuilder", "Job", "RecordBuilder", "example_of", "features", "is_remote", "refuse_existing", "rows_written", "write_dataset"]

NAME, VERSION = "instantid_records", "1.0.0"


class Job(Protocol):
    """What fills a data set."""

    def records(self) -> Mapping[str, Iterable[Record]]:
        """The records of each split, consumed one split after the other."""
        ...

    def beam_records(self, pipeline: Any, /) -> Mapping[str, Any]:
        """For Beam: a PCollection of records for each split."""
        ...


def features() -> tfds.features.FeaturesDict:
    """The form of a record on disk; `record.to_example` gives the values."""
    strings = ("key", "embedder", "caption", "caption_identity", "identity", "labels", "split", "source", "licence")
    arrays = ("landmarks", "latent_mean", "latent_logvar", "text_states", "text_pooled")  # .npy bytes, empty where absent
    tensor = tfds.features.Tensor
    return tfds.features.FeaturesDict(
        {
            **{name: tfds.features.Text() for name in (*strings, *arrays, "latent_encoder", "text_encoder")},
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format=None),
            "size": tensor(shape=(2,), dtype=np.int32),
            "keypoints": tensor(shape=(5, 2), dtype=np.float32),
            "face_box": tensor(shape=(4,), dtype=np.float32),
            "embeddings": tensor(shape=(None,), dtype=np.float32),
            "embedding_dim": tfds.features.Scalar(dtype=np.int32),
            "embedding_scale": tfds.features.Scalar(dtype=np.float32),
            "det_score": tfds.features.Scalar(dtype=np.float32),
            "latent_view": tensor(shape=(6,), dtype=np.int32),
        }
    )


def example_of(record: Record) -> tuple[str, dict[str, Any]]:
    """(key, example) as TFDS takes it; the picture as a file of encoded bytes, since TFDS would need TensorFlow for an array."""
    example = to_example(record)
    return record.key, {**example, "image": io.BytesIO(example["image"]), "embeddings": example["embeddings"].reshape(-1)}


class _ShardWriter(tfds_writer.ExampleWriter):
    """Writes shards for other places than this machine's disk into a local file first, since ArrayRecord writes no other."""

    def write(self, path: Any, examples: Any) -> Any:
        """See `tfds.core.writer.ExampleWriter.write`."""
        if not is_remote(path):
            return super().write(path, examples)
        with tempfile.TemporaryDirectory() as folder:
            local = epath.Path(folder) / "shard"
            positions = super().write(local, examples)
            local.copy(path)
        return positions


def is_remote(path: Any) -> bool:
    """Whether a path is an address such as gs://bucket/folder."""
    return "://" in os.fspath(path)


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What both builders share."""

    VERSION = tfds.core.Version(VERSION)
    pkg_dir_path = epath.Path(__file__).parent

    def __init__(self, job: Job, data_dir: str) -> None:
        self._job = job
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            features=features(),
            description="Photos of one person each, with caption, face embedding and keypoints.",
            license="by record",
        )

    def _example_writer(self) -> _ShardWriter:
        return _ShardWriter(file_format=tfds.core.FileFormat.ARRAY_RECORD)

    def _log_download_bytes(self) -> None:
        """Says nothing: there is no download."""

    _log_download_done = _log_download_bytes

    def _generate_examples(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the job gives the examples")


class RecordBuilder(_Builder, skip_registration=True):
    """Runs in this process."""

    name = NAME

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: map(example_of, records) for split, records in self._job.records().items()}


class BeamRecordBuilder(_Builder, skip_registration=True):
    """Runs wherever Beam does."""

    name = NAME

    def _split_generators(self, dl_manager: Any, pipeline: Any) -> dict[str, Any]:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]

        del dl_manager
        return {split: records | f"Example {split}" >> beam.Map(example_of) for split, records in self._job.beam_records(pipeline).items()}


def refuse_existing(out: str) -> None:
    """Raises `DataError` where `out` holds a data set already."""
    existing = epath.Path(out) / NAME / VERSION
    if existing.exists():
        raise DataError(f"{existing}: there is a data set already; name another folder or remove it")


def write_dataset(
    job: Job,
    out: str,
    *,
    num_shards: int | None = None,
    beam_runner: str | None = None,
    beam_options: Iterable[str] = (),
) -> epath.Path:
    """Runs the job and returns the data set's folder below `out`, which appears only when it is complete.

    With `beam_runner` (a Beam runner's name, such as "DirectRunner", "DataflowRunner", "FlinkRunner" or "SparkRunner") the work
    is done on Beam with `beam_options`, command-line flags of Beam. Raises `DataError` where `out` holds a data set already.
    """
    refuse_existing(out)
    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=num_shards)
    if beam_runner is None:
        builder: Any = RecordBuilder(job, out)
    else:
        try:
            from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise DataError('Apache Beam is not installed; pip install "instantid_jax[beam]"') from error
        builder = BeamRecordBuilder(job, out)
        config.beam_runner, config.beam_options = beam_runner, PipelineOptions(list(beam_options))
    tfds.disable_progress_bar()
    with quiet_tfds(), tempfile.TemporaryDirectory() as unused:
        try:
            builder.download_and_prepare(download_dir=unused, download_config=config)
        except (ValueError, RuntimeError) as error:
            if "number of generated examples is 0" in str(error):  # how TFDS says it from inside a Beam worker
                raise DataError(f"{out}: no input became a record of one of the splits; prepare a small part without Beam to see why") from error
            raise
    return epath.Path(builder.data_dir)


def rows_written(folder: str) -> dict[str, int]:
    """How many rows each split of a finished data set has, by its description."""
    with quiet_tfds():
        splits = tfds.builder_from_directory(folder).info.splits
    return {name: int(split.num_examples) for name, split in splits.items()}
