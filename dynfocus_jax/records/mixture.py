"""Mixtures: several sources as one data set, and how often each record is used in an epoch."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dynfocus_jax.errors import UserError
from dynfocus_jax.records.records import ParsedEntries, Record, RefusedEntry
from dynfocus_jax.records.sources import read_source, source


class SourceCounts(NamedTuple):
    """Numbers of a source's entries and samples."""

    entries: int  # in its annotation file
    refused: int  # not usable
    records: int  # usable and selected
    epoch: int  # samples per epoch, repetitions included


class Mixture:
    """The records of a stage's sources, and the order of their samples in each epoch.

    Each source is read completely. Its `select` chooses from the usable records: all of them, the first N
    ("first:N"), N at random ("random:N"), or a percentage, rounded up ("first:N%", "random:N%"). Selected
    records stay in the order of the file.

    Without weights, each record is used `repeat` times in an epoch. With weights, an epoch has the same total
    number of samples, divided among the sources in proportion to the weights; rounding keeps the total. Each
    source then has a fixed random order of its records, of which each epoch takes the next part, starting
    again after the end. So in one epoch, the numbers of uses of a source's records differ by at most one.

    Everything depends only on the configuration, the seed and the files, so it is the same in all processes.

    Args:
      stage: a section `config.stage(...)` with `annotations` (one LLaVA file) or `sources`.
      data_root: folder that the paths of the sources are relative to.
      seed: seed of random selections and orders.

    Attributes:
      records: all selected records, source by source.
      refused: (name of the source, entry) for each entry that is not a usable record.
      counts: {name of the source: SourceCounts}.

    Raises:
      UserError: if a file cannot be read, or a source has no usable record or fewer than `select` needs.
    """

    def __init__(self, stage: ConfigDict, data_root: str | Path, seed: int):
        self.records: list[Record] = []
        self.refused: list[tuple[str, RefusedEntry]] = []
        self.counts: dict[str, SourceCounts] = {}
        self._schedules: list[_SourceSchedule] = []
        sections, counts = stage_sources(stage), []
        for section in sections:
            usable, refused = parsed = read_source(section, data_root)
            selected = _select(section, parsed, seed)
            counts.append(SourceCounts(len(usable) + len(refused), len(refused), len(selected), epoch=0))
            self.records += selected
            self.refused += [(section.name, entry) for entry in refused]
        begin = 0
        epoch_sizes = _epoch_sizes(sections, [each.records for each in counts])
        for section, each, epoch_size in zip(sections, counts, epoch_sizes, strict=True):
            order_seed = None if section.weight is None else _source_seed(seed, section, "order")
            self._schedules.append(_SourceSchedule(begin, each.records, epoch_size, order_seed))
            self.counts[section.name] = each._replace(epoch=epoch_size)
            begin += each.records

    def epoch(self, number: int) -> np.ndarray:
        """Return the samples of an epoch, source by source.

        Args:
          number: number of the epoch, from 0.

        Returns:
          Positions in `records`, int64 [samples].
        """
        return np.concatenate([schedule.epoch(number) for schedule in self._schedules])


def stage_sources(stage: ConfigDict) -> tuple[ConfigDict, ...]:
    """Return the sources of a stage; `annotations` stands for one LLaVA source with the name of the file."""
    if stage.annotations is None:
        return tuple(stage.sources)
    return (source(name=Path(stage.annotations).stem, annotations=stage.annotations),)


class _SourceSchedule(NamedTuple):
    """The order in which the records of a source are used."""

    begin: int  # position of its first record
    size: int  # number of its records
    epoch_size: int  # samples per epoch
    order_seed: list[int] | None  # seed of the random order of a weighted source, None without weights

    def epoch(self, number: int) -> np.ndarray:
        """Return the positions of the records of an epoch, int64 [epoch_size]."""
        if self.order_seed is None:
            return self.begin + np.tile(np.arange(self.size), self.epoch_size // self.size)
        order = np.random.default_rng(self.order_seed).permutation(self.size)
        return self.begin + order[(number * self.epoch_size + np.arange(self.epoch_size)) % self.size]


def _epoch_sizes(sections: Sequence[ConfigDict], sizes: Sequence[int]) -> list[int]:
    """Return the number of samples of each source in an epoch, from the numbers of their records."""
    unweighted = [size * section.repeat for section, size in zip(sections, sizes, strict=True)]
    if sections[0].weight is None:
        return unweighted
    weights = np.array([section.weight for section in sections], np.float64)
    exact = sum(unweighted) * weights / weights.sum()
    rounded = np.floor(exact).astype(np.int64)
    remainder = sum(unweighted) - int(rounded.sum())
    rounded[np.argsort(rounded - exact, kind="stable")[:remainder]] += 1  # those that rounding reduced most
    return rounded.tolist()


def _select(section: ConfigDict, parsed: ParsedEntries, seed: int) -> list[Record]:
    """Return the selected records of a source, in the order of the file."""
    usable, refused = parsed
    count = len(usable)
    if not count:
        first = f"; the first is record {refused[0].id}: {refused[0].reason}" if refused else ""
        raise UserError(
            f"source {section.name!r}: none of the {len(refused)} entries of {section.annotations} is a "
            f"usable record{first}."
        )
    how, _, amount = section.select.partition(":")
    if how == "all":
        return usable
    number = -(-count * int(amount[:-1]) // 100) if amount.endswith("%") else int(amount)
    if not 0 < number <= count:
        raise UserError(
            f"source {section.name!r}: select is {section.select!r}, which is {number} records, expected 1 "
            f"to {count} (the number of usable records); change it, or use a percentage such as 50%."
        )
    if how == "first":
        return usable[:number]
    rng = np.random.default_rng(_source_seed(seed, section, "select"))
    return [usable[i] for i in np.sort(rng.choice(count, number, replace=False))]


def _source_seed(seed: int, section: ConfigDict, purpose: str) -> list[int]:
    """Return a seed that depends on the name of the source, but not on the other sources."""
    return [seed, zlib.crc32(f"{purpose} of {section.name}".encode())]
