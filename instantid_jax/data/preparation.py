"""Turns inputs into records with a full account: every entry of the input is written or refused with its reason.

The same job runs as a loop with threads on one machine, or as a Beam pipeline. Either way the account is checked at the end:
entries counted where they are read = rows in the finished files + lines in the quarantine.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from etils import epath

from instantid_jax.data.builder import is_remote, refuse_existing, rows_written, write_dataset
from instantid_jax.data.filters import Accepted, Examiner, FirstSeen, alike, bands, refuse_duplicate, refuse_key
from instantid_jax.data.inputs import Candidate, Reader, Refusal
from instantid_jax.data.record import DataError, Record
from instantid_jax.data.sources import DatasetSource

__all__ = ["EmptySplit", "PrepareJob", "Report", "ordered_map", "prepare"]

A = TypeVar("A")
B = TypeVar("B")
_SECONDS = 10.0
_WINDOW = 8  # entries a thread that may be read ahead


@dataclass(frozen=True)
class Report:
    """What became of the inputs. ``inputs == sum(written) + sum(refused)``, which `check` has made sure of."""

    inputs: int
    written: dict[str, int]
    """Records by split."""
    refused: dict[str, int]
    """Refusals by code."""
    dataset: str
    """The folder of the data set."""
    quarantine: str
    """The folder of the JSON lines that name every refused input."""

    def check(self) -> Report:
        """The report itself. Raises `DataError` where the totals do not balance."""
        written, refused = sum(self.written.values()), sum(self.refused.values())
        if self.inputs != written + refused:
            raise DataError(f"{self.dataset}: {self.inputs} inputs were read, but {written} written and {refused} refused; do not use this data set")
        return self

    def lines(self) -> list[str]:
        """For people."""
        total = max(self.inputs, 1)
        rows = [("inputs", self.inputs), *((f"written to {split}", n) for split, n in self.written.items())]
        rows += [(f"refused: {code}", n) for code, n in sorted(self.refused.items(), key=lambda item: (-item[1], item[0]))]
        return [f"{n:>12,}  {n / total:>6.1%}  {name}" for name, n in rows]


class EmptySplit(DataError):
    """A split without a record; `lines` are the account up to it, as of `Report.lines`."""

    def __init__(self, message: str, lines: list[str]) -> None:
        super().__init__(message)
        self.lines = lines


class PrepareJob:
    """A reader's entries through an examiner; a `builder.Job`.

    `quarantine` is the folder for what is refused. `tell` is given a line on the state every ten seconds, where there is no Beam.
    """

    def __init__(self, reader: Reader, examiner: Examiner, quarantine: str, workers: int = 1, tell: Callable[[str], None] | None = None) -> None:
        self.reader, self.examiner, self.workers = reader, examiner, workers
        self.quarantine = epath.Path(quarantine)
        self._tell = tell

    # --- one machine --------------------------------------------------------------------------------------------------------

    def records(self) -> dict[str, Iterator[Record]]:
        """See `builder.Job`. The input is read once a split; every entry counts in one split's pass only."""
        self.quarantine.mkdir(parents=True, exist_ok=True)
        self._inputs = 0
        self._codes: collections.Counter[str] = collections.Counter()
        self._written: dict[str, int] = {}
        self._began = self._told = time.monotonic()
        first = FirstSeen(self.examiner.config.duplicates)
        return {split: self._split_records(split, first) for split in self.examiner.splits}

    def _split_records(self, split: str, first: FirstSeen) -> Iterator[Record]:
        written = 0
        with (self.quarantine / f"refused-{split}.jsonl").open("w") as file:
            for verdict in ordered_map(_Examine(self.examiner), self._entries(split), self.workers):
                verdict = first(verdict) if isinstance(verdict, Accepted) else verdict
                self._report(split)
                if isinstance(verdict, Refusal):
                    file.write(verdict.to_json() + "\n")
                    self._codes[verdict.code] += 1
                else:
                    written += 1
                    yield verdict.record
        self._written[split] = written
        if not written:
            reasons = ", ".join(f"{code} {n}" for code, n in self._codes.most_common()) or (
                "none belongs to it" if self._inputs else "there was no input"
            )
            so_far = Report(self._inputs, self._written, dict(self._codes), "", str(self.quarantine))
            raise EmptySplit(f"no input became a record of the split {split!r} ({reasons}); {self.quarantine} names each", so_far.lines())

    def _report(self, split: str) -> None:
        now = time.monotonic()
        if self._tell is not None and now - self._told >= _SECONDS:
            self._told = now
            rate = self._inputs / (now - self._began)
            self._tell(f"{split}: {self._inputs:,} inputs read, {self._codes.total():,} refused, {rate:.1f} a second")

    def _entries(self, split: str) -> Iterator[Candidate | Refusal]:
        """The entries that belong to this split's pass; what belongs to no split is in the first one's."""
        splits = self.examiner.splits
        for shard in self.reader.shards(split):
            for entry in self.reader.read(shard):
                own = self.examiner.split(entry) if isinstance(entry, Candidate) else splits[0]
                if own == split or (own not in splits and split == splits[0]):
                    self._inputs += 1
                    yield entry

    def totals(self) -> tuple[int, dict[str, int]]:
        """(entries, refusals by code), of the pass of `records` or from the files that `beam_records` has left."""
        counted = self.quarantine / "counts"
        if not counted.exists():
            lines: collections.Counter[str] = collections.Counter()
            for path in self.quarantine.glob("refused-*.jsonl"):
                with path.open("r") as file:
                    lines.update(json.loads(line)["code"] for line in file)
            return self._inputs, dict(lines)
        counts: collections.Counter[str] = collections.Counter()
        for path in counted.iterdir():
            for line in path.read_text().splitlines():
                name, number = json.loads(line)
                counts[name] += number
        return counts.pop("", 0), dict(counts)

    # --- Beam ---------------------------------------------------------------------------------------------------------------

    def beam_records(self, pipeline: Any) -> dict[str, Any]:
        """See `builder.Job`."""
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.io import WriteToText  # pyright: ignore[reportMissingImports]

        reader, examiner = self.reader, self.examiner
        entries = (
            pipeline
            | "Input" >> beam.Create([reader])
            | "Shards" >> beam.FlatMap(lambda r: r.shards())
            | "Spread shards" >> beam.Reshuffle()
            | "Read" >> beam.FlatMap(reader.read)
            | "Spread entries" >> beam.Reshuffle()
        )
        examined = entries | "Examine" >> beam.Map(_Examine(examiner))
        accepted, refused = self._beam_singles(examined | "Accepted" >> beam.Filter(_is_accepted))
        refusals = (examined | "Refused" >> beam.Filter(_is_refusal), *refused) | "All refused" >> beam.Flatten()
        prefix = str(self.quarantine / "refused")
        _ = refusals | "Lines" >> beam.Map(Refusal.to_json) | "Quarantine" >> WriteToText(prefix, ".jsonl")
        inputs = entries | "Count inputs" >> beam.combiners.Count.Globally() | "Name" >> beam.Map(lambda n: ("", n))
        codes = refusals | "Codes" >> beam.Map(lambda r: r.code) | "Count codes" >> beam.combiners.Count.PerElement()
        _ = (
            (inputs, codes)
            | "All counts" >> beam.Flatten()
            | "Count lines" >> beam.Map(json.dumps)
            | "Counts" >> WriteToText(str(self.quarantine / "counts" / "part"), ".jsonl")
        )
        records = accepted | "Records" >> beam.Map(lambda a: a.record)
        return {split: records | f"Of {split}" >> beam.Filter(lambda r, s=split: r.split == s) for split in examiner.splits}

    def _beam_singles(self, accepted: Any) -> tuple[Any, list[Any]]:
        """What remains of accepted inputs when each key and each picture counts once, and the collections of what is refused for it."""
        import apache_beam as beam  # pyright: ignore[reportMissingImports]

        by_key = (
            accepted
            | "By key" >> beam.Map(lambda a: (a.record.key, a))
            | "Group keys" >> beam.GroupByKey()
            | "First of a key" >> beam.FlatMap(_first_of_key)
        )
        refused = [by_key | "Same key" >> beam.Filter(_is_refusal)]
        unique = by_key | "Unique key" >> beam.Filter(_is_accepted)
        if self.examiner.config.duplicates == "none":
            return unique, refused
        doubles = _Doubles(self.examiner.config.duplicates, self.examiner.splits)
        marks = (  # fingerprints alone travel here, not pictures
            unique
            | "Bands" >> beam.FlatMap(doubles.bands)
            | "Group bands" >> beam.GroupByKey()
            | "Pairs" >> beam.FlatMap(doubles.pairs)
            | "Earliest" >> beam.CombinePerKey(min)
        )
        records = unique | "By unique key" >> beam.Map(lambda a: (a.record.key, a))
        judged = (records, marks) | "Join" >> beam.CoGroupByKey() | "Judge" >> beam.FlatMap(_judge)
        refused.append(judged | "Doubles" >> beam.Filter(_is_refusal))
        return judged | "Singles" >> beam.Filter(_is_accepted), refused


