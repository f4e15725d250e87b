"""The input pipeline: records to batches, in a fixed order that can be resumed exactly."""

import threading
from collections.abc import Sequence
from pathlib import Path

import cachetools
import grain
import numpy as np

from dynfocus_jax.batch import Batch, padding_sample
from dynfocus_jax.config import UserError
from dynfocus_jax.data.conversation import (
    Conversation,
    SampleError,
    Template,
    Tokenizer,
    encode_conversation,
    encode_prompt,
    query_text,
)
from dynfocus_jax.data.sources import Record
from dynfocus_jax.data.video import Clip, MediaError, read_media
from dynfocus_jax.json_lines import append_json_line, read_json_lines


class Skipped:
    """Samples that could not be used: each listed once, all counted, too many of them an error.

    `note` raises UserError as soon as more than `max_share` of the samples seen (of the first `grace` samples
    at least, so that one bad file among the first does not stop a run) were skipped. With `path`, each
    bad record is appended there as a json line; records already listed there are not listed again. Safe to
    use from several threads; each process needs a path of its own.
    """

    def __init__(self, path: str | Path | None = None, *, max_share: float = 0.01, grace: int = 100):
        if not 0 <= max_share < 1:
            raise UserError(
                f"the largest share of skipped samples is {max_share}, expected at least 0 and below 1"
            )
        self.count = 0  # samples skipped since the start, repetitions in later epochs included
        self.seen = 0
        self.records: list[dict] = []
        self._path = Path(path) if path else None
        self._max_share, self._grace = max_share, grace
        self._lock = threading.Lock()
        if self._path:
            self.records = read_json_lines(self._path)
        self._listed = {record["id"] for record in self.records}

    def note(self, record: Record, reason: str | None) -> None:
        """Counts one sample; `reason` says why it was skipped, None that it was used."""
        with self._lock:
            self.seen += 1
            if reason is None:
                return
            self.count += 1
            self._list(record, reason)
            if self.count > self._max_share * max(self.seen, self._grace):
                raise UserError(
                    f"{self.count} of {self.seen} samples could not be used, more than the allowed share of "
                    f"{self._max_share}; the last: record {record.id}: {reason}"
                )

    def _list(self, record: Record, reason: str) -> None:
        if record.id in self._listed:
            return
        self._listed.add(record.id)
        entry = {"id": record.id, "media": str(record.media) if record.media else None, "reason": reason}
        self.records.append(entry)
        if self._path:
            append_json_line(self._path, entry)


