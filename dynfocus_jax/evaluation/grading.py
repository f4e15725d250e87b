"""Answers beside what is right. Every question is there: what was not answered or understood is wrong."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dynfocus_jax.errors import RunError
from dynfocus_jax.evaluation import parsing
from dynfocus_jax.evaluation.questions import Question

NOT_UNDERSTOOD = "not understood"


class Graded(NamedTuple):
    """A question with its answer."""

    question: Question
    prediction: str | None  # the model's words; None: there are none, `reason` says why
    parsed: object  # what they mean: a letter, "yes" or "no", a text, (start, end); None: unknown
    correct: bool | None  # None: open answers, which a judge or an offline measure grades
    reason: str  # why there is no parsed answer; "" where there is


def understand(question: Question, prediction: str) -> object:
    """Parse an answer; return None if it cannot be understood."""
    if question.form == "choice":
        return parsing.letter(prediction, question.options)
    if question.form == "yes_no":
        return parsing.yes_or_no(prediction)
    if question.form == "span":
        return parsing.span(prediction)
    return prediction.strip() or None


def grade_one(question: Question, prediction: str | None, reason: str = "") -> Graded:
    """A prediction of the model, or None and why there is none."""
    if prediction is None:
        return Graded(question, None, None, _unless_open(question, lambda: False), reason)
    parsed = understand(question, prediction)
    if parsed is None:
        return Graded(question, prediction, None, _unless_open(question, lambda: False), NOT_UNDERSTOOD)
    if question.form == "span":
        return Graded(question, prediction, parsed, None, "")
    return Graded(question, prediction, parsed, _unless_open(question, lambda: parsed == question.answer), "")


def grade(questions: Sequence[Question], entries: Mapping[str, Mapping]) -> list[Graded]:
    """All questions, in their order, with their entries of the predictions.

    Raises:
      RunError: a question has no entry.
    """
    missing = [question.id for question in questions if question.id not in entries]
    if missing:
        raise RunError(
            f"{len(missing)} of {len(questions)} questions have no prediction, the first is {missing[0]!r}; "
            "start the evaluation again to answer them."
        )
    return [
        grade_one(question, entries[question.id]["prediction"], entries[question.id].get("reason", ""))
        for question in questions
    ]


def _unless_open(question: Question, correct: Callable[[], bool]) -> bool | None:
    """Return None for questions without a public key (open answers, hidden keys)."""
    return None if question.form in ("open", "span") or question.answer is None else correct()