class _Examine:
    """The examiner's verdict on an entry, where a refusal by the reader stands; picklable."""

    def __init__(self, examiner: Examiner) -> None:
        self._examiner = examiner

    def __call__(self, entry: Candidate | Refusal) -> Accepted | Refusal:
        return entry if isinstance(entry, Refusal) else self._examiner(entry)


def _is_refusal(verdict: Accepted | Refusal) -> bool:
    return isinstance(verdict, Refusal)


def _is_accepted(verdict: Accepted | Refusal) -> bool:
    return isinstance(verdict, Accepted)


def _first_of_key(group: tuple[str, Iterable[Accepted]]) -> Iterator[Accepted | Refusal]:
    first, *others = sorted(group[1], key=lambda a: (a.fingerprint, a.record.image))
    yield first
    yield from map(refuse_key, others)


class _Doubles:
    """Finds, among fingerprints that share a band, those with an alike one before them: by split, then by key."""

    def __init__(self, kind: str, splits: tuple[str, ...]) -> None:
        self._kind, self._splits = kind, splits

    def bands(self, accepted: Accepted) -> Iterator[tuple[bytes, tuple[int, str, bytes]]]:
        """(band, (split's number, key, fingerprint)) for each band of a record."""
        place = self._splits.index(accepted.record.split), accepted.record.key, accepted.fingerprint
        return ((band, place) for band in bands(accepted.fingerprint, self._kind))

    def pairs(self, group: tuple[bytes, Iterable[tuple[int, str, bytes]]]) -> Iterator[tuple[str, tuple[int, str]]]:
        """(key, (split's number, key) of the first record that it repeats)."""
        firsts: dict[bytes, tuple[int, str]] = {}
        for number, key, mark in sorted(group[1]):
            earlier = next((place for other, place in firsts.items() if alike(mark, other, self._kind)), None)
            if earlier is not None:
                yield key, earlier
            firsts.setdefault(mark, (number, key))


