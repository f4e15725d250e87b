"""NExT-QA: causal, temporal and descriptive questions with five options. NExT-GQA also asks for the time."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.benchmark import CHOICE_PROMPT, Benchmark
from dynfocus_jax.evaluation.grading import GradedAnswer
from dynfocus_jax.evaluation.measures import Measurement, Statistic, accuracy, accuracy_by, mean, tabulate
from dynfocus_jax.evaluation.questions import (
    Question,
    letter_of_text,
    read_questions,
    video_paths,
)
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import InvalidEntry, JsonValue, csv_entries, read_json
from dynfocus_jax.records.fields import first_existing, id_of, kind_of, list_of, object_of, text_of
from dynfocus_jax.records.formats.nextqa import OPTION_COLUMNS, read_video_places
from dynfocus_jax.records.prompts import LETTERS

_KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}
_WHEN = "When in the video is it seen? {}"

Span = tuple[float, float]  # start and end in seconds

measure_nextqa = accuracy_by("kind", "type")


def read_nextqa_questions(annotations: Path, media: MediaFolder) -> list[Question]:
    """Read the csv file of a split; videos at VIDEO.mp4, or at the paths in map_vid_vidorID.json beside it.

    "answer" is the number of an option in all rows or, in some releases, its text in all rows.
    """
    rows = list(csv_entries(annotations, ("question", "answer", "qid", "type", *OPTION_COLUMNS)))
    entries = [row for _, row in rows if isinstance(row, dict)]
    has_numbers = all(row["answer"].strip() in tuple("01234") for row in entries)
    places = read_video_places(annotations)

    def parse(row: dict[str, JsonValue]) -> Question:
        video = text_of(row.get("video", row.get("video_id")), "video")
        options = tuple(text_of(row[key], key) for key in OPTION_COLUMNS)
        answer = text_of(row["answer"], "answer")
        kind = text_of(row["type"], "type")
        qid = text_of(row["qid"], "qid")
        names = [places[video], video] if video in places else [video]
        return Question(
            id_of(f"{video}_{qid}"),
            first_existing([path for name in names for path in video_paths(name, "videos")], "video", media),
            text_of(row["question"], "question"),
            LETTERS[int(answer)] if has_numbers else letter_of_text(answer, "answer", options),
            "choice",
            options,
            {"kind": (_KINDS.get(kind[:1], kind),), "type": (kind,)},
        )

    return read_questions(annotations, rows, parse)


# ---- NExT-GQA -------------------------------------------------------------------------------------------


def read_grounded(annotations: Path, media: MediaFolder) -> list[Question]:
    """Read two questions for each one that has spans in gsub_SPLIT.json: the answer, and its time.

    annotations: SPLIT.csv, or gsub_SPLIT.json beside it. Rows without spans are not part of NExT-GQA.

    Raises:
      UserError: a file is missing, or spans have no row or two.
    """
    split = annotations.stem.removeprefix("gsub_")
    table, file = annotations.with_name(f"{split}.csv"), annotations.with_name(f"gsub_{split}.json")
    spans_of_question = _read_spans(file)
    rows: dict[str, list[Question]] = {name: [] for name in spans_of_question}
    for question in read_nextqa_questions(table, media):
        if question.id in rows:
            rows[question.id].append(question)
    unmatched = [name for name, found in rows.items() if len(found) != 1]
    if unmatched:
        name = unmatched[0]
        raise UserError(
            f"annotation file {table} has {len(rows[name])} rows for entry {name!r} of {file}, expected 1 "
            f"({len(unmatched)} entries do not match); use the two published files of the same split."
        )
    questions = []
    for name, spans in spans_of_question.items():
        (row,) = rows[name]
        questions += [replace(row, true_spans=spans), _time_question(row, spans)]
    return questions


def _time_question(row: Question, spans: tuple[Span, ...]) -> Question:
    """Return the question for the time of another question's answer."""
    return replace(
        row,
        id=f"{row.id}/when",
        question=_WHEN.format(row.question),
        answer=None,
        form="span",
        options=(),
        true_spans=spans,
    )


