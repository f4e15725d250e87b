"""An evaluation on one benchmark: shares the questions over processes, answers them, and reports."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.evaluation.answering import Answerer, Progress, answer, share_of
from dynfocus_jax.evaluation.benchmarks import BENCHMARKS
from dynfocus_jax.evaluation.grading import grade
from dynfocus_jax.evaluation.judge import Judge
from dynfocus_jax.evaluation.predictions import Predictions
from dynfocus_jax.evaluation.question_prompts import Clips
from dynfocus_jax.evaluation.questions import Question, fingerprint
from dynfocus_jax.evaluation.results import format_results, summarize_results, write_json
from dynfocus_jax.parallel.processes import print_once
from dynfocus_jax.sections import differences
from dynfocus_jax.version import code_version

RESULTS, RUN, SUBMISSION, TABLE = "results.json", "run.json", "submission.json", "table.txt"


class Share(NamedTuple):
    """This process's number among all processes."""

    process: int = 0
    processes: int = 1


ALONE = Share()


def begin(
    output: Path, name: str, questions: Sequence[Question], about: Mapping, checkpoint: str = ""
) -> None:
    """Keep what the predictions of a folder depend on, and takes old results away. Process 0 calls it.

    about: of the weights, the model and how it is asked, JSON-able; the same in every run of a folder.
    checkpoint: where the weights are; this and the code may change, and are kept of every run.

    Raises:
      UserError: the folder holds predictions of something else.
    """
    described = json.loads(json.dumps({"benchmark": name, "questions": fingerprint(questions), **about}))
    maker = {"checkpoint": checkpoint, "code": code_version()}
    try:
        output.mkdir(parents=True, exist_ok=True)
        kept = json.loads((output / RUN).read_text(encoding="utf-8")) if (output / RUN).exists() else {}
        makers = kept.pop("made_by", [])
        changed = differences(kept, described) if kept else []
        if not kept and any(output.glob("predictions*.jsonl")):  # such as those of a training run
            changed = [f"there is no {RUN} that says of what they are"]
        if changed:
            raise UserError(
                f"--output {str(output)!r} has predictions made with other settings "
                f"({_short('; '.join(changed[:3]))}); choose another folder, or remove this one."
            )
        if any(each["code"]["source"] != maker["code"]["source"] for each in makers):
            print_once(f"note: {output} has predictions made by other code; they may differ")
        if maker not in makers:
            makers.append(maker)
        write_json(output / RUN, described | {"made_by": makers})
        for stale in (RESULTS, TABLE, SUBMISSION, *(path.name for path in output.glob("finished.*"))):
            (output / stale).unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--output {str(output)!r} cannot be used ({error}); choose another folder."
        ) from None


def run(
    output: Path,
    name: str,
    questions: Sequence[Question],
    engine: Answerer,
    clips: Clips,
    settings: Mapping,
    *,
    share: Share = ALONE,
    judge: Judge | None = None,
    batch_size: int = 16,
    threads: int = 2,
    progress: Callable[[Progress], None] = lambda done: None,
    file_name: str = "predictions.jsonl",
    wait: float = 1.0,
) -> dict:
    """Answer this process's questions; the first process waits for the others and writes the results.

    Every process returns the results. The folder is one that all processes see.
    """
    predictions = Predictions(output, file_name)
    mine = share_of(questions, *share)
    answer(
        name,
        mine,
        engine,
        clips,
        settings,
        predictions,
        batch_size=batch_size,
        threads=threads,
        progress=progress,
    )
    if share.process > 0:
        (output / f"finished.{share.process}").touch()
        _await([output / RESULTS], wait)
        return json.loads((output / RESULTS).read_text(encoding="utf-8"))
    others = [output / f"finished.{number}" for number in range(1, share.processes)]
    _await(others, wait)
    results = report(output, name, questions, predictions, judge)
    for path in others:
        path.unlink()
    return results


def report(
    output: Path,
    name: str,
    questions: Sequence[Question],
    predictions: Predictions,
    judge: Judge | None,
) -> dict:
    """Write and returns the results of all questions.

    Raises:
      RunError: a question has no entry, the judge does not answer, or the results cannot be written.
    """
    benchmark = BENCHMARKS[name]
    graded = grade(questions, predictions.all())
    results = summarize_results(name, benchmark, graded, judge)
    results["code"] = code_version()
    results["predictions"] = json.loads((output / RUN).read_text(encoding="utf-8"))
    try:
        if benchmark.submission is not None:
            write_json(output / SUBMISSION, benchmark.submission(graded))
        (output / TABLE).write_text(format_results(results) + "\n", encoding="utf-8")
        write_json(output / RESULTS, results)  # last: the others wait for it
    except OSError as error:
        raise RunError(f"the results cannot be written to {output} ({error.strerror}); make room.") from None
    return results


def _await(files: Sequence[Path], seconds: float) -> None:
    """Wait until the files exist, checking at an interval; a process that dies ends the others."""
    while not all(path.exists() for path in files):
        time.sleep(seconds)


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."
