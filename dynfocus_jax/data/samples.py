"""One sample: a record's text as tokens and its file as frames, in the shape of a bucket."""

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


class Change(NamedTuple):
    """Part of a sample that was left out because the sample was too long."""

    what: str  # "turns" | "frames" | "subtitles"
    action: str  # in a few words, with numbers


class Loaded(NamedTuple):
    """A sample, or a padding row in place of one that cannot be used."""

    sample: Batch  # without the leading axis
    record: int  # its number; -1 for a row that was padding from the start
    reason: str | None = None  # why it cannot be used
    changes: tuple[Change, ...] = ()


class SampleLoader:
    """Reads samples: `loader(number, rng, bucket)` gives a Batch without the leading axis, and its Changes.

    media: reads the files; budget: shapes and lengths; max_query: Lq of the batch.
    guidance: what the text encoder reads, see `query_text`; with "each_turn" every turn of a record is a
      sample, which has the turns before it as its history, and its own answer to learn.
    prompt_only: tokens end where the last answer starts (evaluation); a sample is a record then.
    max_turns: use so many turns, drawn and ordered by `rng`; None keeps all in their order.

    A query longer than max_query keeps its last tokens, as the published text encoder cuts on the left.
    Raises MediaError or SampleError for a sample that cannot be used.
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
        self.records, self.media, self.budget = records, media, budget
        self._tokenizer, self._template, self._max_query = tokenizer, template, max_query
        self._guidance, self._prompt_only, self._max_turns = guidance, prompt_only, max_turns
        self.each_turn = guidance == "each_turn" and not prompt_only
        turns = [len(record.turns) if self.each_turn else 1 for record in records]
        self._firsts = np.cumsum([0, *turns])  # the first sample of each record

    def __len__(self) -> int:
        """The number of samples."""
        return int(self._firsts[-1])

    def record_of(self, number: int) -> int:
        """The number of a sample's record."""
        return int(np.searchsorted(self._firsts, number, side="right")) - 1

    def samples_of(self, records: np.ndarray) -> np.ndarray:
        """The samples of records, int64 `[records] -> [samples]`."""
        firsts, counts = self._firsts[records], np.diff(self._firsts)[records]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(firsts, counts) + inside

    def text_ends(self, record: int) -> tuple[int, ...]:
        """Text tokens of a record's conversation cut after each of its turns.

        Of turns that are drawn those are taken that have the longest text.
        """
        turns = self.records[record].turns
        if self._max_turns is not None and len(turns) > self._max_turns:
            turns = sorted(turns, key=lambda turn: -len(self._tokenizer.encode(" ".join(turn))))
        conversation = self._encode(self.records[record], turns[: self._max_turns])
        return conversation.ends or (len(conversation.tokens),)

    def padding(self, bucket: int = 0) -> Loaded:
        """A padding row of a bucket's shape."""
        frames, text = self.budget.buckets[bucket]
        sample = padding_sample(
            *(frames, self.media.size, text, self._max_query, self._tokenizer.pad_id),
            max_subtitle=self.budget.max_subtitle,
            blank=self.media.blank,
        )
        # The text encoder may have its own, smaller vocabulary: 0 is an id of every one.
        return Loaded(sample._replace(query_tokens=np.zeros_like(sample.query_tokens)), record=-1)

    def load(self, number: int, rng: np.random.Generator, bucket: int = 0) -> Loaded:
        """A sample, or why it cannot be used."""
        record = self.record_of(number)
        try:
            sample, changes = self(number, rng, bucket)
        except (MediaError, SampleError) as error:
            return self.padding(bucket)._replace(record=record, reason=str(error))
        return Loaded(sample, record, changes=changes)

    def __call__(
        self, number: int, rng: np.random.Generator, bucket: int = 0
    ) -> tuple[Batch, tuple[Change, ...]]:
        index = self.record_of(number)
        record = self.records[index]
        chosen = np.arange(number - self._firsts[index] + 1 if self.each_turn else len(record.turns))
        if self._max_turns is not None:
            chosen = rng.permutation(chosen)[: self._max_turns]
        turns = [record.turns[i] for i in chosen]
        conversation = self._encode(record, turns)
        clip, changes = self._look(record, conversation, bucket, rng)
        count = 0 if clip is None else len(clip.frames)
        length, room = len(conversation.tokens), self.budget.text_room(count, bucket)
        if length > room:
            kept = self._turns_within(conversation, room)
            if not kept:
                raise self.budget.overflow(length, count, bucket)
            changes += (Change("turns", f"dropped {len(turns) - kept} of {len(turns)} turns"),)
            chosen, turns = chosen[:kept], turns[:kept]
            conversation = self._encode(record, turns)
            length = len(conversation.tokens)

        query = self._tokenizer.encode_query(query_text(turns, self._guidance), self._max_query)
        sample = self.padding(bucket).sample  # fresh arrays, filled from the left
        if clip is not None:
            sample.frames[:count] = clip.frames
            sample.frame_mask[:count] = True
            needles = [frame for i in chosen if record.needle_frames for frame in record.needle_frames[i]]
            sample.oracle_frames[:count] = np.isin(clip.indices, needles)
            spoken, spoken_in, left_out = self.subtitles(record, clip.times)
            sample.subtitles[: len(spoken)] = spoken
            sample.subtitle_frames[: len(spoken)] = spoken_in
            changes += left_out
        sample.query_tokens[: len(query)] = query
        sample.tokens[:length] = conversation.tokens
        sample.loss_mask[:length] = conversation.loss_mask
        sample = sample._replace(
            query_length=np.int32(len(query)),
            length=np.int32(length),
            visual_position=np.int32(conversation.visual_position),
            index=np.int32(index),
        )
        return sample, changes

    def subtitles(self, record: Record, times: np.ndarray) -> tuple[list[int], list[int], tuple[Change, ...]]:
        """Tokens of a record's subtitles, the frame of each, and what was left out; times: of its frames.

        Raises MediaError or SampleError where they cannot be used, or are too long with on_overflow "error".
        """
        room, encode = self.budget.max_subtitle, self._tokenizer.encode
        if not room:
            return [], [], ()
        assigned = assign_subtitles(self.media.subtitles(record), times, record.span)
        tokens, frames, kept = tokenize_subtitles(assigned, encode, room)
        if not self._tokenizer.special_ids.isdisjoint(tokens):
            raise SampleError("the subtitles contain a special token: remove it")
        total = sum(map(len, assigned))
        if kept == total:
            return tokens, frames, ()
        if self.budget.on_overflow == "error":
            raise SampleError(
                f"the {total} subtitles have more than the {room} text tokens of max_subtitle: raise it, or "
                "choose another on_overflow"
            )
        return tokens, frames, (Change("subtitles", f"kept {kept} of {total} subtitles"),)

    def _encode(self, record: Record, turns: _Turns) -> Conversation:
        options = {"has_visual": record.media is not None, "visual_at_end": record.visual_at_end}
        if self._prompt_only:
            question = turns[-1][0]
            return encode_prompt(self._tokenizer, question, self._template, turns[:-1], **options)
        learn = "last" if self.each_turn else "all"
        return encode_conversation(self._tokenizer, turns, self._template, learn=learn, **options)

    def _turns_within(self, conversation: Conversation, room: int) -> int:
        """Return the number of turns that fit; 0 if none may be dropped, or none fits."""
        return sum(end <= room for end in conversation.ends) if self._may_drop else 0

    @property
    def _may_drop(self) -> bool:
        return self.budget.on_overflow == "drop_turns" and not self._prompt_only and not self.each_turn

    def _look(
        self, record: Record, conversation: Conversation, bucket: int, rng: np.random.Generator
    ) -> tuple[Clip | None, tuple[Change, ...]]:
        """The frames of a record, fewer where the budget wants it; nothing is decoded in vain."""
        length, least = len(conversation.tokens), int(record.media is not None)
        needed = conversation.ends[0] if self._may_drop else length
        if needed > self.budget.text_room(least, bucket):
            raise self.budget.overflow(length, least, bucket)
        if record.media is None:
            return None, ()
        if self.budget.on_overflow != "fewer_frames":
            return self.media.read(record, self.budget.buckets[bucket][0], rng), ()
        limit, most = self.budget.frame_room(length, bucket), self.budget.max_frames
        clip = self.media.read(record, limit, rng)
        if len(clip.frames) < limit or limit == most or record.modality == "image":
            return clip, ()
        full = self.media.count(self.media.info(record.media), record, most)
        change = Change("frames", f"read {len(clip.frames)} of {full} frames")
        return clip, (change,) if full > len(clip.frames) else ()
