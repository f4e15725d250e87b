"""Survey of a stage's sources before training: all records, and a random sample of media files."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tqdm

from dynfocus_jax.data.budget import Budget
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.errors import MediaError, SampleError, UserError
from dynfocus_jax.records.mixture import Mixture
from dynfocus_jax.records.records import Record

_CHUNK = 1000  # tasks that the threads get at a time

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Problem(NamedTuple):
    """An entry or record that cannot be used."""

    id: str
    # "missing" | "words" | "conversation" | "too long" | "unreadable" | "subtitles", or one of `RefusedEntry`
    fault: str
    reason: str
    media: str | None = None


class SourceSurvey(NamedTuple):
    """Results for one source of a mixture."""

    name: str
    entries: int  # in its annotation file
    refused: int  # entries that are not usable records
    records: int  # usable records that are selected
    epoch: int  # samples in an epoch
    modalities: Counter[str]  # number of records by modality
    problems: list[Problem]
    shortened: int  # records that lose turns or frames, assuming that videos have the most frames
    tokens: list[int]  # text tokens of each conversation that could be measured
    frames: list[int]  # frames of each decoded file
    unreadable: float  # share of unreadable files among those decoded

    @property
    def faults(self) -> Counter[str]:
        """Number of problems by fault."""
        return Counter(problem.fault for problem in self.problems)

    @property
    def unusable(self) -> float:
        """Estimated number of unusable entries: unreadable files are as frequent as among those decoded."""
        faults = self.faults
        del faults["unreadable"]
        files = self.records - self.modalities["text"] - faults["missing"]
        return faults.total() + self.unreadable * files


class _Findings(NamedTuple):
    """Results of a pass over records."""

    values: list[int]
    problems: list[tuple[int, Problem]]  # with the number of the record
    shortened: int = 0


@dataclass(frozen=True)
class Surveyor:
    """Surveys the sources of a mixture, with the readers and limits that training uses.

    Attributes:
      mixture: the sources.
      budget, media, loader: those of the stage; without a loader no texts are measured.
      samples: number of files of each source to decode.
      seed: seed of the choice of these files.
      threads: number of threads that look for files, measure texts and decode.
    """

    mixture: Mixture
    budget: Budget
    media: MediaReader
    loader: SampleLoader | None
    samples: int = 20
    seed: int = 0
    threads: int = 2

    def survey_sources(self) -> Iterator[SourceSurvey]:
        """Yield the survey of each source. A record has at most one problem, the first one found."""
        begin = 0
        with ThreadPoolExecutor(self.threads) as pool:
            for name, counts in self.mixture.counts.items():
                yield self._survey_source(name, range(begin, begin + counts.records), pool)
                begin += counts.records

    def _survey_source(self, name: str, numbers: range, pool: ThreadPoolExecutor) -> SourceSurvey:
        records, counts = self.mixture.records, self.mixture.counts[name]
        refused = [
            Problem(entry.id, entry.fault, entry.reason)
            for source, entry in self.mixture.refused
            if source == name
        ]
        missing = self._find_missing_files(numbers, pool)
        lacks_file = {i for i, _ in missing.problems}
        texts = _Findings([], [])
        if self.loader is not None:
            texts = self._measure_texts(self.loader, numbers, lacks_file, pool)
        unusable = lacks_file | {i for i, _ in texts.problems}
        chosen = self._choose_files([i for i in numbers if i not in unusable])
        decoded = self._decode_files(chosen, pool)
        problems = sorted([*missing.problems, *texts.problems, *decoded.problems])
        num_unreadable = sum(problem.fault == "unreadable" for _, problem in decoded.problems)
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
            decoded.values,
            num_unreadable / len(chosen) if chosen else 0.0,
        )

    def _find_missing_files(self, numbers: Sequence[int], pool: ThreadPoolExecutor) -> _Findings:
        records = self.mixture.records
        files = list(dict.fromkeys(path for i in numbers for path in self._files_of(records[i])))
        exist = _map_with_progress(pool, lambda path: path.is_file(), files, "looking for files")
        absent = {path for path, exists in zip(files, exist, strict=True) if not exists}
        problems = []
        for i in numbers:
            missing = [path for path in self._files_of(records[i]) if path in absent]
            if missing:
                problems.append((i, _problem(records[i], "missing", f"{missing[0]}: no such file")))
        return _Findings([], problems)

    def _files_of(self, record: Record) -> list[Path]:
        """Return the files that training reads for a record; with stored features, not its media file."""
        media = record.media if self.media.features is None else None
        files = (media, record.subtitles if self.budget.max_subtitle else None)
        return [path for path in files if path is not None]

    def _measure_texts(
        self, loader: SampleLoader, numbers: Sequence[int], lacks_file: set[int], pool: ThreadPoolExecutor
    ) -> _Findings:
        """Count text tokens, and find samples that are too long, assuming that videos have the most frames.

        Texts of the records in `lacks_file` are counted, but have no other problem.
        """

        def measure(number: int) -> tuple[tuple[int, ...], tuple[str, str] | None]:
            try:
                return loader.text_ends(number), None
            except SampleError as error:
                return (), ("conversation", str(error))
            except UserError as error:
                return (), ("words", str(error))

        values, problems, num_shortened = [], [], 0
        measured = _map_with_progress(pool, measure, numbers, "measuring texts")
        for i, (ends, problem) in zip(numbers, measured, strict=True):
            record = self.mixture.records[i]
            if problem is None:
                values.append(ends[-1])
            if i in lacks_file:
                continue
            if problem is not None:
                problems.append((i, _problem(record, *problem)))
                continue
            frames = {"text": 0, "image": 1, "video": self.budget.max_frames}[record.modality]
            samples = [(end,) for end in ends] if loader.each_turn else [ends]
            outcomes = {_outcome(sample, frames, self.budget) for sample in samples} - {""}
            num_shortened += outcomes == {"shortened"}
            if reasons := outcomes - {"shortened"}:
                problems.append((i, _problem(record, "too long", max(reasons))))
        return _Findings(values, problems, num_shortened)

    def _choose_files(self, numbers: Sequence[int]) -> list[int]:
        """Return the numbers of records with different files, chosen at random, at most `samples`."""
        records = self.mixture.records
        record_of_file = {records[i].media: i for i in numbers if records[i].media}
        order = np.random.default_rng(self.seed).permutation(len(record_of_file))[: self.samples]
        candidates = list(record_of_file.values())
        return sorted(candidates[i] for i in order)

    def _decode_files(self, numbers: Sequence[int], pool: ThreadPoolExecutor) -> _Findings:
        """Count the frames of files, and find files and subtitles that cannot be used."""

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
        results = _map_with_progress(pool, read, numbers, "reading files")
        for i, (frames, problem) in zip(numbers, results, strict=True):
            if frames is not None:
                values.append(frames)
            if problem is not None:
                problems.append((i, _problem(self.mixture.records[i], *problem)))
        return _Findings(values, problems)


def distribution(values: Sequence[int]) -> dict[str, Any] | None:
    """Return quantiles and a histogram of positive lengths, for JSON; None if there are no values.

    "up_to" is the number of values by the smallest power of two that is not below them.
    """
    if not values:
        return None
    median, most = np.quantile(values, (0.5, 0.99), method="higher").tolist()
    powers = np.ceil(np.log2(values)).astype(np.int64)
    up_to = {2**power: int((powers == power).sum()) for power in range(powers.max() + 1)}
    return {"median": median, "99%": most, "most": max(values), "up_to": up_to}


def _outcome(ends: Sequence[int], frames: int, budget: Budget) -> str:
    """Return "" for a sample that is used unchanged, "shortened", or the reason why it is skipped."""
    bucket = budget.choose_bucket(ends, frames)
    room = budget.text_room(frames, bucket)
    if ends[-1] <= room:
        return ""
    if budget.on_overflow == "drop_turns" and ends[0] <= room:
        return "shortened"
    if budget.on_overflow == "fewer_frames" and budget.frame_room(ends[-1], bucket):
        return "shortened"
    return str(budget.overflow_error(ends[-1], frames, bucket))


def _problem(record: Record, fault: str, reason: str) -> Problem:
    return Problem(record.id, fault, reason, str(record.media) if record.media else None)


def _map_with_progress(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Sequence[_Item], title: str
) -> Iterator[_Result]:
    """Yield the function's result for each item, in order, with a progress bar on a terminal."""
    with tqdm.tqdm(total=len(items), desc=title, disable=not sys.stderr.isatty()) as bar:
        for begin in range(0, len(items), _CHUNK):
            for result in pool.map(function, items[begin : begin + _CHUNK]):
                bar.update()
                yield result