class SampleLoader:
    """Reads one record: `loader(index, rng)` gives a Batch without the leading axis.

    num_frames, image_size, max_text, max_query: T, H = W, Lt and Lq of the batch.
    prompt_only: tokens end where the last answer starts (evaluation).
    max_turns: use so many turns, drawn and ordered by `rng`; None keeps all in their order.
    cache_bytes: decoded frames kept in memory, the least recently used dropped first.

    A query longer than max_query keeps its last tokens, as the published text encoder cuts on the left.
    Raises MediaError or SampleError for a sample that cannot be used.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Tokenizer,
        template: Template,
        *,
        num_frames: int,
        image_size: int,
        max_text: int,
        max_query: int,
        prompt_only: bool = False,
        max_turns: int | None = None,
        cache_bytes: int = 0,
    ):
        self.records = records
        self._tokenizer, self._template = tokenizer, template
        self._num_frames, self._image_size = num_frames, image_size
        self._max_text, self._max_query = max_text, max_query
        self._prompt_only, self._max_turns = prompt_only, max_turns
        self._cache = cachetools.LRUCache(cache_bytes, getsizeof=lambda clip: clip.frames.nbytes)
        self._lock = threading.Lock()

    def padding(self) -> Batch:
        """A padding row of the same shapes."""
        sample = padding_sample(
            self._num_frames, self._image_size, self._max_text, self._max_query, self._tokenizer.pad_id
        )
        # The text encoder may have its own, smaller vocabulary: 0 is an id of every one.
        return sample._replace(query_tokens=np.zeros_like(sample.query_tokens))

    def __call__(self, index: int, rng: np.random.Generator) -> Batch:
        record = self.records[index]
        chosen = np.arange(len(record.turns))
        if self._max_turns is not None:
            chosen = rng.permutation(chosen)[: self._max_turns]
        turns = [record.turns[i] for i in chosen]
        conversation = self._encode(record, turns)
        query = self._tokenizer.encode_query(query_text(turns), self._max_query)
        sample = self.padding()  # fresh arrays, filled from the left
        if record.media is not None:
            clip = self._read(record.media)
            count = len(clip.frames)
            sample.frames[:count] = clip.frames
            sample.frame_mask[:count] = True
            needles = [frame for i in chosen if record.needle_frames for frame in record.needle_frames[i]]
            sample.oracle_frames[:count] = np.isin(clip.indices, needles)
        sample.query_tokens[: len(query)] = query
        sample.tokens[: len(conversation.tokens)] = conversation.tokens
        sample.loss_mask[: len(conversation.tokens)] = conversation.loss_mask
        return sample._replace(
            query_length=np.int32(len(query)),
            length=np.int32(len(conversation.tokens)),
            visual_position=np.int32(conversation.visual_position),
            index=np.int32(index),
        )

    def _encode(self, record: Record, turns: Sequence[tuple[str, str]]) -> Conversation:
        options = {
            "max_length": self._max_text,
            "has_visual": record.media is not None,
            "visual_at_end": record.visual_at_end,
        }
        if self._prompt_only:
            question = turns[-1][0]
            return encode_prompt(self._tokenizer, question, self._template, turns[:-1], **options)
        return encode_conversation(self._tokenizer, turns, self._template, **options)

    def _read(self, path: Path) -> Clip:
        with self._lock:
            clip = self._cache.get(path)
        if clip is None:  # decoded outside the lock: two threads may, rarely, read one file twice
            clip = read_media(path, self._num_frames, self._image_size)
            if clip.frames.nbytes <= self._cache.maxsize:
                with self._lock:
                    self._cache[path] = clip
        return clip


def make_dataset(
    load: SampleLoader,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    epochs: int | None = None,
    pad_last: bool = False,
    skipped: Skipped | None = None,
    rows: Sequence[int] | None = None,
    start: int = 0,
    num_threads: int = 2,
    prefetch: int = 64,
) -> grain.IterDataset:
    """A grain dataset of batches over `load.records`, whose whole state is the number of batches consumed.

    One global order of samples is drawn from `seed`, newly shuffled each epoch, and cut into batches of
    `batch_size` rows. A process that holds some of the rows of each gives their numbers as `rows`; None is
    all of them. So batch s is the same however many processes share it, and `start`, the number of batches
    consumed before, is a position from which any number of processes goes on. epochs: None is endless.
    num_threads threads read `prefetch` samples ahead; 0 reads none ahead.

    A sample that cannot be used becomes a padding row (index -1, nothing to learn), so that no other process
    need know of it; `skipped` is told, which raises UserError when there are too many. Records that do not
    fill a batch at the end are left out, or with `pad_last` (evaluation) filled up with padding rows.
    """
    skipped = skipped or Skipped()
    rows = range(batch_size) if rows is None else rows
    num_records = len(load.records)
    if not num_records:
        raise UserError("there are no records to read: check the annotations")

    def load_or_pad(index: int, rng: np.random.Generator) -> Batch:
        if index >= num_records:
            return load.padding()
        try:
            sample, reason = load(index, rng), None
        except (MediaError, SampleError) as error:
            sample, reason = load.padding(), str(error)
        skipped.note(load.records[index], reason)
        return sample

    padding = -num_records % batch_size if pad_last else 0
    samples = grain.MapDataset.range(num_records + padding)
    if shuffle:
        samples = samples.shuffle(seed)
    samples = samples.random_map(load_or_pad, seed=seed).repeat(epochs)

    def load_row(number: int) -> Batch:
        batch, row = divmod(number, len(rows))
        return samples[batch * batch_size + rows[row]]

    end = len(samples) // batch_size
    numbers = grain.MapDataset.range(min(start, end) * len(rows), end * len(rows))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    return numbers.map(load_row).to_iter_dataset(options).batch(len(rows), drop_remainder=True)
