"""MLVU: seven tasks of multiple choice and two of free answers; its test set is answered for submission."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dynfocus_jax.evaluation.grading import Graded
from dynfocus_jax.evaluation.measures import Measured, mean, mean_over, tabulate
from dynfocus_jax.evaluation.questions import (
    Question,
    annotation_files,
    letter_of_text,
    media_file,
    read_questions,
    texts_of,
    word_of,
)
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import json_list_entries
from dynfocus_jax.records.fields import id_of, text_of

_FILES = (
    "1_plotQA.json",
    "2_needle.json",
    "3_ego.json",
    "4_count.json",
    "5_order.json",
    "6_anomaly_reco.json",
    "7_topic_reasoning.json",
    "8_sub_scene.json",
    "9_summary.json",
)
TASKS = 7  # the first files have options, their mean is M-Avg


def read_dev(annotations: Path, media: MediaFolder) -> list[Question]:
    """A folder with the nine files, or one of them; videos at FILE/NAME, video/FILE/NAME or NAME."""
    questions = []
    for file in annotation_files(annotations, _FILES):
        questions += read_questions(file, json_list_entries(file), _parser(file.stem, media))
    return questions


def _parser(name: str, media: MediaFolder) -> Callable[[dict], Question]:
    def parse(entry: dict) -> Question:
        video = text_of(entry.get("video"), "video")
        path = media_file(media, "video", [f"{name}/{video}", f"video/{name}/{video}", video])
        question = text_of(entry.get("question"), "question")
        task = text_of(entry.get("question_type"), "question_type")
        groups = {"task": (task,)}
        if entry.get("candidates") is None:  # sub-scene captioning and video summarization
            about: dict = {"rubrics": {"VS": "mlvu_summary"}}
            if (points := entry.get("scoring_points")) is not None:
                about = {"rubrics": {"SSC": "mlvu_ssc"}, "scoring_points": _points(points)}
            answer = text_of(entry.get("answer"), "answer")
            return Question(f"{name}/{video}", path, question, answer, "open", groups=groups, about=about)
        options = texts_of(entry["candidates"], "candidates")
        answer = letter_of_text(entry.get("answer"), "answer", options)
        return Question(f"{name}/{video}", path, question, answer, "choice", options, groups)

    return parse


def _points(value: object) -> str:
    """The scoring points of a sub-scene, a text or a list of texts."""
    if isinstance(value, list):
        return "\n".join(text_of(each, f"scoring_points[{i}]") for i, each in enumerate(value))
    return text_of(value, "scoring_points")


def measure_dev(graded: Sequence[Graded]) -> Measured:
    """M-Avg, the mean of the accuracies of the tasks with options. (G-Avg is of judged answers.)"""
    return mean_over("task", named="M-Avg", members=TASKS)(graded)


def read_test(annotations: Path, media: MediaFolder) -> list[Question]:
    """The questions of the test set, whose answers the authors keep; videos at NAME or video/NAME."""

    def parse(entry: dict) -> Question:
        name = entry.get("video")
        video = text_of(name, "video")
        options = texts_of(entry.get("candidates"), "candidates")
        return Question(
            id_of(entry.get("question_id")),
            media_file(media, "video", [video, f"video/{video}"]),
            text_of(entry.get("question"), "question"),
            None,
            "choice",
            options,
            {"task": (text_of(entry.get("question_type"), "question_type"),)},
            about={"question_id": word_of(entry["question_id"], "question_id")},
        )

    return read_questions(annotations, json_list_entries(annotations), parse)


def measure_test(graded: Sequence[Graded]) -> Measured:
    """Return the share of questions that have an option to submit."""

    def answered(members: Sequence[Graded]) -> float | None:
        return mean(float(member.parsed is not None) for member in members)

    return Measured({"answered": answered(graded)}, {"task": tabulate(graded, "task", answered=answered)})


def submission(graded: Sequence[Graded]) -> list[dict]:
    """Return the submission to the authors: every question, with "" where there is no answer."""
    return [
        {
            "question_id": each.question.about["question_id"],
            "question_type": each.question.groups["task"][0],
            "option": each.parsed or "",
        }
        for each in graded
    ]
