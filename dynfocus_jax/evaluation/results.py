"""Results of an evaluation: the content of results.json, and the table by category."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynfocus_jax.evaluation.benchmark import Benchmark
from dynfocus_jax.evaluation.grading import NOT_UNDERSTOOD, GradedAnswer
from dynfocus_jax.evaluation.judge import Judge
from dynfocus_jax.evaluation.open_answers import judge_answers, measure_text_match

_MAX_LISTED = 5  # questions per list in the table; results.json has all


def summarize_results(
    name: str, benchmark: Benchmark, graded: Sequence[GradedAnswer], judge: Judge | None
) -> dict[str, Any]:
    """Return all measures of a benchmark's answers; `graded` has all of its questions.

    The results do not depend on the order in which the answers were given, nor on the number of processes.

    Raises:
      RunError: the judge does not reply.
    """
    failed = [each for each in graded if each.prediction is None]
    unparsed = [each for each in graded if each.reason == NOT_UNDERSTOOD]
    closed = [each for each in graded if each.question.form != "open"]
    results: dict[str, Any] = {
        "benchmark": benchmark.title,
        "name": name,
        "questions": len(graded),
        "answered": len(graded) - len(failed),
        "failed": [{"id": each.question.id, "reason": each.reason} for each in failed],
        "not_understood": [
            {"id": each.question.id, "prediction": each.prediction, "answer": each.question.answer}
            for each in unparsed
        ],
    }
    if benchmark.measure is not None and closed:
        measurement = benchmark.measure(closed)
        results["closed"] = {"overall": measurement.overall, "by": measurement.by}
    if (text_match := measure_text_match(graded)) is not None:
        results["offline"] = text_match
        if judge is not None:
            results["judged"] = judge_answers(graded, judge, benchmark.judged_mean, benchmark.num_dimensions)
    return results


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


# ---- Table ----------------------------------------------------------------------------------------------


def format_results(results: Mapping[str, Any]) -> str:
    """Return the table of results: every measure by category and overall, and the missing answers."""
    failed, unparsed = results["failed"], results["not_understood"]
    lines = [
        f"{results['benchmark']}: {results['questions']} questions, {results['answered']} answered, "
        f"{len(unparsed)} of them not understood, {len(failed)} failed; both of these count as wrong"
    ]
    if "closed" in results:
        lines += _format_measures(results["closed"])
    without_marks = []
    if "judged" in results:
        judged = results["judged"]
        lines += ["", f"judged by {judged['judge']['model']}", *_format_measures(judged, scores=True)]
        without_marks = [f"{each['id']} ({each['dimension']}): {each['reason']}" for each in judged["failed"]]
    if "offline" in results:
        lines += ["", results["offline"]["measure"], *_format_measures(results["offline"])]
    lines += _format_list("failed", [f"{each['id']}: {each['reason']}" for each in failed])
    lines += _format_list("not understood", [f"{each['id']}: {each['prediction']!r}" for each in unparsed])
    lines += _format_list("not marked by the judge", without_marks)
    return "\n".join(lines)


def _format_measures(part: Mapping[str, Any], *, scores: bool = False) -> list[str]:
    """Return a table per group, with a line per category, and the overall measures.

    scores: only accuracies are fractions, shown as percentages; other measures are scores.
    """

    def show(name: str, value: float | None) -> str:
        if value is None:
            return "-"
        if name == "questions":
            return str(value)
        return f"{value:.2f}" if scores and "accuracy" not in name else f"{100 * value:.1f} %"

    lines = []
    for group, rows in part["by"].items():
        numeric = [
            {k: v for k, v in row.items() if v is None or isinstance(v, int | float)} for row in rows.values()
        ]
        columns = list(dict.fromkeys(key for row in numeric for key in row))
        width = max(len(group), *map(len, rows))
        lines += [
            "",
            "  ".join([group.ljust(width), *(column.rjust(max(9, len(column))) for column in columns)]),
        ]
        for category, row in zip(rows, numeric, strict=True):
            cells = (show(column, row.get(column)).rjust(max(9, len(column))) for column in columns)
            lines.append("  ".join([category.ljust(width), *cells]))
    overall = ", ".join(
        f"{name} {show(name, value)}" for name, value in part["overall"].items() if name != "questions"
    )
    return [*lines, "", f"overall: {overall}"]


def _format_list(title: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    num_hidden = len(entries) - _MAX_LISTED
    more = [f"  ... and {num_hidden} more, see results.json"] if num_hidden > 0 else []
    return ["", f"{title}:", *(f"  {entry}" for entry in entries[:_MAX_LISTED]), *more]
