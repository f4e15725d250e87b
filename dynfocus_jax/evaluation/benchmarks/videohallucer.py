"""VideoHallucer: pairs of a basic and a hallucinated yes-no question. A pair is right if both answers are."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from dynfocus_jax.evaluation.benchmark import Benchmark
from dynfocus_jax.evaluation.grading import GradedAnswer
from dynfocus_jax.evaluation.measures import (
    Measurement,
    Statistic,
    accuracy,
    all_correct,
    mean,
    name_mean,
    tabulate,
)
from dynfocus_jax.evaluation.questions import Question, annotation_files, read_questions
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import JsonValue, json_list_entries
from dynfocus_jax.records.fields import ensure, first_existing, kind_of, object_of, text_of

SETS = ("object_relation", "temporal", "semantic_detail", "external_factual", "external_nonfactual")


def read_videohallucer(annotations: Path, media: MediaFolder) -> list[Question]:
    """Read a folder with SET/SET.json (or SET.json) for each of the five sets, or one such file.

    Videos are at SET/videos/NAME, videos/NAME or NAME below the media folder.
    """
    files = annotation_files(annotations, [f"{name}.json" for name in SETS])
    return [question for file in files for question in _read_set(file, media)]


def _read_set(file: Path, media: MediaFolder) -> list[Question]:
    name, numbers = file.stem, itertools.count()

    def parse(entry: dict[str, JsonValue]) -> list[Question]:
        number = next(numbers)
        return [_parse_question(entry, kind, name, number, media) for kind in ("basic", "hallucination")]

    return read_questions(file, json_list_entries(file), parse)


def _parse_question(
    entry: dict[str, JsonValue], kind: str, name: str, number: int, media: MediaFolder
) -> Question:
    part = object_of(entry.get(kind), kind)
    video = text_of(part.get("video"), f"{kind}.video")
    answer = text_of(part.get("answer"), f"{kind}.answer").lower().strip(".")
    ensure(answer in ("yes", "no"), f'field "{kind}.answer" is {kind_of(answer)}, expected yes or no')
    return Question(
        f"{name}/{number}/{kind}",
        first_existing([f"{name}/videos/{video}", f"videos/{video}", video], f"{kind}.video", media),
        text_of(part.get("question"), f"{kind}.question"),
        answer,
        "yes_no",
        groups={"set": (name,), "kind": (kind,)},
        unit=f"{name}/{number}",
    )


def measure_videohallucer(graded: Sequence[GradedAnswer]) -> Measurement:
    """Measure the accuracies of basic questions, hallucinated ones and pairs: per set, and their means."""

    def accuracy_of(kind: str) -> Statistic:
        return lambda members: accuracy([m for m in members if m.question.groups["kind"] == (kind,)])

    statistics: dict[str, Statistic] = {
        "basic": accuracy_of("basic"),
        "hallucinated": accuracy_of("hallucination"),
        "overall": all_correct,
    }
    by = tabulate(graded, "set", **statistics)
    overall = {
        name_mean(name, len(by), len(SETS)): mean(row[name] for row in by.values()) for name in statistics
    }
    return Measurement(overall, {"set": by})


BENCHMARKS = {
    "videohallucer": Benchmark(
        "VideoHallucer",
        read_videohallucer,
        measure_videohallucer,
        settings={"prompt": "{question}\nAnswer the question using 'yes' or 'no'."},
    )
}
