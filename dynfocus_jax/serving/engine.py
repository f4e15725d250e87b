"""The generation engine: questions about clips in, answers out, several at a time, streamed if wanted."""

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import cachetools
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.batch import Batch, padding_sample
from dynfocus_jax.errors import SampleError, UserError
from dynfocus_jax.media.video import Clip
from dynfocus_jax.parallel.sharding import batch_sharding, place, replicated, row_shares
from dynfocus_jax.serving.answer_text import AnswerText
from dynfocus_jax.serving.programs import Look, State, make_programs, serving_layout
from dynfocus_jax.serving.requests import Completion, Messages, Request, Visual, turns_of
from dynfocus_jax.serving.token_sampling import GREEDY, as_rows, check_sampling
from dynfocus_jax.text.conversation import TEMPLATES, Conversation, encode_prompt, query_text
from dynfocus_jax.video_language_model import Prompts, build_model, stage_connector

_AHEAD = 2  # tokens that are computed before the first of them is read: the device never waits for the host

OnToken = Callable[[str, str], None]


@dataclass
class _Job:
    """A request on its way."""

    number: int  # of the request
    request: Request
    prompt: Conversation
    query: str  # what the text encoder reads
    text_size: int  # to which the text is padded
    visual_size: int  # the same of the visual tokens
    limit: int  # most new tokens
    answer: AnswerText
    visual: Visual | None = None
    reason: str | None = None  # why the answer ended, or cannot be begun
    text: str = ""  # of an answer that has ended
    times: list[float] = field(default_factory=list)  # of the first and the latest token

    @property
    def visual_count(self) -> int:
        return 0 if self.visual is None else self.visual.count


class BatchAnswers(NamedTuple):
    """Answers to a batch: its `index [B]`, answers (none for padding rows) and encoded clips."""

    index: np.ndarray
    tokens: list[list[int]]
    look: Look


