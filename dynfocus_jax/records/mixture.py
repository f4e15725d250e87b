"""Several sources as one data set: which records there are, and how often each is used in an epoch."""

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dynfocus_jax.errors import UserError
from dynfocus_jax.records.formats import read_source
from dynfocus_jax.records.records import Record, Refused
from dynfocus_jax.records.sources import source


class SourceCounts(NamedTuple):
    """Numbers of a source's entries: read, refused and used."""

    entries: int  # in its annotation file
    refused: int  # not usable, each with its reason
    records: int  # usable and selected
    epoch: int  # samples of an epoch, repetitions included


class Mixture:
    """The records of a stage's sources, and the epochs over them.

    Every source is read whole and what its `select` names is kept, in the file's order: "first:N" or
    "random:N" of its usable records, or a share of them, "first:N%", "random:N%" (rounded up).

    Without weights an epoch has every record `repeat` times. With weights it has as many samples in all, but
    they are shared among the sources in proportion to the weights, rounded to whole numbers that add up. The
    records of a source then come in a fixed random order, of which each epoch takes the next part, beginning
    again at its end: of a source smaller than its part every record is used equally often, or once more; a
    larger one gives others each epoch until all have been used.

    All of it follows from the configuration, the seed and the files, so it is the same in every process.

    Args:
      stage: a section `config.stage(...)` with `annotations` (one LLaVA file) or `sources`.
      data_root: the folder that their paths are relative to.

    Attributes:
      records: all that are selected, source by source.
      refused: (name of the source, what is wrong) of entries that are no usable records.
      counts: {name of the source: SourceCounts}.

    Raises:
      UserError: a file cannot be read, a source has no usable record, or fewer than its `select` names.
    """

    def __init__(self, stage: ConfigDict, data_root: str | Path, seed: int):
        self.records: list[Record] = []
        self.refused: list[tuple[str, Refused]] = []
        sources, read, sizes = stage_sources(stage), [], []
        for one in sources:
            usable, refused = read_source(one, data_root)
            chosen = _select(one, usable, refused, seed)
            self.records += chosen
            self.refused += [(one.name, entry) for entry in refused]
            read.append((len(usable) + len(refused), len(refused)))
            sizes.append(len(chosen))
        portions = _portions(sources, sizes)
        self.counts = {
            one.name: SourceCounts(*numbers, size, portion)
            for one, numbers, size, portion in zip(sources, read, sizes, portions, strict=True)
        }
        begins = np.cumsum([0, *sizes]).tolist()
        self._parts = [
            _Part(begin, size, portion, one.weight is not None, _seed(seed, one, "order"))
            for one, begin, size, portion in zip(sources, begins[:-1], sizes, portions, strict=True)
        ]

    def epoch(self, number: int) -> np.ndarray:
        """Positions in `records` of the samples of an epoch (from 0), source by source: int64 [samples]."""
        return np.concatenate([part.epoch(number) for part in self._parts])


def stage_sources(stage: ConfigDict) -> tuple[ConfigDict, ...]:
    """The sources of a stage; `annotations` stands for one LLaVA source of that file's name."""
    if stage.annotations is None:
        return tuple(stage.sources)
    return (source(name=Path(stage.annotations).stem, annotations=stage.annotations),)


class _Part(NamedTuple):
    """A source's share of the records and of every epoch."""

    begin: int  # of its records
    size: int  # number of its records
    portion: int  # samples an epoch
    weighted: bool
    seed: list[int]

    def epoch(self, number: int) -> np.ndarray:
        if not self.weighted:
            return self.begin + np.tile(np.arange(self.size), self.portion // self.size)
        order = np.random.default_rng(self.seed).permutation(self.size)
        return self.begin + order[(number * self.portion + np.arange(self.portion)) % self.size]


def _portions(sources: tuple[ConfigDict, ...], sizes: list[int]) -> list[int]:
    """Samples of each source in an epoch."""
    plain = [size * one.repeat for one, size in zip(sources, sizes, strict=True)]
    if sources[0].weight is None:
        return plain
    weights = np.array([one.weight for one in sources], np.float64)
    exact = sum(plain) * weights / weights.sum()
    portions = np.floor(exact).astype(np.int64)
    short = sum(plain) - int(portions.sum())
    portions[np.argsort(portions - exact, kind="stable")[:short]] += 1  # those that lost most by rounding
    return portions.tolist()


def _select(one: ConfigDict, usable: list[Record], refused: list[Refused], seed: int) -> list[Record]:
    """The selected ones of a source's usable records, in their order."""
    count = len(usable)
    if not count:
        why = f", the first: record {refused[0].id}: {refused[0].reason}" if refused else ""
        raise UserError(
            f"source {one.name!r}: none of the {len(refused)} records of {one.annotations} can be used{why}"
        )
    how, _, amount = one.select.partition(":")
    if how == "all":
        return usable
    number = -(-count * int(amount[:-1]) // 100) if amount.endswith("%") else int(amount)
    if not 0 < number <= count:
        raise UserError(
            f"source {one.name!r} has {count} usable records, but select = {one.select!r} names {number}; "
            "change it, or select a share such as 50%"
        )
    if how == "first":
        return usable[:number]
    rng = np.random.default_rng(_seed(seed, one, "select"))
    return [usable[i] for i in np.sort(rng.choice(count, number, replace=False))]


def _seed(seed: int, one: ConfigDict, purpose: str) -> list[int]:
    """Seeds that depend on the source's name, so that other sources may come and go beside it."""
    return [seed, zlib.crc32(f"{purpose} of {one.name}".encode())]