def _read_spans(file: Path) -> dict[str, tuple[Span, ...]]:
    """Return {video_qid: its spans}."""
    content = read_json(file)
    try:
        if not isinstance(content, dict) or not content:
            raise InvalidEntry("it has no videos")
        return {
            f"{video}_{qid}": _parse_spans(spans, f"{video}.location.{qid}")
            for video, entry in content.items()
            for qid, spans in _locations(entry, video).items()
        }
    except InvalidEntry as error:
        raise UserError(f"annotation file {file}: {error}; download it again.") from None


def _locations(entry: JsonValue, video: str) -> dict[str, JsonValue]:
    return object_of(object_of(entry, video).get("location"), f"{video}.location")


def _parse_spans(value: JsonValue, where: str) -> tuple[Span, ...]:
    spans = list_of(value, where, "spans")
    return tuple(_parse_span(span, f"{where}[{i}]") for i, span in enumerate(spans))


def _parse_span(value: JsonValue, where: str) -> Span:
    if isinstance(value, list) and len(value) == 2:
        start, end = value
        if _is_number(start) and _is_number(end) and start <= end:
            return float(start), float(end)
    raise InvalidEntry(f'field "{where}" is {kind_of(value)}, expected [start, end] in seconds')


def _is_number(value: JsonValue) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def overlap(span: Span, true_spans: Iterable[Span]) -> tuple[float, float]:
    """Return the largest IoP and the largest IoU of a predicted span with the true spans.

    IoP is the intersection over the predicted span, IoU the intersection over the union. A moment (start =
    end) inside a true span has IoP 1 and IoU 0.

    Source: NExT-GQA, evaluation script.
    """
    start, end = span
    over_prediction, over_union = [0.0], [0.0]
    for true_start, true_end in true_spans:
        shared = min(end, true_end) - max(start, true_start)
        if start == end:
            over_prediction.append(float(shared >= 0))
        elif shared > 0:
            over_prediction.append(shared / (end - start))
            over_union.append(shared / (max(end, true_end) - min(start, true_start)))
    return max(over_prediction), max(over_union)


def measure_grounded(graded: Sequence[GradedAnswer]) -> Measurement:
    """Measure Acc@GQA (right answer and IoP >= 0.5), Acc@QA, mIoP, mIoU, and the fractions at 0.3 and 0.5.

    A question without a parsed span has IoP 0 and IoU 0.
    """
    answers = [each for each in graded if each.question.form == "choice"]
    overlaps = {
        each.question.unit: overlap(each.parsed, each.question.true_spans)
        if isinstance(each.parsed, tuple)
        else (0.0, 0.0)
        for each in graded
        if each.question.form == "span"
    }

    def measure(members: Sequence[GradedAnswer]) -> dict[str, float | None]:
        found = [overlaps[member.question.unit] for member in members]
        grounded = [bool(m.correct) and iop >= 0.5 for m, (iop, _) in zip(members, found, strict=True)]
        values = {"IoP": [iop for iop, _ in found], "IoU": [iou for _, iou in found]}
        return {
            "Acc@GQA": mean(map(float, grounded)),
            "Acc@QA": accuracy(members),
            **{f"m{name}": mean(each) for name, each in values.items()},
            **{
                f"{name}@{least}": mean(float(value >= least) for value in each)
                for name, each in values.items()
                for least in (0.3, 0.5)
            },
        }

    def statistic(name: str) -> Statistic:
        return lambda members: measure(members)[name]

    overall = measure(answers)
    columns = {name: statistic(name) for name in overall}
    return Measurement(overall, {"kind": tabulate(answers, "kind", **columns)})


BENCHMARKS = {
    "nextqa": Benchmark("NExT-QA", read_nextqa_questions, measure_nextqa, settings={"prompt": CHOICE_PROMPT}),
    "nextgqa": Benchmark(
        "NExT-GQA",
        read_grounded,
        measure_grounded,
        settings={"prompt": CHOICE_PROMPT, "max_new_tokens": 32},
    ),
}
