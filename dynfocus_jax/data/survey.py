"""Survey of a stage's sources before training: all records, and a random sample of files."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

from dynfocus_jax.data.budget import Budget
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.errors import MediaError, SampleError, UserError
from dynfocus_jax.records.mixture import Mixture
from dynfocus_jax.records.records import Record

_CHUNK = 1000  # tasks that are handed to the threads together


class Problem(NamedTuple):
    """An entry or record that cannot be used, with the reason."""

    id: str
    # of `RefusedEntry`, or "missing" | "words" | "conversation" | "too long" | "unreadable" | "subtitles"
    fault: str
    reason: str
    media: str | None = None


class SourceSurvey(NamedTuple):
    """One source of a mixture."""

    name: str
    entries: int  # in its annotation file
    refused: int  # of them
    records: int  # usable by their annotation, and selected
    epoch: int  # samples of an epoch
    modalities: Counter[str]  # of the records
    problems: list[Problem]
    shortened: int  # records that lose turns or frames, if videos have the most frames
    tokens: list[int]  # text of each conversation that can be measured
    frames: list[int]  # of each file that was decoded
    unreadable: float  # share of the files that were to be decoded

    @property
    def faults(self) -> Counter[str]:
        """Return the number of entries by fault."""
        return Counter(problem.fault for problem in self.problems)

    @property
    def unusable(self) -> float:
        """Estimate the number of unusable entries, with unreadable files at the decoded sample's rate."""
        faults = self.faults
        del faults["unreadable"]
        files = self.records - self.modalities["text"] - faults["missing"]
        return faults.total() + self.unreadable * files


class _Found(NamedTuple):
    """Results of a pass over records."""

    values: list[int]
    problems: list[tuple[int, Problem]]  # with the number of the record
    shortened: int = 0


