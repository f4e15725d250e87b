"""Measures of closed questions. All questions are in the denominator, answered or not."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from dynfocus_jax.evaluation.grading import GradedAnswer

MeasureRow = dict[str, float | None]  # {measure: value}; with "questions", their number, in a table


class Measurement(NamedTuple):
    """Measures of a benchmark.

    overall: fractions from 0 to 1, and scores on the benchmark's own scale; None: not measured.
    by: {group: {category: its measures and number of questions}}.
    """

    overall: MeasureRow
    by: dict[str, dict[str, MeasureRow]]


Statistic = Callable[[Sequence[GradedAnswer]], float | None]
Measure = Callable[[Sequence[GradedAnswer]], Measurement]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean; None of no values, or if one of them was not measured."""
    values = list(values)
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured and len(measured) == len(values) else None


def accuracy(graded: Sequence[GradedAnswer]) -> float | None:
    """Return the fraction of correct answers."""
    return mean(float(bool(each.correct)) for each in graded)


def all_correct(graded: Sequence[GradedAnswer]) -> float | None:
    """Return the fraction of units whose answers are all correct."""
    return mean(float(all(each.correct for each in unit)) for unit in group_by_unit(graded).values())


def group_by_category(graded: Sequence[GradedAnswer], group: str) -> dict[str, list[GradedAnswer]]:
    """Return {category: its questions}, in the annotations' order; a question may have several categories."""
    found: dict[str, list[GradedAnswer]] = defaultdict(list)
    for each in graded:
        for category in each.question.groups.get(group, ()):
            found[category].append(each)
    return dict(found)


def group_by_unit(graded: Sequence[GradedAnswer]) -> dict[str, list[GradedAnswer]]:
    """Return {unit: its questions}; the questions of a unit are scored together."""
    found: dict[str, list[GradedAnswer]] = defaultdict(list)
    for each in graded:
        found[each.question.unit].append(each)
    return dict(found)


def tabulate(graded: Sequence[GradedAnswer], group: str, **statistics: Statistic) -> dict[str, MeasureRow]:
    """Return {category: {"questions": number, name: value of the statistic}}."""
    return {
        category: {"questions": len(members)} | {name: of(members) for name, of in statistics.items()}
        for category, members in group_by_category(graded, group).items()
    }


def accuracy_by(*groups: str) -> Measure:
    """Return the measure of accuracy over all questions, and by each group."""

    def measure(graded: Sequence[GradedAnswer]) -> Measurement:
        by = {group: tabulate(graded, group, accuracy=accuracy) for group in groups}
        return Measurement({"accuracy": accuracy(graded)}, by)

    return measure


def mean_over(
    group: str,
    *,
    name: str,
    num_categories: int | None = None,
    statistic: Statistic = accuracy,
    also_by: Sequence[str] = (),
) -> Measure:
    """Return the measure that averages a statistic over a group's categories, with equal weights.

    name: of the mean. num_categories: how many the benchmark has, if a file may hold fewer. also_by: groups
    that are tabulated besides.
    """

    def measure(graded: Sequence[GradedAnswer]) -> Measurement:
        by = {each: tabulate(graded, each, accuracy=statistic) for each in (group, *also_by)}
        full_name = name_mean(name, len(by[group]), num_categories)
        return Measurement({full_name: mean(row["accuracy"] for row in by[group].values())}, by)

    return measure


def name_mean(name: str, found: int, expected: int | None) -> str:
    """Return the name of a mean; it says if the mean is over fewer categories than the benchmark has."""
    return name if expected is None or found == expected else f"{name} of {found} of {expected}"