class Engine:
    """Answers questions with a trained model, the one of the last stage.

    Every process that has devices of the mesh makes the same calls, and gets the same answers.

    Args:
      config: a whole configuration; `config.generation` has the engine's settings.
      params: parameters, nested dicts; those that lie as `serving_layout` says are taken as they are.
      tokenizer: see `data.prepare.make_tokenizer`.
      mesh: its devices.
    """

    def __init__(self, config: ConfigDict, params: dict, tokenizer, mesh: Mesh):
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
                f"the checkpoint lacks {len(missing)} parameters of the model, the first is {missing[0]}; "
                "name one of the stage that was trained last."
            )
        self._params = trees.unflatten({path: _placed(flat[path], like) for path, like in layout.items()})
        self._ends = frozenset({tokenizer.eos_id, *map(self._end_id, self._settings.end_tokens)})
        self._programs = make_programs(model, mesh, self._ends, tokenizer.pad_id)
        self._looks = cachetools.LRUCache(self._settings.cached_clips)
        self.num_frames = self._settings.num_frames or config.evaluation.media_frames
        self._frame_sizes = tuple(self._settings.frames) or tuple(sorted({1, self.num_frames}))

    # ---- Looking -------------------------------------------------------------------------------------

    def look(self, clip: Clip, prompt: str) -> Visual:
        """The visual tokens of a clip for what the text encoder reads; kept for the next time.

        Raises:
          SampleError: the clip has more frames than `config.generation.frames` allows.
        """
        ids = tuple(self.tokenizer.encode_query(prompt, self.config.data.max_query))
        frames = np.ascontiguousarray(clip.frames)
        content = hashlib.blake2b(frames.view(np.uint8).data, digest_size=16).digest()
        key = (content, frames.shape, frames.dtype.str, ids if self._reads_query else None)
        if key in self._looks:
            return self._looks[key]
        visual = self._look(frames, ids)
        if self._looks.maxsize:
            self._looks[key] = visual
        return visual

    def query(self, messages: Messages) -> str:
        """Return the text encoder's input for a conversation, as `config.data.text_guidance` says."""
        turns, question = turns_of(messages)
        return query_text([*turns, (question, "")], self.config.data.text_guidance)

    def _look(self, frames: np.ndarray, ids: tuple[int, ...]) -> Visual:
        count = len(frames)
        blank = np.zeros(frames.shape[1:], frames.dtype)
        size = self.config.model.vision.image_size
        sample = padding_sample(
            self._frame_size(count), size, 1, self.config.data.max_query, blank=blank
        )  # the text is not read
        sample.frames[:count] = frames
        sample.frame_mask[:count] = True
        sample.query_tokens[: len(ids)] = ids
        sample = sample._replace(query_length=np.int32(len(ids)))
        batch = jax.tree.map(lambda x: self._same(np.asarray(x)[None]), sample)
        look = self._programs.look(self._params, batch)
        tokens, look = look.tokens, jax.device_get(look._replace(tokens=None))
        of_frames = (look.focus, look.scores, look.frame_tokens)
        return Visual(
            tokens,
            int(look.count[0]),
            count,
            *(None if each is None else each[0, :count] for each in of_frames),
        )

    def _frame_size(self, count: int) -> int:
        fitting = [size for size in self._frame_sizes if size >= count]
        if not fitting:
            raise SampleError(
                f"the clip has {count} frames, over the {self._frame_sizes[-1]} of config.generation: read "
                "fewer, or raise num_frames"
            )
        return fitting[0]

    # ---- Answering -----------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], *, on_token: OnToken | None = None) -> list[Completion]:
        """The answers, in the order of the requests.

        on_token: called with a request's id and the next piece of its text as soon as it is known.

        What cannot be answered (too long, a special token in the text) is a completion with an `error`.
        Requests that are answered together are independent of each other: each answer is what it would be
        alone, as far as the rounding of the matrix products of a larger batch allows.
        """
        started = time.perf_counter()
        completions: dict[int, Completion] = {}
        jobs = []
        for number, request in enumerate(requests):
            try:
                jobs.append(self._job(number, request, on_token))
            except (SampleError, UserError) as error:
                completions[number] = Completion(request.id, error=str(error))
        jobs.sort(key=lambda job: (job.visual_size + job.text_size, job.limit))  # like beside like
        for group in _parts(jobs, self._settings.batch[-1]):
            self._answer(group)
            completions |= {job.number: self._completion(job, started) for job in group}
        return [completions[number] for number in range(len(requests))]

    def _job(self, number: int, request: Request, on_token: OnToken | None) -> _Job:
        turns, question = turns_of(request.messages)
        check_sampling(request.sampling, f"request {request.id}")
        limit = self._settings.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        if limit < 1 or not all(request.stop):
            raise SampleError("max_new_tokens is less than 1 or a stop string is empty: correct the request")
        has_visual = request.clip is not None or request.visual is not None
        prompt = encode_prompt(
            self.tokenizer,
            question,
            self._template,
            turns,
            has_visual=has_visual,
            visual_at_end=request.visual_at_end,
            answer_start=request.answer_start,
        )
        visual_size = 0
        if request.visual is not None:
            visual_size = request.visual.tokens.shape[1]
        elif request.clip is not None:
            visual_size = self._visual_size(self._frame_size(len(request.clip.frames)))
        query = self.query(request.messages) if request.query is None else request.query
        piece = on_token and (lambda text: on_token(request.id, text))
        answer = AnswerText(self.tokenizer.decode, request.stop, piece)
        text_size = _size(len(prompt.tokens), self._settings.text)
        return _Job(number, request, prompt, query, text_size, visual_size, limit, answer)

    def _answer(self, jobs: list[_Job]) -> None:
        """Answer a group together."""
        jobs = [job for job in jobs if self._is_short_enough(job)]
        if not jobs:
            return
        shares, sizes = row_shares(self.mesh), self._settings.batch
        slots = -(-_size(len(jobs), sizes) // shares)  # rows of each share
        longest = max(job.visual_size for job in jobs) + max(job.text_size for job in jobs)
        together = max(  # rows of each share whose prompts are read at a time
            size
            for size in {1, *sizes}
            if size == 1
            or (slots % size == 0 and size <= len(jobs) / shares and size * longest <= self._settings.prefill)
        )
        whole = max(job.visual_count + len(job.prompt.tokens) + job.limit for job in jobs)
        needed = max(longest, whole)
        state = self._programs.empty(shares * slots, _cache_length(needed, self._settings.cache))
        seats: dict[int, _Job] = {}  # by row
        firsts = []
        for number, part in enumerate(_parts(jobs, shares * together)):
            rows = {i % shares * together + i // shares: job for i, job in enumerate(part)}
            start = number * together
            seats |= {row // together * slots + start + row % together: job for row, job in rows.items()}
            state, tokens = self._admit(state, start, rows, shares * together)
            tokens.copy_to_host_async()
            firsts.append((rows, tokens))
        for rows, tokens in firsts:
            tokens = np.asarray(tokens)
            for row, job in rows.items():
                self._take(job, int(tokens[row]))

        def take(tokens: np.ndarray) -> bool:
            for row, job in seats.items():
                if job.reason is None:
                    self._take(job, int(tokens[row]))
            return any(job.reason is None for job in jobs)

        if any(job.reason is None for job in jobs):
            self._decode(state, max(job.limit for job in jobs) - 1, take)

    def _is_short_enough(self, job: _Job) -> bool:
        """Look at the clip; False for a job that is too long then, which has its reason."""
        request, most = job.request, self._settings.max_length
        if request.visual is not None or request.clip is not None:
            job.visual = request.visual or self.look(request.clip, job.query)
        total = job.visual_count + len(job.prompt.tokens) + job.limit
        if most is not None and total > most:
            job.reason = (
                f"{job.visual_count} visual and {len(job.prompt.tokens)} text tokens and an answer of up to "
                f"{job.limit} are over the {most} of config.generation.max_length"
            )
        return job.reason is None

    def _admit(self, state: State, slot: int, jobs: dict[int, _Job], rows: int) -> tuple[State, jax.Array]:
        """Read prompts, each in its row of so many (the others are padding), and gives them their seats."""
        text_size = max(job.text_size for job in jobs.values())
        visual_size = max(job.visual_size for job in jobs.values())
        tokens = np.full((rows, text_size), self.tokenizer.pad_id, np.int32)
        length, position, count, limit = np.zeros((4, rows), np.int32)
        length[:] = 1
        none = self._same(np.zeros((1, 0, self._width), self.config.model.dtype))
        visuals, settings = [none] * rows, [GREEDY] * rows
        for row, job in jobs.items():
            length[row], position[row] = len(job.prompt.tokens), job.prompt.visual_position
            tokens[row, : length[row]] = job.prompt.tokens
            count[row], limit[row] = job.visual_count, job.limit
            visuals[row] = none if job.visual is None else job.visual.tokens
            settings[row] = job.request.sampling
        visuals = tuple(_lengthened(each, visual_size) for each in visuals)
        prompts = self._rows(Prompts(tokens, length, position))
        logits, cache = self._programs.read(self._params, prompts, visuals, self._rows(count))
        return self._programs.admit(
            state, self._same(np.int32(slot)), logits, cache, self._rows(as_rows(settings)), self._rows(limit)
        )

    def _decode(self, state: State, most: int, take: Callable[[np.ndarray], bool]) -> None:
        """Decode up to `most` tokens of every row, which `take` gets until it wants no more."""
        computed: deque[jax.Array] = deque()
        for step in range(most + _AHEAD):
            if step < most:
                state, tokens = self._programs.decode(self._params, state)
                tokens.copy_to_host_async()
                computed.append(tokens)
            if step >= _AHEAD and not take(np.asarray(computed.popleft())):
                return

    def _take(self, job: _Job, token: int) -> None:
        """The next token of an answer."""
        job.times[1:] = [time.perf_counter()]
        job.answer.add(token)
        if token in self._ends or job.answer.stopped:
            job.reason = "stop"
        elif len(job.answer.tokens) == job.limit:
            job.reason = "length"
        if job.reason is not None:
            job.text = job.answer.finish()

    def _completion(self, job: _Job, started: float) -> Completion:
        if not job.times:
            return Completion(job.request.id, error=job.reason)
        count, (first, last) = len(job.answer.tokens), (job.times[0], job.times[-1])
        return Completion(
            job.request.id,
            job.text,
            tuple(job.answer.tokens),
            job.reason,
            job.visual_count,
            len(job.prompt.tokens),
            first - started,
            (count - 1) / (last - first) if count > 1 else None,
        )

    def answer_batch(self, batch: Batch, max_new_tokens: int) -> BatchAnswers:
        """Greedy answers to prompts of one shape that are read together: a batch that lies on the mesh."""
        look, logits, cache = self._programs.prefill(self._params, batch)
        rows = len(batch.tokens)
        state = self._programs.empty(rows, cache.keys.shape[3] + max_new_tokens)
        index = multihost_utils.process_allgather(batch.index, tiled=True)
        settings, limit = as_rows([GREEDY] * rows), np.where(index < 0, 0, max_new_tokens).astype(np.int32)
        state, first = self._programs.admit(
            state, self._same(np.int32(0)), logits, cache, self._rows(settings), self._rows(limit)
        )
        answers, ended = [[] for _ in range(rows)], index < 0

        def take(tokens: np.ndarray) -> bool:
            for row in np.flatnonzero(~ended):
                answers[row].append(int(tokens[row]))
                ended[row] = tokens[row] in self._ends
            return not ended.all()

        if take(np.asarray(first)):
            self._decode(state, max_new_tokens - 1, take)
        return BatchAnswers(index, answers, jax.device_get(look))

    # ---- Small things --------------------------------------------------------------------------------

    def _end_id(self, token: str) -> int:
        ids = self.tokenizer.encode(token)
        if len(ids) != 1 or ids[0] not in self.tokenizer.special_ids:
            raise UserError(
                f"config.generation.end_tokens has {token!r}, which is not a special token of the tokenizer."
            )
        return ids[0]

    def _same(self, x: np.ndarray) -> jax.Array:
        """An array of which every device has a copy."""
        return _global(x, replicated(self.mesh))

    def _rows(self, tree):
        """Arrays [R, ...], rows over the devices."""
        return jax.tree.map(lambda x: _global(x, batch_sharding(self.mesh)), tree)


def _global(x: np.ndarray, sharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index]))


def _placed(leaf, like: jax.ShapeDtypeStruct) -> jax.Array:
    same = isinstance(leaf, jax.Array) and (leaf.dtype, leaf.sharding) == (like.dtype, like.sharding)
    return leaf if same else place(leaf, like)


def _parts(items: list, size: int) -> Iterator[list]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _size(count: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending sizes that holds `count`; of none the next multiple of the last."""
    return next((size for size in sizes if size >= count), -(-count // sizes[-1]) * sizes[-1])


def _cache_length(needed: int, unit: int) -> int:
    """A length of at least `needed`: 1, 2, 3, 4, 6, 8, 12, 16, ... units, so that there are few of them."""
    lengths = (unit * (half << power) // 2 for power in itertools.count() for half in (2, 3))
    return next(length for length in lengths if length >= needed and length % unit == 0)


def _lengthened(tokens: jax.Array, size: int) -> jax.Array:
    return (
        tokens if tokens.shape[1] == size else jnp.pad(tokens, ((0, 0), (0, size - tokens.shape[1]), (0, 0)))
    )