@dataclass(frozen=True)
class Surveyor:
    """Looks through the sources of a mixture with what training uses.

    budget, media, loader: of the stage; without `loader` no texts are measured.
    samples: files of each source that are decoded, chosen by `seed`.
    threads: that look for files, measure texts and decode.
    """

    mixture: Mixture
    budget: Budget
    media: MediaReader
    loader: SampleLoader | None
    samples: int = 20
    seed: int = 0
    threads: int = 2

    def sources(self) -> Iterator[SourceSurvey]:
        """Each source; a record has one problem at most, the first that is found."""
        begin = 0
        with ThreadPoolExecutor(self.threads) as pool:
            for name, counts in self.mixture.counts.items():
                yield self._source(name, range(begin, begin + counts.records), pool)
                begin += counts.records

    def _source(self, name: str, numbers: range, pool: ThreadPoolExecutor) -> SourceSurvey:
        records, counts = self.mixture.records, self.mixture.counts[name]
        refused = [
            Problem(entry.id, entry.fault, entry.reason)
            for source, entry in self.mixture.refused
            if source == name
        ]
        missing = self._find_files(numbers, pool)
        gone = {i for i, _ in missing.problems}
        texts = self._measure_texts(numbers, gone, pool) if self.loader else _Found([], [])
        bad = gone | {i for i, _ in texts.problems}
        some = self._some_files([i for i in numbers if i not in bad])
        read = self._decode(some, pool)
        problems = sorted([*missing.problems, *texts.problems, *read.problems])
        return SourceSurvey(
            name,
            counts.entries,
            counts.refused,
            counts.records,
            counts.epoch,
            Counter(records[i].modality for i in numbers),
            [*refused, *(problem for _, problem in problems)],
            texts.shortened,
            texts.values,
            read.values,
            sum(problem.fault == "unreadable" for _, problem in read.problems) / len(some) if some else 0.0,
        )

    def _find_files(self, numbers: Sequence[int], pool: ThreadPoolExecutor) -> _Found:
        records = self.mixture.records
        files = list(dict.fromkeys(path for i in numbers for path in self._files_of(records[i])))
        present = _work(pool, lambda path: path.is_file(), files, "looking for files")
        gone = {path for path, there in zip(files, present, strict=True) if not there}
        problems = []
        for i in numbers:
            missing = [path for path in self._files_of(records[i]) if path in gone]
            if missing:
                problems.append((i, _problem(records[i], "missing", f"{missing[0]}: no such file")))
        return _Found([], problems)

    def _files_of(self, record: Record) -> list[Path]:
        """Return the files that are read for a record: with features, not the file of its frames."""
        frames = record.media if self.media.features is None else None
        read = (frames, record.subtitles if self.budget.max_subtitle else None)
        return [path for path in read if path is not None]

    def _measure_texts(self, numbers: Sequence[int], missing: set[int], pool: ThreadPoolExecutor) -> _Found:
        """Text tokens, and what is too long if a video has the most frames that a sample may have.

        Of records whose files are missing, the tokens alone.
        """

        def measure(number: int) -> tuple[int, ...] | tuple[str, str]:
            try:
                return self.loader.text_ends(number)
            except SampleError as error:
                return "conversation", str(error)
            except UserError as error:
                return "words", str(error)

        values, problems, shortened = [], [], 0
        for i, ends in zip(numbers, _work(pool, measure, numbers, "measuring texts"), strict=True):
            record = self.mixture.records[i]
            if isinstance(ends[0], str):
                problems += [(i, _problem(record, *ends))] if i not in missing else []
                continue
            values.append(ends[-1])
            if i in missing:
                continue
            frames = {"text": 0, "image": 1, "video": self.budget.max_frames}[record.modality]
            samples = [(end,) for end in ends] if self.loader.each_turn else [ends]
            fates = {_fate(sample, frames, self.budget) for sample in samples} - {""}
            shortened += fates == {"shortened"}
            if fates - {"shortened"}:
                problems.append((i, _problem(record, "too long", max(fates - {"shortened"}))))
        return _Found(values, problems, shortened)

    def _some_files(self, numbers: Sequence[int]) -> list[int]:
        """Records of different files, at most as many as are to be decoded."""
        records = self.mixture.records
        files = {records[i].media: i for i in numbers if records[i].media}
        order = np.random.default_rng(self.seed).permutation(len(files))[: self.samples]
        candidates = list(files.values())
        return sorted(candidates[i] for i in order)

    def _decode(self, numbers: Sequence[int], pool: ThreadPoolExecutor) -> _Found:
        """Numbers of frames, and what keeps a file or its subtitles from being used."""

        def read(number: int) -> tuple[int | None, tuple[str, str] | None]:
            record, rng = self.mixture.records[number], np.random.default_rng(self.seed)
            try:
                clip = self.media.read(record, self.budget.max_frames, rng)
            except MediaError as error:
                return None, ("unreadable", str(error))
            try:
                if self.loader is not None:
                    self.loader.subtitles(record, clip.times)
            except (MediaError, SampleError, UserError) as error:
                return len(clip.frames), ("subtitles", str(error))
            return len(clip.frames), None

        values, problems = [], []
        for i, (frames, problem) in zip(numbers, _work(pool, read, numbers, "reading files"), strict=True):
            if frames is not None:
                values.append(frames)
            if problem is not None:
                problems.append((i, _problem(self.mixture.records[i], *problem)))
        return _Found(values, problems)


def distribution(values: Sequence[int]) -> dict | None:
    """Quantiles, and how many values are at most 1, 2, 4, ... but above the next smaller of these."""
    if not values:
        return None
    median, most = np.quantile(values, (0.5, 0.99), method="higher").tolist()
    powers = np.ceil(np.log2(values)).astype(np.int64)
    up_to = {2**power: int((powers == power).sum()) for power in range(powers.max() + 1)}
    return {"median": median, "99%": most, "most": max(values), "up_to": up_to}


def _fate(ends: Sequence[int], frames: int, budget: Budget) -> str:
    """Return "" for a sample that is used unchanged, "shortened", or the reason why it is skipped."""
    bucket = budget.choose(ends, frames)
    room = budget.text_room(frames, bucket)
    if ends[-1] <= room:
        return ""
    if budget.on_overflow == "drop_turns" and ends[0] <= room:
        return "shortened"
    if budget.on_overflow == "fewer_frames" and budget.frame_room(ends[-1], bucket):
        return "shortened"
    return str(budget.overflow(ends[-1], frames, bucket))


def _problem(record: Record, fault: str, reason: str) -> Problem:
    return Problem(record.id, fault, reason, str(record.media) if record.media else None)


def _work(pool: ThreadPoolExecutor, function: Callable, items: Sequence, title: str) -> Iterator[Any]:
    """`function` of each item, in threads and in order, with a progress bar on a terminal."""
    with tqdm.tqdm(total=len(items), desc=title, disable=not sys.stderr.isatty()) as bar:
        for begin in range(0, len(items), _CHUNK):
            for result in pool.map(function, items[begin : begin + _CHUNK]):
                bar.update()
                yield result
