"""The questions of one process, answered batch by batch; every one of them gets an entry."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

from dynfocus_jax.errors import MediaError, SampleError
from dynfocus_jax.evaluation.grading import grade_one
from dynfocus_jax.evaluation.predictions import Predictions
from dynfocus_jax.evaluation.question_prompts import Clips, guidance_of, prompt_of
from dynfocus_jax.evaluation.questions import Question
from dynfocus_jax.media.video import Clip
from dynfocus_jax.serving.engine import Completion, Request


class Answerer(Protocol):
    """The part of `serving.engine.Engine` that answering needs."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """An answer for each request, in their order."""


class Progress(NamedTuple):
    """Numbers of questions processed so far."""

    answered: int = 0
    failed: int = 0


def share_of(questions: Sequence[Question], process: int, processes: int) -> list[Question]:
    """The questions of a process: those about the same video are together, and nobody else has them.

    It depends on all questions, not on what is answered already, so no two runs or processes overlap.
    """
    videos = {path: number for number, path in enumerate(dict.fromkeys(q.media for q in questions))}
    mine = [question for question in questions if videos[question.media] % processes == process]
    return sorted(mine, key=lambda question: videos[question.media])


def answer(
    benchmark: str,
    questions: Sequence[Question],
    engine: Answerer,
    clips: Clips,
    settings: Mapping,
    predictions: Predictions,
    *,
    batch_size: int,
    threads: int,
    progress: Callable[[Progress], None] = lambda done: None,
) -> Progress:
    """Answer those of `questions` that have no answer yet, and add an entry for each.

    settings: the benchmark's section of configs/benchmarks.py. What cannot be read or answered gets an entry
    without a prediction, with its reason.
    """
    done = Progress()

    def add(question: Question, prediction: str | None, reason: str = "", **more) -> None:
        nonlocal done
        predictions.add(entry_of(benchmark, question, prediction, reason) | more)
        done = Progress(done.answered + (prediction is not None), done.failed + (prediction is None))
        progress(done)

    def answer_batch(batch: list[tuple[Question, Request]]) -> None:
        completions = engine.generate([request for _, request in batch])
        for (question, _), completion in zip(batch, completions, strict=True):
            if completion.finish_reason == "error":
                add(question, None, completion.error or "the model gave no answer")
            else:
                counts = {
                    "visual_tokens": completion.visual_tokens,
                    "prompt_tokens": completion.prompt_tokens,
                }
                add(question, completion.text, finish_reason=completion.finish_reason, **counts)

    def ask(question: Question, clip: Future) -> Request | str:
        """The request, or why there is none."""
        try:
            return request_of(question, clip.result(), clips, settings)
        except (MediaError, SampleError, OSError) as error:
            return str(error)

    todo = [question for question in questions if not predictions.answered(question.id)]
    batch: list[tuple[Question, Request]] = []
    with ThreadPoolExecutor(threads) as pool:
        for question, clip in _ahead(pool, clips.read, todo, max(2 * threads, batch_size)):
            request = ask(question, clip)
            if isinstance(request, str):
                add(question, None, request)
                continue
            batch.append((question, request))
            if len(batch) == batch_size:
                answer_batch(batch)
                batch = []
        if batch:
            answer_batch(batch)
    return done


def request_of(question: Question, clip: Clip, clips: Clips, settings: Mapping) -> Request:
    """Return the greedy request of a question.

    Raises:
      MediaError: the subtitles cannot be read.
    """
    lines = clips.subtitles(question, clip) if settings["subtitles"] else []
    return Request(
        question.id,
        (("user", prompt_of(question, settings, lines)),),
        clip=clip,
        max_new_tokens=settings["free_max_new_tokens" if question.form == "open" else "max_new_tokens"],
        answer_start=settings["answer_start"] if question.form == "choice" else "",
        query=guidance_of(question, settings),
    )


def entry_of(benchmark: str, question: Question, prediction: str | None, reason: str) -> dict:
    """A line of the predictions."""
    graded = grade_one(question, prediction, reason)
    return {
        "id": question.id,
        "benchmark": benchmark,
        "question": question.question,
        "options": list(question.options),
        "prediction": prediction,
        "parsed": graded.parsed,
        "answer": question.answer,
        "correct": graded.correct,
        "reason": graded.reason,
    }


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[Question], Clip], questions: Sequence[Question], ahead: int
) -> Iterator[tuple[Question, Future]]:
    """Questions with their clips, in order, those of `ahead` questions being read.

    Questions in a row about the same seconds of a video share a clip: hours of video are read once.
    """
    waiting: deque[tuple[Question, Future]] = deque()
    last, clip = None, Future()
    for question in questions:
        if (question.media, question.span) != last:
            last, clip = (question.media, question.span), pool.submit(read, question)
        waiting.append((question, clip))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
