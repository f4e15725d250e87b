"""Measures of closed questions. A share is of all questions that were asked, answered or not."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from dynfocus_jax.evaluation.grading import Graded


class Measured(NamedTuple):
    """Results of a benchmark.

    overall: {measure: value}, shares from 0 to 1 and scores as the benchmark has them; None: not measured.
    by: {group: {category: {"questions": number, measure: value}}}.
    """

    overall: dict[str, float | None]
    by: dict[str, dict[str, dict[str, float | None]]]


Measure = Callable[[Sequence[Graded]], Measured]


def mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def accuracy(graded: Sequence[Graded]) -> float | None:
    """The share of right answers."""
    return mean(float(bool(each.correct)) for each in graded)


def categories(graded: Sequence[Graded], group: str) -> dict[str, list[Graded]]:
    """{category: its questions}, in the order of the annotations; a question may be in several."""
    found: dict[str, list[Graded]] = defaultdict(list)
    for each in graded:
        for category in each.question.groups.get(group, ()):
            found[category].append(each)
    return dict(found)


def wholes(graded: Sequence[Graded]) -> dict[str, list[Graded]]:
    """{name: questions that are judged as a whole}."""
    found: dict[str, list[Graded]] = defaultdict(list)
    for each in graded:
        found[each.question.belongs_to].append(each)
    return dict(found)


def all_right(graded: Sequence[Graded]) -> float | None:
    """The share of wholes in which every answer is right."""
    return mean(float(all(each.correct for each in whole)) for whole in wholes(graded).values())


def tabulate(
    graded: Sequence[Graded], group: str, **measures: Callable[[Sequence[Graded]], float | None]
) -> dict[str, dict[str, float | None]]:
    """{category: {"questions": number, measure: value}}."""
    return {
        category: {"questions": len(members)} | {name: of(members) for name, of in measures.items()}
        for category, members in categories(graded, group).items()
    }


def accuracy_by(*groups: str) -> Measure:
    """Accuracy over all questions, and by each group."""

    def measure(graded: Sequence[Graded]) -> Measured:
        by = {group: tabulate(graded, group, accuracy=accuracy) for group in groups}
        return Measured({"accuracy": accuracy(graded)}, by)

    return measure


def mean_over(
    group: str, *, named: str, members: int | None = None, of: Callable = accuracy, also: Sequence[str] = ()
) -> Measure:
    """The mean of the accuracies of a group's categories, however many questions each has.

    members: how many categories the benchmark has, where a file may hold fewer.
    """

    def measure(graded: Sequence[Graded]) -> Measured:
        by = {each: tabulate(graded, each, accuracy=of) for each in (group, *also)}
        name = of_all(named, len(by[group]), members)
        return Measured({name: mean(row["accuracy"] for row in by[group].values())}, by)

    return measure


def of_all(name: str, found: int, members: int | None) -> str:
    """The name of a mean; it says so where this is over fewer categories than the benchmark has."""
    return name if members is None or found == members else f"{name} of {found} of {members}"
