"""NExT-QA: causal, temporal and descriptive questions with five options; NExT-GQA also asks when."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.grading import Graded
from dynfocus_jax.evaluation.measures import Measured, accuracy, accuracy_by, mean, tabulate
from dynfocus_jax.evaluation.questions import (
    Question,
    letter_of_text,
    media_file,
    read_questions,
    with_suffixes,
)
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import InvalidEntry, csv_entries, read_json
from dynfocus_jax.records.fields import ensure, id_of, kind_of, text_of
from dynfocus_jax.records.prompts import LETTERS

_OPTIONS = ("a0", "a1", "a2", "a3", "a4")
_KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}
_WHEN = "When in the video is it seen? {}"

measure_nextqa = accuracy_by("kind", "type")


def read_nextqa(annotations: Path, media: MediaFolder) -> list[Question]:
    """The csv file of a split; videos at VIDEO.mp4, or where map_vid_vidorID.json beside the csv file says.

    "answer" is the number of an option in all rows or, as in some releases, its text in all rows.
    """
    rows = list(csv_entries(annotations, ("question", "answer", "qid", "type", *_OPTIONS)))
    entries = [row for _, row in rows if isinstance(row, dict)]
    numbered = all(row["answer"].strip() in tuple("01234") for row in entries)
    place_of = _places(annotations.with_name("map_vid_vidorID.json"))

    def parse(row: dict) -> Question:
        video = text_of(row.get("video", row.get("video_id")), "video")
        options = tuple(text_of(row[key], key) for key in _OPTIONS)
        given = row["answer"].strip()
        kind = text_of(row["type"], "type")
        qid = text_of(row["qid"], "qid")
        names = [place_of[video], video] if video in place_of else [video]
        return Question(
            id_of(f"{video}_{qid}"),
            media_file(media, "video", [place for name in names for place in with_suffixes(name, "videos")]),
            text_of(row["question"], "question"),
            LETTERS[int(given)] if numbered else letter_of_text(given, "answer", options),
            "choice",
            options,
            {"kind": (_KINDS.get(kind[:1], kind),), "type": (kind,)},
            about={"video": video, "qid": qid},
        )

    return read_questions(annotations, rows, parse)


def _places(file: Path) -> dict[str, str]:
    """{video: its path without suffix, "1164/3238737531"}; empty without the file."""
    places = read_json(file) if file.is_file() else {}
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise UserError(f"{file} is not NExT-QA's map of video ids to paths; remove it.")
    return places


# ---- NExT-GQA -------------------------------------------------------------------------------------------


def read_grounded(annotations: Path, media: MediaFolder) -> list[Question]:
    """Two questions for each that has a place in gsub_SPLIT.json beside SPLIT.csv: the answer, and when.

    annotations: SPLIT.csv, or gsub_SPLIT.json. Rows without a place are not part of NExT-GQA.

    Raises:
      UserError: a file is missing, or a place has no row, or two.
    """
    split = annotations.stem.removeprefix("gsub_")
    table, file = annotations.with_name(f"{split}.csv"), annotations.with_name(f"gsub_{split}.json")
    grounds = _grounds(file)
    rows: dict[str, list[Question]] = {name: [] for name in grounds}
    for question in read_nextqa(table, media):
        rows.get(question.id, []).append(question)
    odd = [name for name, found in rows.items() if len(found) != 1]
    if odd:
        raise UserError(
            f"annotation file {table} has {len(rows[odd[0]])} rows for {odd[0]!r}, expected one, as {file} "
            f"has a place for it ({len(odd)} are like that); take both files of one split, as published."
        )
    questions = []
    for name, spans in grounds.items():
        (row,) = rows[name]
        about = {"spans": spans}
        questions.append(_with(row, name, "choice", row.question, about))
        questions.append(_with(row, f"{name}/when", "span", _WHEN.format(row.question), about))
    return questions


def _with(row: Question, name: str, form: str, question: str, about: dict) -> Question:
    closed = form == "choice"
    return Question(
        name,
        row.media,
        question,
        row.answer if closed else None,
        form,
        row.options if closed else (),
        row.groups,
        belongs_to=row.id,
        about=about,
    )


def _grounds(file: Path) -> dict[str, tuple[tuple[float, float], ...]]:
    """{video_qid: its spans in seconds}."""
    content = read_json(file)
    try:
        ensure(isinstance(content, dict) and len(content) > 0, "holds no videos")
        return {
            f"{video}_{qid}": _spans(spans, f"{video}.location.{qid}")
            for video, entry in content.items()
            for qid, spans in _locations(entry, video).items()
        }
    except InvalidEntry as error:
        raise UserError(f"annotation file {file}: {error}; take it as published.") from None


def _locations(entry: object, video: str) -> dict:
    location = entry.get("location") if isinstance(entry, dict) else None
    ensure(isinstance(location, dict), f'field "{video}.location" is {kind_of(location)}, expected spans')
    return location


def _spans(value: object, where: str) -> tuple[tuple[float, float], ...]:
    good = isinstance(value, list) and len(value) > 0
    good = good and all(
        isinstance(each, list)
        and len(each) == 2
        and all(type(time) in (int, float) for time in each)
        and each[0] <= each[1]
        for each in value
    )
    ensure(good, f'field "{where}" is {kind_of(value)}, expected a list of [start, end]')
    return tuple((float(start), float(end)) for start, end in value)


def overlap(span: tuple[float, float], truths: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The best intersection over prediction and over union of a span with one of several, as NExT-GQA has it.

    A moment (start = end) inside a true span has prediction 1 and union 0.
    """
    start, end = span
    over_prediction, over_union = [0.0], [0.0]
    for first, last in truths:
        shared = min(end, last) - max(start, first)
        if start == end:
            over_prediction.append(float(shared >= 0))
        elif shared > 0:
            over_prediction.append(shared / (end - start))
            over_union.append(shared / (max(end, last) - min(start, first)))
    return max(over_prediction), max(over_union)


def measure_grounded(graded: Sequence[Graded]) -> Measured:
    """Acc@GQA (answer right and IoP at least 0.5), Acc@QA, mIoP, mIoU and the shares at 0.3 and 0.5.

    A question whose span was not understood has overlap 0.
    """
    answers = [each for each in graded if each.question.form == "choice"]
    overlaps = {
        each.question.belongs_to: (0.0, 0.0)
        if each.parsed is None
        else overlap(each.parsed, each.question.about["spans"])
        for each in graded
        if each.question.form == "span"
    }

    def measures(members: Sequence[Graded]) -> dict[str, float | None]:
        found = [overlaps[member.question.belongs_to] for member in members]
        right = [bool(m.correct) and iop >= 0.5 for m, (iop, _) in zip(members, found, strict=True)]
        of = {"IoP": [iop for iop, _ in found], "IoU": [iou for _, iou in found]}
        return {
            "Acc@GQA": mean(map(float, right)),
            "Acc@QA": accuracy(members),
            **{f"m{name}": mean(values) for name, values in of.items()},
            **{
                f"{name}@{least}": mean(float(value >= least) for value in values)
                for name, values in of.items()
                for least in (0.3, 0.5)
            },
        }

    columns = {name: lambda members, name=name: measures(members)[name] for name in measures(answers)}
    return Measured(measures(answers), {"kind": tabulate(answers, "kind", **columns)})