def _judge(group: tuple[str, tuple[Iterable[Accepted], Iterable[tuple[int, str]]]]) -> Iterator[Accepted | Refusal]:
    (accepted,), earlier = group[1]
    found = min(earlier, default=None)
    yield accepted if found is None else refuse_duplicate(accepted, found[1])


def ordered_map(function: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[B]:
    """``map`` with threads: results in the items' order, few items ahead."""
    if workers <= 1:
        yield from map(function, items)
        return
    waiting: collections.deque[Future[B]] = collections.deque()
    iterator = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        for item in iterator:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= workers * _WINDOW:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def prepare(
    reader: Reader,
    examiner: Examiner,
    out: str,
    *,
    workers: int = 1,
    num_shards: int | None = None,
    beam_runner: str | None = None,
    beam_options: Iterable[str] = (),
    index: bool = True,
    tell: Callable[[str], None] | None = None,
) -> Report:
    """Prepares a data set below `out`: the ArrayRecord files, ``quarantine/``, ``report.json`` and, unless left out, the loader's index.

    `workers` threads examine photos where there is no Beam, and `tell` hears of the progress.
    Raises `DataError` where nothing passes or the totals do not balance.
    """
    if index and is_remote(out):
        raise DataError(f"{out}: the index is built from files on this machine; leave it out (--no-index) and build it where the set is read")
    refuse_existing(out)
    quarantine = epath.Path(out) / "quarantine"  # one of an interrupted run may lie there
    if quarantine.exists():
        quarantine.rmtree()
    job = PrepareJob(reader, examiner, str(quarantine), workers, tell)
    folder = write_dataset(job, out, num_shards=num_shards, beam_runner=beam_runner, beam_options=beam_options)
    written = rows_written(str(folder))
    inputs, refused = job.totals()
    report = Report(inputs, {split: written.get(split, 0) for split in examiner.splits}, refused, str(folder), str(quarantine)).check()
    (epath.Path(out) / "report.json").write_text(json.dumps(dataclasses.asdict(report), indent=1))
    if index:
        for split in examiner.splits:
            _ = DatasetSource(str(folder), split).index
    return report
