"""Evaluation on one benchmark: distributes questions over processes, answers them and writes the results."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.evaluation.answering import (
    GenerationEngine,
    Progress,
    answer_questions,
    assign_questions,
)
from dynfocus_jax.evaluation.benchmarks import BENCHMARKS
from dynfocus_jax.evaluation.grading import grade_answers
from dynfocus_jax.evaluation.judge import Judge
from dynfocus_jax.evaluation.predictions import PredictionStore
from dynfocus_jax.evaluation.question_prompts import ClipReader
from dynfocus_jax.evaluation.questions import Question, fingerprint
from dynfocus_jax.evaluation.results import format_results, summarize_results, write_json
from dynfocus_jax.parallel.processes import print_once
from dynfocus_jax.sections import differences
from dynfocus_jax.version import code_version

RESULTS, RUN, SUBMISSION, TABLE = "results.json", "run.json", "submission.json", "table.txt"


class Processes(NamedTuple):
    """This process's number, and the number of all processes."""

    index: int = 0
    count: int = 1


SINGLE_PROCESS = Processes()


def prepare_output(
    output: Path, name: str, questions: Sequence[Question], about: Mapping[str, Any], checkpoint: str = ""
) -> None:
    """Write run.json, which describes the predictions of a folder, and delete earlier results.

    Only process 0 calls this.

    Args:
      about: weights, model and prompts, as JSON values; equal in all runs that share a folder.
      checkpoint: path of the weights. It and the code may differ between runs; all of them are recorded.

    Raises:
      UserError: the folder has predictions made with other settings, or cannot be written.
    """
    described = json.loads(json.dumps({"benchmark": name, "questions": fingerprint(questions), **about}))
    maker = {"checkpoint": checkpoint, "code": code_version()}
    try:
        output.mkdir(parents=True, exist_ok=True)
        kept = json.loads((output / RUN).read_text(encoding="utf-8")) if (output / RUN).exists() else {}
        makers = kept.pop("made_by", [])
        changed = differences(kept, described) if kept else []
        if not kept and any(output.glob("predictions*.jsonl")):  # such as those of a training run
            changed = [f"there is no {RUN} that describes them"]
        if changed:
            raise UserError(
                f"--output {str(output)!r} has predictions made with other settings "
                f"({_shorten('; '.join(changed[:3]))}); use another folder, or remove this one."
            )
        if any(each["code"]["source"] != maker["code"]["source"] for each in makers):
            print_once(f"note: {output} has predictions of another version of the code; they may differ")
        if maker not in makers:
            makers.append(maker)
        write_json(output / RUN, described | {"made_by": makers})
        for stale in (RESULTS, TABLE, SUBMISSION, *(path.name for path in output.glob("finished.*"))):
            (output / stale).unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {str(output)!r} cannot be used ({error}); use another folder.") from None


def run_benchmark(
    output: Path,
    name: str,
    questions: Sequence[Question],
    engine: GenerationEngine,
    clips: ClipReader,
    settings: Mapping[str, Any],
    *,
    processes: Processes = SINGLE_PROCESS,
    judge: Judge | None = None,
    batch_size: int = 16,
    threads: int = 2,
    progress: Callable[[Progress], None] = lambda progress: None,
    file_name: str = "predictions.jsonl",
    poll_seconds: float = 1.0,
) -> dict[str, Any]:
    """Answer this process's questions and return the results of all processes.

    The first process waits for the others and writes the results; the others wait for the results.

    Args:
      output: a folder that all processes see.
      settings: the benchmark's section of configs/benchmarks.py.
      file_name: file of this process's predictions.
      poll_seconds: interval at which the processes check each other's files.
    """
    predictions = PredictionStore(output, file_name)
    answer_questions(
        name,
        assign_questions(questions, *processes),
        engine,
        clips,
        settings,
        predictions,
        batch_size=batch_size,
        threads=threads,
        progress=progress,
    )
    if processes.index > 0:
        (output / f"finished.{processes.index}").touch()
        _wait_for([output / RESULTS], poll_seconds)
        return json.loads((output / RESULTS).read_text(encoding="utf-8"))
    others = [output / f"finished.{number}" for number in range(1, processes.count)]
    _wait_for(others, poll_seconds)
    results = write_results(output, name, questions, predictions, judge)
    for path in others:
        path.unlink()
    return results


def write_results(
    output: Path,
    name: str,
    questions: Sequence[Question],
    predictions: PredictionStore,
    judge: Judge | None,
) -> dict[str, Any]:
    """Write and return the results of all questions.

    Raises:
      RunError: a question has no entry, the judge does not reply, or the results cannot be written.
    """
    benchmark = BENCHMARKS[name]
    graded = grade_answers(questions, predictions.read_all())
    results = summarize_results(name, benchmark, graded, judge)
    results["code"] = code_version()
    results["predictions"] = json.loads((output / RUN).read_text(encoding="utf-8"))
    try:
        if benchmark.submission is not None:
            write_json(output / SUBMISSION, benchmark.submission(graded))
        (output / TABLE).write_text(format_results(results) + "\n", encoding="utf-8")
        write_json(output / RESULTS, results)  # last: the other processes wait for it
    except OSError as error:
        raise RunError(
            f"the results cannot be written to {output} ({error.strerror}); check free space and "
            "permissions, then rerun the same command."
        ) from None
    return results


def _wait_for(files: Sequence[Path], seconds: float) -> None:
    """Wait until all files exist. If a process dies, the launcher ends the others."""
    while not all(path.exists() for path in files):
        time.sleep(seconds)


def _shorten(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."
