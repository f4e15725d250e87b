"""Measures of open answers: the marks of a judge, and text match. They are reported under different names."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from dynfocus_jax.evaluation.grading import GradedAnswer
from dynfocus_jax.evaluation.judge import Judge, JudgeItem, Verdict, summarize_verdicts
from dynfocus_jax.evaluation.judge_prompts import rubric_named
from dynfocus_jax.evaluation.measures import group_by_category, group_by_unit, mean, name_mean
from dynfocus_jax.evaluation.text_match import MEASURE, summarize_matches


def measure_text_match(graded: Sequence[GradedAnswer]) -> dict[str, Any] | None:
    """Return exact match and token F1 over all open answers, and by group; None if there are none."""
    answers = _open_answers(graded)
    if not answers:
        return None

    def summarize(members: Sequence[GradedAnswer]) -> dict[str, float | None]:
        pairs = ((each.prediction or "", each.question.reference) for each in members)
        return summarize_matches(pairs)._asdict()

    groups = dict.fromkeys(group for each in answers for group in each.question.groups)
    by = {
        group: {
            category: summarize(members) for category, members in group_by_category(answers, group).items()
        }
        for group in groups
    }
    return {"measure": MEASURE, "overall": summarize(answers), "by": by}


def judge_answers(
    graded: Sequence[GradedAnswer], judge: Judge, mean_name: str, num_dimensions: int
) -> dict[str, Any] | None:
    """Let a judge mark all open answers; return its results by dimension, None if there are no answers.

    mean_name: name of the mean over the benchmark's `num_dimensions` dimensions.

    Raises:
      RunError: the judge cannot be reached or does not reply.
    """
    answers = _open_answers(graded)
    if not answers:
        return None
    dimension_of_item: list[str] = []
    items: list[JudgeItem] = []
    for unit in group_by_unit(answers).values():
        for dimension, rubric in unit[0].question.rubrics.items():
            unit_items = _make_items(unit, rubric)
            dimension_of_item += [dimension] * len(unit_items)
            items += unit_items
    verdicts: dict[str, list[Verdict]] = defaultdict(list)
    for dimension, verdict in zip(dimension_of_item, judge.grade(items), strict=True):
        verdicts[dimension].append(verdict)
    by = {dimension: summarize_verdicts(members) for dimension, members in verdicts.items()}
    failed = [{"dimension": name} | each for name, summary in by.items() for each in summary.pop("failed")]
    overall = {name: summary["score"] for name, summary in by.items()}
    if len(overall) > 1:
        overall[name_mean(mean_name, len(overall), num_dimensions)] = mean(overall.values())
    elif "accuracy" in (only := next(iter(by.values()))):
        overall = {"judged_accuracy": only["accuracy"], "judged_score": only["score"]}
    return {"judge": judge.record(), "overall": overall, "by": {"dimension": by}, "failed": failed}


def _open_answers(graded: Sequence[GradedAnswer]) -> list[GradedAnswer]:
    return [each for each in graded if each.question.form == "open"]


def _make_items(unit: Sequence[GradedAnswer], rubric: str) -> list[JudgeItem]:
    """Return the judge's items for the questions of a unit: one for all, or one for each.

    A rubric for several questions has the fields "question_1", "prediction_1", "question_2" and so on.
    """
    needed = sorted(rubric_named(rubric).fields)

    def make_item(name: str, known: dict[str, str]) -> JudgeItem:
        return JudgeItem(name, rubric, {key: known[key] for key in needed})

    if "question_1" not in needed:
        return [make_item(each.question.id, _judge_fields(each)) for each in unit]
    numbered = {
        f"{key}_{number}": value
        for number, each in enumerate(unit, start=1)
        for key, value in _judge_fields(each).items()
    }
    question = unit[0].question
    return [make_item(question.unit, numbered | {"answer": question.reference})]


def _judge_fields(graded: GradedAnswer) -> dict[str, str]:
    question = graded.question
    return {
        "question": question.question,
        "answer": question.reference,
        **question.extra,
        "prediction": graded.prediction or "",
    }
