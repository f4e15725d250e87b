"""The generation engine: batches requests of different lengths, and streams their answers."""

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import cachetools
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.batch import Batch, padding_sample
from dynfocus_jax.errors import SampleError, UserError
from dynfocus_jax.media.video import Clip
from dynfocus_jax.models.llama import Cache
from dynfocus_jax.parallel.sharding import batch_sharding, num_row_shards, place_like, replicated
from dynfocus_jax.serving.answer_text import AnswerText
from dynfocus_jax.serving.batch_layout import BatchLayout, bucket_size, choose_layout
from dynfocus_jax.serving.jobs import Job
from dynfocus_jax.serving.programs import (
    ClipSummary,
    DecodeState,
    FrameFocus,
    make_programs,
    serving_layout,
)
from dynfocus_jax.serving.requests import Completion, EncodedClip, Messages, Request, split_turns
from dynfocus_jax.serving.token_sampling import GREEDY, SamplingParams, check_sampling, stack_sampling
from dynfocus_jax.text.conversation import TEMPLATES, encode_prompt, query_text
from dynfocus_jax.text.tokenizers import Tokenizer
from dynfocus_jax.video_language_model import Prompts, build_model, stage_connector

# Decode steps that are dispatched before the tokens of the first of them are fetched: the device never waits
# for the host
_DISPATCHED = 2

OnToken = Callable[[str, str], None]

T = TypeVar("T")


class BatchAnswers(NamedTuple):
    """Answers to the rows of a batch."""

    index: np.ndarray  # int32 [B], number of the record, -1 for padding rows
    tokens: list[list[int]]  # of each row; none for padding rows
    clips: ClipSummary


