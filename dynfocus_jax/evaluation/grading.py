"""Comparison of answers with the right ones. Unanswered and unparsed questions count as wrong."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dynfocus_jax.errors import RunError
from dynfocus_jax.evaluation.parsing import parse_letter, parse_span, parse_yes_no
from dynfocus_jax.evaluation.questions import Question

NOT_UNDERSTOOD = "not understood"

ParsedAnswer = str | tuple[float, float]  # a letter, "yes" or "no", a text; start and end in seconds


class GradedAnswer(NamedTuple):
    """A question with its answer.

    prediction: the model's words; None if it gave no answer. parsed: None if the words could not be parsed.
    correct: None for open answers and spans, and if the right answer is not published. reason: why there is
    no parsed answer; "" if there is one.
    """

    question: Question
    prediction: str | None
    parsed: ParsedAnswer | None
    correct: bool | None
    reason: str


def parse_answer(question: Question, prediction: str) -> ParsedAnswer | None:
    """Parse the model's words by the form of the question; return None if that fails."""
    if question.form == "choice":
        return parse_letter(prediction, question.options)
    if question.form == "yes_no":
        return parse_yes_no(prediction)
    if question.form == "span":
        return parse_span(prediction)
    return prediction.strip() or None


def grade_answer(question: Question, prediction: str | None, reason: str = "") -> GradedAnswer:
    """Grade the model's words.

    prediction: None if the model gave no answer, for `reason`.
    """
    parsed = None if prediction is None else parse_answer(question, prediction)
    if prediction is not None:
        reason = NOT_UNDERSTOOD if parsed is None else ""
    has_key = question.form in ("choice", "yes_no") and question.answer is not None
    correct = parsed == question.answer if has_key else None
    return GradedAnswer(question, prediction, parsed, correct, reason)


def grade_answers(
    questions: Sequence[Question], entries: Mapping[str, Mapping[str, Any]]
) -> list[GradedAnswer]:
    """Grade all questions, in their order.

    entries: lines of the predictions by question id.

    Raises:
      RunError: a question has no entry.
    """
    missing = [question.id for question in questions if question.id not in entries]
    if missing:
        raise RunError(
            f"{len(missing)} of {len(questions)} questions have no prediction, such as {missing[0]!r}; rerun "
            "the same command to answer them."
        )
    return [
        grade_answer(question, entries[question.id]["prediction"], entries[question.id].get("reason", ""))
        for question in questions
    ]
