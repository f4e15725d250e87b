"""The data of a stage: records, samples, their order, and batches on the devices."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from dynfocus_jax.data.budget import Budget, stage_buckets
from dynfocus_jax.data.lengths import SampleLengths
from dynfocus_jax.data.order import BatchOrder
from dynfocus_jax.data.pipeline import make_dataset
from dynfocus_jax.data.prepare import make_media_reader
from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.data.skipped import ShortenedSamples, SkippedSamples
from dynfocus_jax.parallel.processes import is_process_zero, process_file_name, process_zero_first
from dynfocus_jax.records.mixture import Mixture
from dynfocus_jax.records.records import Record
from dynfocus_jax.text.conversation import TEMPLATES
from dynfocus_jax.text.tokenizers import Tokenizer
from dynfocus_jax.training.feed import DeviceFeed
from dynfocus_jax.video_language_model import stage_connector


def stage_seed(config: ConfigDict, index: int) -> int:
    """Return the seed of a stage's data: of drawing records and turns, and of their order."""
    return config.seed + 1000 * index


def with_steps(config: ConfigDict, index: int, steps: int) -> ConfigDict:
    """Return a copy of the configuration in which stage `index` has a number of steps instead of epochs."""
    config = config.copy_and_resolve_references()
    stages = [stage.copy_and_resolve_references() for stage in config.stages]
    stages[index].update({"steps": steps, "epochs": None})
    config.stages = tuple(stages)
    return config


def stage_budget(config: ConfigDict, index: int) -> Budget:
    """Return the shapes of a stage's batches and the limits of its samples, by the stage's connector."""
    stage = config.stages[index]
    connector = stage_connector(config, index)
    return Budget.from_buckets(
        *(stage_buckets(stage), connector.length, stage.max_length, stage.on_overflow, stage.max_subtitle)
    )


def make_loader(
    config: ConfigDict, index: int, records: Sequence[Record], tokenizer: Tokenizer, data_root: Path
) -> SampleLoader:
    """Return the sample loader of a stage. data_root: folder of annotations and media."""
    data = config.data
    return SampleLoader(
        records,
        tokenizer,
        TEMPLATES[data.template],
        make_media_reader(config, data_root),
        stage_budget(config, index),
        max_query=data.max_query,
        guidance=data.text_guidance,
        max_turns=config.stages[index].max_turns,
    )


class StageData:
    """Training data of stage `index` of a configuration.

    Attributes:
      config: the configuration, in which the stage has a number of steps even if it gives epochs.
      stage: the section of the stage in that configuration.
      loader: makes samples of the records.
      order: the samples of each batch.
      refused: entries of the annotation files that are not valid records.
      skipped: list of samples that could not be used.
      shortened: list of samples that were shortened to fit their bucket.

    Raises:
      UserError: annotations cannot be read, or too many of their records cannot be used.
    """

    def __init__(
        self, config: ConfigDict, index: int, *, workdir: Path, data_root: Path, tokenizer: Tokenizer
    ):
        data, stage = config.data, config.stages[index]
        self._seed = stage_seed(config, index)
        mixture = Mixture(stage, data_root, self._seed)
        self.refused = mixture.refused
        workdir.mkdir(parents=True, exist_ok=True)
        self.skipped = SkippedSamples(
            workdir / process_file_name("skipped.jsonl"), max_share=data.max_skip_share
        )
        self.skipped.note_refused(mixture.refused, sum(counts.entries for counts in mixture.counts.values()))
        self.shortened = ShortenedSamples(workdir / process_file_name("overflow.jsonl"))
        self.loader = make_loader(config, index, mixture.records, tokenizer, data_root)
        if self.loader.media.features is not None:
            limits = {frames for frames, _ in self.buckets}
            self.loader.media.features.check_coverage(mixture.records, limits, data.max_skip_share)
        with process_zero_first():
            lengths = SampleLengths(
                workdir / "lengths.jsonl" if data.lengths is None else Path(data.lengths).expanduser(),
                text_settings=(data.template, data.text_guidance, stage.max_turns, _described(tokenizer)),
                threads=data.threads,
                write=is_process_zero(),
            )
            self._bucket_of = lengths.assign_buckets(self.loader)
        epoch = functools.partial(_epoch, mixture, self.loader)
        self.order = BatchOrder(epoch, self._bucket_of, batch_size=stage.batch_size, seed=self._seed)
        if stage.steps is None:
            config = with_steps(config, index, self.order.num_steps(stage.epochs))
        self.config, self.stage = config, config.stages[index]

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """Return the (num_frames, max_text) pairs of the batches."""
        return self.loader.budget.buckets

    @property
    def epochs(self) -> float:
        """Return the approximate number of epochs in the stage's steps."""
        return self.stage.steps / self.order.steps_per_epoch(0)

    def digest(self) -> str:
        """Return a digest of the records and their buckets; a position in the data is valid only for them."""
        names = "\n".join(f"{record.source} {record.id}" for record in self.loader.records)
        return hashlib.sha256(names.encode() + self._bucket_of.tobytes()).hexdigest()[:12]

    def feed(self, start: int, end: int, rows: Sequence[int], put: Callable) -> DeviceFeed:
        """Return the batches of steps `start` to `end`, each with the number of samples skipped so far.

        rows: rows of each batch that this process holds. put: places them on its devices.
        """
        data = self.config.data
        batches = make_dataset(
            self.loader,
            self.order,
            seed=self._seed,
            skipped=self.skipped,
            shortened=self.shortened,
            rows=rows,
            start=start,
            num_threads=data.threads,
            num_processes=data.processes,
        )
        return DeviceFeed(iter(batches), put, lambda: self.skipped.count, end - start)


def _epoch(mixture: Mixture, loader: SampleLoader, number: int) -> np.ndarray:
    return loader.sample_numbers(mixture.epoch(number))


def _described(tokenizer: Tokenizer) -> tuple:
    return type(tokenizer).__name__, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id