class Engine:
    """Answers questions with the model of the last stage of a configuration.

    Every process that has devices of the mesh must make the same calls, and gets the same answers.

    Args:
      config: a whole configuration; the engine's settings are in `config.generation`.
      params: parameters as nested dicts; arrays that already have the layout of `serving_layout` are used
        without a copy.
      tokenizer: the tokenizer of the model (`data.prepare.make_tokenizer`).
      mesh: the devices to run on.

    Raises:
      UserError: parameters of the model are missing, or `config.generation.end_tokens` names a token that is
        not a special token.
    """

    def __init__(self, config: ConfigDict, params: dict, tokenizer: Tokenizer, mesh: Mesh):
        self.config, self.tokenizer, self.mesh = config, tokenizer, mesh
        self._settings, self._template = config.generation, TEMPLATES[config.data.template]
        model, connector = build_model(config), stage_connector(config)
        self._width = config.model.language.width
        self._visual_size = connector.length
        self._reads_query = connector.needs_text_queries or connector.needs_question
        layout, flat = serving_layout(config, mesh), trees.flatten(params)
        missing = sorted(layout.keys() - flat.keys())
        if missing:
            raise UserError(
                f"the checkpoint lacks {len(missing)} parameters of the model, such as {missing[0]}; use a "
                "checkpoint of the run's last stage."
            )
        self._params = trees.unflatten({path: _placed(flat[path], like) for path, like in layout.items()})
        self._end_ids = frozenset({tokenizer.eos_id, *map(self._end_id, self._settings.end_tokens)})
        self._programs = make_programs(model, mesh, self._end_ids, tokenizer.pad_id)
        self._encoded_clips = cachetools.LRUCache(self._settings.cached_clips)
        self.num_frames = self._settings.num_frames or config.evaluation.media_frames
        self._frame_sizes = tuple(self._settings.frames) or tuple(sorted({1, self.num_frames}))

    # ---- Encoding clips ------------------------------------------------------------------------------

    def encode_clip(self, clip: Clip, query: str) -> EncodedClip:
        """Encode a clip as visual tokens, given the text for the text encoder; results are cached.

        Raises:
          SampleError: the clip has more frames than `config.generation.frames` allows.
        """
        ids = tuple(self.tokenizer.encode_query(query, self.config.data.max_query))
        frames = np.ascontiguousarray(clip.frames)
        content = hashlib.blake2b(frames.view(np.uint8).data, digest_size=16).digest()
        key = (content, frames.shape, frames.dtype.str, ids if self._reads_query else None)
        if key in self._encoded_clips:
            return self._encoded_clips[key]
        encoded = self._encode(frames, ids)
        if self._encoded_clips.maxsize:
            self._encoded_clips[key] = encoded
        return encoded

    def query(self, messages: Messages) -> str:
        """Return the text for the text encoder of a conversation (`config.data.text_guidance`)."""
        turns, question = split_turns(messages)
        return query_text([*turns, (question, "")], self.config.data.text_guidance)

    def _encode(self, frames: np.ndarray, query_ids: tuple[int, ...]) -> EncodedClip:
        count = len(frames)
        sample = padding_sample(
            self._frame_size(count),
            self.config.model.vision.image_size,
            max_text=1,  # the text is not used
            max_query=self.config.data.max_query,
            blank=np.zeros(frames.shape[1:], frames.dtype),
        )
        sample.frames[:count] = frames
        sample.frame_mask[:count] = True
        sample.query_tokens[: len(query_ids)] = query_ids
        sample = sample._replace(query_length=np.int32(len(query_ids)))
        batch = jax.tree.map(lambda x: self._replicate(np.asarray(x)[None]), sample)
        tokens, summary = self._programs.encode_clips(self._params, batch)
        summary = jax.device_get(summary)
        focus = summary.focus and FrameFocus(*(each[0, :count] for each in summary.focus))
        return EncodedClip(tokens, int(summary.count[0]), count, focus)

    def _frame_size(self, count: int) -> int:
        """Return the smallest compiled clip length that holds `count` frames."""
        size = next((size for size in self._frame_sizes if size >= count), None)
        if size is None:
            raise SampleError(
                f"the clip has {count} frames, expected at most {self._frame_sizes[-1]}; sample fewer "
                "frames, or raise config.generation.num_frames or the last size in config.generation.frames"
            )
        return size

    # ---- Answering requests --------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], *, on_token: OnToken | None = None) -> list[Completion]:
        """Answer requests; the completions are in the order of the requests.

        The answer to a request does not depend on the other requests, except for the rounding of matrix
        products in batches of different sizes. A request that cannot be answered (its prompt is too long, its
        text has a special token) gets a completion with an `error`; the others are answered.

        on_token: called with a request's id and each new piece of its answer as soon as the text is final.
        """
        started = time.perf_counter()
        completions: dict[int, Completion] = {}
        jobs = []
        for number, request in enumerate(requests):
            try:
                jobs.append(self._job(number, request, on_token))
            except (SampleError, UserError) as error:
                completions[number] = Completion(request.id, error=str(error))
        # Requests of similar length share a batch, which saves padding
        jobs.sort(key=lambda job: (job.visual_size + job.text_size, job.max_tokens))
        for group in _split(jobs, self._settings.batch[-1]):
            self._answer(group)
            completions |= {job.number: job.completion(started) for job in group}
        return [completions[number] for number in range(len(requests))]

    def _job(self, number: int, request: Request, on_token: OnToken | None) -> Job:
        """Check a request and encode its prompt."""
        turns, question = split_turns(request.messages)
        check_sampling(request.sampling, f"request {request.id}")
        max_tokens = request.max_new_tokens
        if max_tokens is None:
            max_tokens = self._settings.max_new_tokens
        if max_tokens < 1:
            raise SampleError(f"max_new_tokens is {max_tokens}, expected at least 1")
        if not all(request.stop):
            raise SampleError("a stop string is empty; remove it")
        prompt = encode_prompt(
            self.tokenizer,
            question,
            self._template,
            turns,
            has_visual=request.clip is not None or request.encoded is not None,
            visual_at_end=request.visual_at_end,
            answer_start=request.answer_start,
        )
        visual_size = 0
        if request.encoded is not None:
            visual_size = request.encoded.tokens.shape[1]
        elif request.clip is not None:
            visual_size = self._visual_size(self._frame_size(len(request.clip.frames)))
        query = self.query(request.messages) if request.query is None else request.query
        on_text = None if on_token is None else lambda text: on_token(request.id, text)
        answer = AnswerText(self.tokenizer.decode, request.stop, on_text)
        text_size = bucket_size(len(prompt.tokens), self._settings.text)
        return Job(number, request, prompt, query, text_size, visual_size, max_tokens, answer)

    def _answer(self, jobs: list[Job]) -> None:
        """Answer a group of requests together: prefill all prompts, then decode all answers."""
        for job in jobs:
            self._encode_job(job)
        jobs = [job for job in jobs if job.running]
        if not jobs:
            return
        prompt_length = max(job.visual_size for job in jobs) + max(job.text_size for job in jobs)
        layout = choose_layout(
            len(jobs), num_row_shards(self.mesh), prompt_length, self._settings.batch, self._settings.prefill
        )
        longest = max(prompt_length, *(job.length for job in jobs))
        state = self._programs.empty_state(layout.decode_size, _cache_length(longest, self._settings.cache))
        rows: dict[int, Job] = {}  # of the decode batch
        first_tokens = []
        for number, group in enumerate(_split(jobs, layout.prefill_size)):
            prefill_rows = {layout.prefill_row(position): job for position, job in enumerate(group)}
            rows |= {layout.decode_row(number, row): job for row, job in prefill_rows.items()}
            state, tokens = self._prefill(state, number, prefill_rows, layout)
            tokens.copy_to_host_async()
            first_tokens.append((prefill_rows, tokens))
        for prefill_rows, tokens in first_tokens:
            self._add_tokens(prefill_rows, np.asarray(tokens))

        def add_tokens(tokens: np.ndarray) -> bool:
            self._add_tokens(rows, tokens)
            return any(job.running for job in jobs)

        if any(job.running for job in jobs):
            self._decode(state, max(job.max_tokens for job in jobs) - 1, add_tokens)

    def _encode_job(self, job: Job) -> None:
        """Encode the clip of a request, and set `job.error` if the request turns out to be too long."""
        request, max_length = job.request, self._settings.max_length
        if request.encoded is not None:
            job.encoded = request.encoded
        elif request.clip is not None:
            job.encoded = self.encode_clip(request.clip, job.query)
        if max_length is not None and job.length > max_length:
            job.error = (
                f"{job.visual_count} visual tokens, {len(job.prompt.tokens)} text tokens and an answer of up "
                f"to {job.max_tokens} tokens exceed config.generation.max_length = {max_length}; shorten the "
                "request or raise the limit"
            )

    def _prefill(
        self, state: DecodeState, number: int, jobs: dict[int, Job], layout: BatchLayout
    ) -> tuple[DecodeState, jax.Array]:
        """Prefill the prompts of `jobs` {row: job} and insert them into the decode batch as prefill `number`.

        Rows without a job are padding. Returns the new state and the first token of each row.
        """
        size = layout.prefill_size
        text_size = max(job.text_size for job in jobs.values())
        visual_size = max(job.visual_size for job in jobs.values())
        tokens = np.full((size, text_size), self.tokenizer.pad_id, np.int32)
        length, position, count, max_tokens = np.zeros((4, size), np.int32)
        length[:] = 1
        no_visual = self._replicate(np.zeros((1, 0, self._width), self.config.model.dtype))
        visuals, sampling = [no_visual] * size, [GREEDY] * size
        for row, job in jobs.items():
            length[row], position[row] = len(job.prompt.tokens), job.prompt.visual_position
            tokens[row, : length[row]] = job.prompt.tokens
            count[row], max_tokens[row] = job.visual_count, job.max_tokens
            visuals[row] = no_visual if job.encoded is None else job.encoded.tokens
            sampling[row] = job.request.sampling
        padded = tuple(_pad_length(each, visual_size) for each in visuals)
        prompts = Prompts(*map(self._shard_rows, (tokens, length, position)))
        logits, cache = self._programs.prefill(self._params, prompts, padded, self._shard_rows(count))
        return self._insert(state, number * layout.prefill_rows, logits, cache, sampling, max_tokens)

    def _insert(
        self,
        state: DecodeState,
        slot: int,
        logits: jax.Array,
        cache: Cache,
        sampling: Sequence[SamplingParams],
        max_tokens: np.ndarray,
    ) -> tuple[DecodeState, jax.Array]:
        return self._programs.insert(
            state,
            self._replicate(np.asarray(slot, np.int32)),
            logits,
            cache,
            self._shard_rows(stack_sampling(sampling)),
            self._shard_rows(max_tokens),
        )

    def _decode(self, state: DecodeState, steps: int, add_tokens: Callable[[np.ndarray], bool]) -> None:
        """Decode up to `steps` tokens of every row; stop when `add_tokens`, called each time, is False."""
        dispatched: deque[jax.Array] = deque()
        for step in range(steps + _DISPATCHED):
            if step < steps:
                state, tokens = self._programs.decode(self._params, state)
                tokens.copy_to_host_async()
                dispatched.append(tokens)
            if step >= _DISPATCHED and not add_tokens(np.asarray(dispatched.popleft())):
                return

    def _add_tokens(self, jobs: dict[int, Job], tokens: np.ndarray) -> None:
        """Append the next token of each row {row: job} to its answer, unless that has ended."""
        for row, job in jobs.items():
            if job.running:
                job.add_token(int(tokens[row]), self._end_ids)

    # ---- Answering a batch of the evaluation ---------------------------------------------------------

    def answer_batch(self, batch: Batch, max_new_tokens: int) -> BatchAnswers:
        """Answer the prompts of a batch that is on the mesh, greedily; all prompts have one padded length."""
        clips, logits, cache = self._programs.encode_and_prefill(self._params, batch)
        rows = len(batch.tokens)
        state = self._programs.empty_state(rows, cache.keys.shape[3] + max_new_tokens)
        index = multihost_utils.process_allgather(batch.index, tiled=True)
        max_tokens = np.where(index < 0, 0, max_new_tokens).astype(np.int32)
        state, first = self._insert(state, 0, logits, cache, [GREEDY] * rows, max_tokens)
        answers: list[list[int]] = [[] for _ in range(rows)]
        ended = index < 0

        def add_tokens(tokens: np.ndarray) -> bool:
            for row in np.flatnonzero(~ended):
                answers[row].append(int(tokens[row]))
                ended[row] = tokens[row] in self._end_ids
            return not ended.all()

        if add_tokens(np.asarray(first)):
            self._decode(state, max_new_tokens - 1, add_tokens)
        return BatchAnswers(index, answers, jax.device_get(clips))

    # ---- Helpers -------------------------------------------------------------------------------------

    def _end_id(self, token: str) -> int:
        """Return the id of a special token."""
        ids = self.tokenizer.encode(token)
        if len(ids) != 1 or ids[0] not in self.tokenizer.special_ids:
            raise UserError(
                f"config.generation.end_tokens: {token!r} is not a special token of the tokenizer; use "
                "one of its special tokens, or remove it."
            )
        return ids[0]

    def _replicate(self, x: np.ndarray) -> jax.Array:
        """Copy an array to every device."""
        return _global_array(x, replicated(self.mesh))

    def _shard_rows(self, tree: Any) -> Any:
        """Split numpy arrays [R, ...] by rows over the devices."""
        return jax.tree.map(lambda x: _global_array(x, batch_sharding(self.mesh)), tree)


def _global_array(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index]))


def _placed(leaf: np.ndarray | jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Return a parameter in the dtype and layout of `like`; without a copy if it has them already."""
    if isinstance(leaf, jax.Array) and (leaf.dtype, leaf.sharding) == (like.dtype, like.sharding):
        return leaf
    return place_like(leaf, like)


def _split(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _cache_length(needed: int, unit: int) -> int:
    """Return the first of 1, 2, 3, 4, 6, 8, 12, 16, ... units that holds `needed` positions.

    Each length compiles a decode program; these keep both the programs and the padding few.
    """
    lengths = (unit * (half << power) // 2 for power in itertools.count() for half in (2, 3))
    return next(length for length in lengths if length >= needed and length % unit == 0)


def _pad_length(tokens: jax.Array, size: int) -> jax.Array:
    """Pad visual tokens [1, Lv, D] to `size` tokens; those that have it are not copied."""
    padding = size - tokens.shape[1]
    return jnp.pad(tokens, ((0, 0), (0, padding), (0, 0))) if padding else tokens
