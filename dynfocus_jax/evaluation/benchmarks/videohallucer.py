"""VideoHallucer: pairs of a basic and a hallucinated yes-no question; right only when both are."""

from collections.abc import Sequence
from pathlib import Path

from dynfocus_jax.evaluation.grading import Graded
from dynfocus_jax.evaluation.measures import Measured, accuracy, all_right, mean, of_all, tabulate
from dynfocus_jax.evaluation.questions import Question, annotation_files, media_file, read_questions
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import json_list_entries
from dynfocus_jax.records.fields import ensure, kind_of, text_of

SETS = ("object_relation", "temporal", "semantic_detail", "external_factual", "external_nonfactual")


def read_videohallucer(annotations: Path, media: MediaFolder) -> list[Question]:
    """The folder with SET/SET.json (or SET.json) for each of the five sets, or one such file.

    Videos are at SET/videos/NAME, videos/NAME or NAME below the media folder.
    """
    files = annotation_files(annotations, [f"{name}.json" for name in SETS])
    return [question for file in files for question in _read_set(file, media)]


def _read_set(file: Path, media: MediaFolder) -> list[Question]:
    name, pairs = file.stem, 0

    def parse(entry: dict) -> list[Question]:
        nonlocal pairs
        pairs += 1
        return [_question(entry, kind, name, pairs - 1, media) for kind in ("basic", "hallucination")]

    return read_questions(file, json_list_entries(file), parse)


def _question(entry: dict, kind: str, name: str, number: int, media: MediaFolder) -> Question:
    part = entry.get(kind)
    ensure(isinstance(part, dict), f'field "{kind}" is {kind_of(part)}, expected a question')
    video = text_of(part.get("video"), f"{kind}.video")
    answer = text_of(part.get("answer"), f"{kind}.answer").lower().strip(".")
    ensure(answer in ("yes", "no"), f'field "{kind}.answer" is {kind_of(answer)}, expected yes or no')
    return Question(
        f"{name}/{number}/{kind}",
        media_file(media, f"{kind}.video", [f"{name}/videos/{video}", f"videos/{video}", video]),
        text_of(part.get("question"), f"{kind}.question"),
        answer,
        "yes_no",
        groups={"set": (name,), "kind": (kind,)},
        belongs_to=f"{name}/{number}",
    )


def measure_videohallucer(graded: Sequence[Graded]) -> Measured:
    """The accuracies of basic and hallucinated questions and of pairs: of each set, and their means."""

    def of_kind(kind: str):
        return lambda members: accuracy([m for m in members if m.question.groups["kind"] == (kind,)])

    measures = {"basic": of_kind("basic"), "hallucinated": of_kind("hallucination"), "overall": all_right}
    by = tabulate(graded, "set", **measures)
    names = {name: of_all(name, len(by), len(SETS)) for name in measures}
    return Measured({names[name]: mean(row[name] for row in by.values()) for name in measures}, {"set": by})
