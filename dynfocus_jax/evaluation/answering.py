"""Answers to the questions of one process, batch by batch. Every question gets a line in the predictions."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from dynfocus_jax.errors import MediaError, SampleError
from dynfocus_jax.evaluation.grading import grade_answer
from dynfocus_jax.evaluation.predictions import PredictionStore
from dynfocus_jax.evaluation.question_prompts import ClipReader, make_guidance, make_prompt
from dynfocus_jax.evaluation.questions import Question
from dynfocus_jax.media.video import Clip
from dynfocus_jax.serving.engine import Completion, Request


class GenerationEngine(Protocol):
    """The part of `serving.engine.Engine` that answering uses."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Return a completion for each request, in their order."""
        ...


class Progress(NamedTuple):
    """Numbers of questions processed so far."""

    answered: int = 0
    failed: int = 0


def assign_questions(questions: Sequence[Question], process: int, num_processes: int) -> list[Question]:
    """Return the questions of a process: all questions about some of the videos, video by video.

    The assignment depends on all questions, answered or not, so processes and repeated runs never overlap.
    """
    videos = {path: number for number, path in enumerate(dict.fromkeys(q.media for q in questions))}
    assigned = [question for question in questions if videos[question.media] % num_processes == process]
    return sorted(assigned, key=lambda question: videos[question.media])


def answer_questions(
    benchmark: str,
    questions: Sequence[Question],
    engine: GenerationEngine,
    clips: ClipReader,
    settings: Mapping[str, Any],
    predictions: PredictionStore,
    *,
    batch_size: int,
    threads: int,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Answer the questions that have no answer yet, and add a line to the predictions for each.

    If a video cannot be read or the model cannot answer, the question's line has the reason instead of a
    prediction.

    Args:
      settings: the benchmark's section of configs/benchmarks.py.
      threads: threads that read videos.
      progress: called after each question.
    """
    done = Progress()

    def add(question: Question, prediction: str | None, reason: str, **details: Any) -> None:
        nonlocal done
        predictions.add(make_entry(benchmark, question, prediction, reason) | details)
        done = Progress(done.answered + (prediction is not None), done.failed + (prediction is None))
        progress(done)

    def answer_batch(batch: list[tuple[Question, Request]]) -> None:
        completions = engine.generate([request for _, request in batch])
        for (question, _), completion in zip(batch, completions, strict=True):
            if completion.finish_reason == "error":
                add(question, None, completion.error or "the model gave no answer")
            else:
                add(
                    question,
                    completion.text,
                    "",
                    finish_reason=completion.finish_reason,
                    visual_tokens=completion.visual_tokens,
                    prompt_tokens=completion.prompt_tokens,
                )

    unanswered = [question for question in questions if not predictions.is_answered(question.id)]
    batch: list[tuple[Question, Request]] = []
    with ThreadPoolExecutor(threads) as pool:
        for question, clip in _read_ahead(pool, clips.read, unanswered, max(2 * threads, batch_size)):
            try:
                request = make_request(question, clip.result(), clips, settings)
            except (MediaError, SampleError, OSError) as error:
                add(question, None, str(error))
                continue
            batch.append((question, request))
            if len(batch) == batch_size:
                answer_batch(batch)
                batch = []
        if batch:
            answer_batch(batch)
    return done


def make_request(question: Question, clip: Clip, clips: ClipReader, settings: Mapping[str, Any]) -> Request:
    """Return the request of a question, decoded greedily.

    Raises:
      MediaError: the subtitles cannot be read.
    """
    lines = clips.subtitles(question, clip) if settings["subtitles"] else []
    return Request(
        question.id,
        (("user", make_prompt(question, settings, lines)),),
        clip=clip,
        max_new_tokens=settings["free_max_new_tokens" if question.form == "open" else "max_new_tokens"],
        answer_start=settings["answer_start"] if question.form == "choice" else "",
        query=make_guidance(question, settings),
    )


def make_entry(benchmark: str, question: Question, prediction: str | None, reason: str) -> dict[str, Any]:
    """Return a question's line of the predictions."""
    graded = grade_answer(question, prediction, reason)
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


def _read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[Question], Clip], questions: Sequence[Question], count: int
) -> Iterator[tuple[Question, Future[Clip]]]:
    """Yield questions with their clips, in order, while the clips of the next `count` questions are read.

    Consecutive questions about the same span of a video share a clip, so that long videos are read once.
    """
    waiting: deque[tuple[Question, Future[Clip]]] = deque()
    last, clip = None, Future()
    for question in questions:
        if (question.media, question.span) != last:
            last, clip = (question.media, question.span), pool.submit(read, question)
        waiting.append((question, clip))
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
