"""Samples: the text of a record as tokens and its file as frames, in the shape of a bucket."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dynfocus_jax.batch import Batch, padding_sample
from dynfocus_jax.data.budget import Budget
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.errors import MediaError, SampleError
from dynfocus_jax.media.subtitles import assign_subtitles, tokenize_subtitles
from dynfocus_jax.media.video import Clip
from dynfocus_jax.records.records import Record
from dynfocus_jax.text.conversation import (
    Conversation,
    Template,
    encode_conversation,
    encode_prompt,
    query_text,
)
from dynfocus_jax.text.tokenizers import Tokenizer

_Turns = Sequence[tuple[str, str]]


class Omission(NamedTuple):
    """A part of a sample that was left out because the sample was too long."""

    part: str  # "turns" | "frames" | "subtitles"
    action: str  # a few words with numbers, such as "dropped 1 of 3 turns"


class LoadedSample(NamedTuple):
    """A sample, or a padding row in place of one that cannot be used."""

    sample: Batch  # without the leading axis
    record: int  # number of the record; -1 for a padding row of the batch
    reason: str | None = None  # why the sample cannot be used
    omissions: tuple[Omission, ...] = ()


class SampleLoader:
    """Loads samples. Safe to use from several threads.

    Attributes:
      records: the records of the samples.
      media: reads the files of the records.
      budget: shapes of batches and lengths of samples.
      each_turn: whether each turn of a record is a sample of its own.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Tokenizer,
        template: Template,
        media: MediaReader,
        budget: Budget,
        *,
        max_query: int,
        guidance: str = "joined",
        prompt_only: bool = False,
        max_turns: int | None = None,
    ):
        """Create a loader.

        Args:
          records, media, budget: see the attributes.
          tokenizer: tokenizer of the language model, and of queries to the text encoder.
          template: text around the turns of a conversation.
          max_query: Lq, number of query tokens. A longer query keeps its last tokens, as the published text
            encoder truncates on the left.
          guidance: text that the text encoder reads, see `query_text`. With "each_turn", each turn of a
            record is a sample, whose history is the turns before it and whose loss covers its own answer.
          prompt_only: end the tokens where the last answer starts (evaluation); then a record is one sample.
          max_turns: number of turns of a sample, chosen and ordered at random; None keeps all turns in order.
        """
        self.records, self.media, self.budget = records, media, budget
        self._tokenizer, self._template, self._max_query = tokenizer, template, max_query
        self._guidance, self._prompt_only, self._max_turns = guidance, prompt_only, max_turns
        self.each_turn = guidance == "each_turn" and not prompt_only
        turns = [len(record.turns) if self.each_turn else 1 for record in records]
        self._firsts = np.cumsum([0, *turns])  # first sample of each record

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self._firsts[-1])

    def record_number(self, sample: int) -> int:
        """Return the number of the record of a sample."""
        return int(np.searchsorted(self._firsts, sample, side="right")) - 1

    def sample_numbers(self, records: np.ndarray) -> np.ndarray:
        """Return the numbers of the samples of records, int64 [records] -> [samples]."""
        firsts, counts = self._firsts[records], np.diff(self._firsts)[records]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(firsts, counts) + inside

    def text_ends(self, record: int) -> tuple[int, ...]:
        """Return the number of text tokens of a record's conversation up to the end of each turn.

        With `max_turns`, these are the turns with the longest text, an upper bound for any choice of turns.

        Raises:
          SampleError: if the conversation cannot be encoded.
        """
        turns: _Turns = self.records[record].turns
        if self._max_turns is not None and len(turns) > self._max_turns:
            turns = sorted(turns, key=lambda turn: -len(self._tokenizer.encode(" ".join(turn))))
        conversation = self._encode(self.records[record], turns[: self._max_turns])
        return conversation.ends or (len(conversation.tokens),)

    def padding(self, bucket: int = 0) -> LoadedSample:
        """Return a padding row in the shape of a bucket."""
        frames, text = self.budget.buckets[bucket]
        sample = padding_sample(
            *(frames, self.media.size, text, self._max_query, self._tokenizer.pad_id),
            max_subtitle=self.budget.max_subtitle,
            blank=self.media.blank,
        )
        # The text encoder may have a smaller vocabulary of its own; 0 is an id of any vocabulary.
        return LoadedSample(sample._replace(query_tokens=np.zeros_like(sample.query_tokens)), record=-1)

    def load(self, number: int, rng: np.random.Generator, bucket: int = 0) -> LoadedSample:
        """Return a sample in the shape of a bucket, or a padding row with the reason why it is skipped."""
        record = self.record_number(number)
        try:
            sample, omissions = self(number, rng, bucket)
        except (MediaError, SampleError) as error:
            return self.padding(bucket)._replace(record=record, reason=str(error))
        return LoadedSample(sample, record, omissions=omissions)

    def __call__(
        self, number: int, rng: np.random.Generator, bucket: int = 0
    ) -> tuple[Batch, tuple[Omission, ...]]:
        """Return a sample in the shape of a bucket, without the leading axis, and the parts it lost.

        Raises:
          MediaError: if the file of the record cannot be read.
          SampleError: if the sample does not fit the budget, or its text cannot be encoded.
        """
        index = self.record_number(number)
        record = self.records[index]
        chosen = np.arange(number - self._firsts[index] + 1 if self.each_turn else len(record.turns))
        if self._max_turns is not None:
            chosen = rng.permutation(chosen)[: self._max_turns]
        turns = [record.turns[i] for i in chosen]
        conversation = self._encode(record, turns)
        clip, omissions = self._read_frames(record, conversation, bucket, rng)
        count = 0 if clip is None else len(clip.frames)
        length, room = len(conversation.tokens), self.budget.text_room(count, bucket)
        if length > room:
            kept = sum(end <= room for end in conversation.ends) if self._may_drop_turns else 0
            if not kept:
                raise self.budget.overflow_error(length, count, bucket)
            omissions += (Omission("turns", f"dropped {len(turns) - kept} of {len(turns)} turns"),)
            chosen, turns = chosen[:kept], turns[:kept]
            conversation = self._encode(record, turns)
            length = len(conversation.tokens)

        query = self._tokenizer.encode_query(query_text(turns, self._guidance), self._max_query)
        sample = self.padding(bucket).sample  # new arrays, filled from the left
        if clip is not None:
            sample.frames[:count] = clip.frames
            sample.frame_mask[:count] = True
            needles = [frame for i in chosen if record.needle_frames for frame in record.needle_frames[i]]
            sample.oracle_frames[:count] = np.isin(clip.indices, needles)
            tokens, frames, omitted = self.subtitles(record, clip.times)
            sample.subtitles[: len(tokens)] = tokens
            sample.subtitle_frames[: len(tokens)] = frames
            omissions += omitted
        sample.query_tokens[: len(query)] = query
        sample.tokens[:length] = conversation.tokens
        sample.loss_mask[:length] = conversation.loss_mask
        sample = sample._replace(
            query_length=np.int32(len(query)),
            length=np.int32(length),
            visual_position=np.int32(conversation.visual_position),
            index=np.int32(index),
        )
        return sample, omissions

    def subtitles(
        self, record: Record, times: np.ndarray
    ) -> tuple[list[int], list[int], tuple[Omission, ...]]:
        """Return the tokens of a record's subtitles, the frame of each token, and what was left out.

        Args:
          record: the record.
          times: times of the sample's frames, seconds [T].

        Raises:
          MediaError: if the subtitles cannot be read.
          SampleError: if they hold a special token, or are too long and `on_overflow` is "error".
        """
        room, encode = self.budget.max_subtitle, self._tokenizer.encode
        if not room:
            return [], [], ()
        assigned = assign_subtitles(self.media.subtitles(record), times.tolist(), record.span)
        tokens, frames, kept = tokenize_subtitles(assigned, encode, room)
        if not self._tokenizer.special_ids.isdisjoint(tokens):
            raise SampleError("the subtitles contain a special token; remove it")
        total = sum(map(len, assigned))
        if kept == total:
            return tokens, frames, ()
        if self.budget.on_overflow == "error":
            raise SampleError(
                f"the {total} subtitles have more than the {room} text tokens of max_subtitle; raise "
                "max_subtitle, or use another on_overflow"
            )
        return tokens, frames, (Omission("subtitles", f"kept {kept} of {total} subtitles"),)

    def _encode(self, record: Record, turns: _Turns) -> Conversation:
        has_visual, at_end = record.media is not None, record.visual_at_end
        if self._prompt_only:
            return encode_prompt(
                self._tokenizer,
                turns[-1][0],
                self._template,
                turns[:-1],
                has_visual=has_visual,
                visual_at_end=at_end,
            )
        return encode_conversation(
            self._tokenizer,
            turns,
            self._template,
            has_visual=has_visual,
            visual_at_end=at_end,
            learn="last" if self.each_turn else "all",
        )

    @property
    def _may_drop_turns(self) -> bool:
        return self.budget.on_overflow == "drop_turns" and not self._prompt_only and not self.each_turn

    def _read_frames(
        self, record: Record, conversation: Conversation, bucket: int, rng: np.random.Generator
    ) -> tuple[Clip | None, tuple[Omission, ...]]:
        """Return the frames of a record, fewer if the budget asks for it; None for a text-only record.

        Raises:
          MediaError: if the file cannot be read.
          SampleError: if the text is too long with any number of frames; then no file is decoded.
        """
        length, min_frames = len(conversation.tokens), int(record.media is not None)
        needed = conversation.ends[0] if self._may_drop_turns else length
        if needed > self.budget.text_room(min_frames, bucket):
            raise self.budget.overflow_error(length, min_frames, bucket)
        if record.media is None:
            return None, ()
        if self.budget.on_overflow != "fewer_frames":
            return self.media.read(record, self.budget.buckets[bucket][0], rng), ()
        limit, max_frames = self.budget.frame_room(length, bucket), self.budget.max_frames
        clip = self.media.read(record, limit, rng)
        if len(clip.frames) < limit or limit == max_frames or record.modality == "image":
            return clip, ()
        full = self.media.count_frames(self.media.info(record.media), record, max_frames)
        omission = Omission("frames", f"read {len(clip.frames)} of {full} frames")
        return clip, (omission,) if full > len(clip.frames) else ()
