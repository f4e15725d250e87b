"""The results of an evaluation: results.json, and the table by category."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynfocus_jax.evaluation import open_answers
from dynfocus_jax.evaluation.benchmarks import Benchmark
from dynfocus_jax.evaluation.grading import NOT_UNDERSTOOD, Graded
from dynfocus_jax.evaluation.judge import Judge

_LISTED = 5  # questions of a kind that the table names; results.json names all


def summarize_results(name: str, benchmark: Benchmark, graded: Sequence[Graded], judge: Judge | None) -> dict:
    """Everything that is measured of a benchmark's answers; `graded` are all of its questions.

    The same answers give the same results, in whatever order, runs or processes they were given.

    Raises:
      RunError: the judge does not answer.
    """
    failed = [each for each in graded if each.prediction is None]
    unclear = [each for each in graded if each.reason == NOT_UNDERSTOOD]
    closed = [each for each in graded if each.question.form != "open"]
    results: dict = {
        "benchmark": benchmark.title,
        "name": name,
        "questions": len(graded),
        "answered": len(graded) - len(failed),
        "failed": [{"id": each.question.id, "reason": each.reason} for each in failed],
        "not_understood": [
            {"id": each.question.id, "prediction": each.prediction, "answer": each.question.answer}
            for each in unclear
        ],
    }
    if benchmark.measure is not None and closed:
        measured = benchmark.measure(closed)
        results["closed"] = {"overall": measured.overall, "by": measured.by}
    if (offline := open_answers.offline(graded)) is not None:
        results["offline"] = offline
        if judge is not None:
            results["judged"] = open_answers.judged(
                graded, judge, benchmark.judged_mean, benchmark.dimensions
            )
    return results


def write_json(path: Path, content: object) -> None:
    """A file that is there as a whole or not at all."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


# ---- Table ----------------------------------------------------------------------------------------------


def format_results(results: Mapping) -> str:
    """Return the table of results: every measure by category and overall, and missing answers."""
    failed, unclear = results["failed"], results["not_understood"]
    lines = [
        f"{results['benchmark']}: {results['questions']} questions, {results['answered']} answered, "
        f"{len(unclear)} of them not understood, {len(failed)} failed; all count"
    ]
    if "closed" in results:
        lines += _blocks(results["closed"])
    unmarked = []
    if "judged" in results:
        judged = results["judged"]
        lines += ["", f"judged by {judged['judge']['model']}", *_blocks(judged, scores=True)]
        unmarked = [f"{each['id']} ({each['dimension']}): {each['reason']}" for each in judged["failed"]]
    if "offline" in results:
        lines += ["", results["offline"]["measure"], *_blocks(results["offline"])]
    lines += _listing("failed", [f"{each['id']}: {each['reason']}" for each in failed])
    lines += _listing("not understood", [f"{each['id']}: {each['prediction']!r}" for each in unclear])
    lines += _listing("not marked by the judge", unmarked)
    return "\n".join(lines)


def _blocks(part: Mapping, *, scores: bool = False) -> list[str]:
    """A block a group: its categories, a line each. scores: what is no accuracy is no share of 1."""

    def shown(name: str, value: float | None) -> str:
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
            cells = (shown(column, row.get(column)).rjust(max(9, len(column))) for column in columns)
            lines.append("  ".join([category.ljust(width), *cells]))
    overall = ", ".join(
        f"{name} {shown(name, value)}" for name, value in part["overall"].items() if name != "questions"
    )
    return [*lines, "", f"overall: {overall}"]


def _listing(title: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = [f"  ... and {len(entries) - _LISTED} more, see results.json"] if len(entries) > _LISTED else []
    return ["", f"{title}:", *(f"  {entry}" for entry in entries[:_LISTED]), *more]
