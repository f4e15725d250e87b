"""Free answers: marked by a judge, and measured offline. The two never share a name."""

from collections import defaultdict
from collections.abc import Sequence

from dynfocus_jax.evaluation import judge as judging
from dynfocus_jax.evaluation import text_match
from dynfocus_jax.evaluation.grading import Graded
from dynfocus_jax.evaluation.judge_prompts import rubric_named
from dynfocus_jax.evaluation.measures import categories, mean, of_all, wholes


def offline(graded: Sequence[Graded]) -> dict | None:
    """Exact match and token F1 over all free answers, and by the groups of their questions; None of none."""
    answers = _free(graded)
    if not answers:
        return None

    def measured(members: Sequence[Graded]) -> dict:
        return text_match.summarize_matches((each.prediction or "", each.question.answer) for each in members)

    overall = measured(answers)
    about = {"measure": overall.pop("measure")}
    by = {
        group: {
            category: {key: value for key, value in measured(members).items() if key != "measure"}
            for category, members in categories(answers, group).items()
        }
        for group in dict.fromkeys(group for each in answers for group in each.question.groups)
    }
    return about | {"overall": overall, "by": by}


def judged(graded: Sequence[Graded], judge: judging.Judge, mean_name: str, dimensions: int) -> dict | None:
    """Return the judge's results for all free answers, by dimension; None if there are none.

    mean_name: of the mean over the benchmark's `dimensions`.

    Raises:
      RunError: the judge cannot be reached, or does not answer.
    """
    answers = _free(graded)
    if not answers:
        return None
    dimension_of, items = [], []
    for whole in wholes(answers).values():
        for dimension, rubric in whole[0].question.about["rubrics"].items():
            asked = _items(whole, rubric)
            dimension_of += [dimension] * len(asked)
            items += asked
    verdicts: dict[str, list[judging.Verdict]] = defaultdict(list)
    for dimension, verdict in zip(dimension_of, judge.grade(items), strict=True):
        verdicts[dimension].append(verdict)
    by = {dimension: judging.summarize_verdicts(members) for dimension, members in verdicts.items()}
    failed = [{"dimension": name} | each for name, summary in by.items() for each in summary.pop("failed")]
    overall = {name: summary["score"] for name, summary in by.items()}
    if len(overall) > 1:
        overall[of_all(mean_name, len(overall), dimensions)] = mean(overall.values())
    elif "accuracy" in (only := next(iter(by.values()))):
        overall = {"judged_accuracy": only["accuracy"], "judged_score": only["score"]}
    return {"judge": judge.record(), "overall": overall, "by": {"dimension": by}, "failed": failed}


def _free(graded: Sequence[Graded]) -> list[Graded]:
    return [each for each in graded if each.question.form == "open"]


def _items(whole: Sequence[Graded], rubric: str) -> list[judging.JudgeItem]:
    """Return the judge's items for a group of questions: one for all, or one for each."""

    def fields(each: Graded) -> dict[str, str]:
        known = {"question": each.question.question, "answer": each.question.answer}
        known |= {key: value for key, value in each.question.about.items() if isinstance(value, str)}
        return known | {"prediction": each.prediction or ""}

    wanted = rubric_named(rubric).fields
    if "question_1" in wanted:
        numbered = {
            f"{key}_{number}": value
            for number, each in enumerate(whole, start=1)
            for key, value in fields(each).items()
        }
        known = numbered | {"answer": whole[0].question.answer}
        name = whole[0].question.belongs_to
        return [judging.JudgeItem(name, rubric, {key: known[key] for key in sorted(wanted)})]
    return [
        judging.JudgeItem(each.question.id, rubric, {key: fields(each)[key] for key in sorted(wanted)})
        for each in whole
    ]
