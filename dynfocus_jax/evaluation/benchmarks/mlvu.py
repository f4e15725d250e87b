"""MLVU: seven tasks with options and two with open answers. The answers of its test set are not published."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dynfocus_jax.evaluation.benchmark import LONG_VIDEO, Benchmark
from dynfocus_jax.evaluation.grading import GradedAnswer
from dynfocus_jax.evaluation.measures import Measurement, mean, mean_over, tabulate
from dynfocus_jax.evaluation.questions import (
    Question,
    annotation_files,
    letter_of_text,
    read_questions,
    texts_of,
    word_of,
)
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import JsonValue, json_list_entries
from dynfocus_jax.records.fields import first_existing, id_of, text_of

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
NUM_CHOICE_TASKS = 7  # those of the first seven files; the mean of their accuracies is M-Avg


def read_dev(annotations: Path, media: MediaFolder) -> list[Question]:
    """Read a folder with the nine files, or one of them; videos at FILE/NAME, video/FILE/NAME or NAME."""
    questions = []
    for file in annotation_files(annotations, _FILES):
        questions += read_questions(file, json_list_entries(file), _make_parser(file.stem, media))
    return questions


def _make_parser(name: str, media: MediaFolder) -> Callable[[dict[str, JsonValue]], Question]:
    def parse(entry: dict[str, JsonValue]) -> Question:
        video = text_of(entry.get("video"), "video")
        path = first_existing([f"{name}/{video}", f"video/{name}/{video}", video], "video", media)
        question = text_of(entry.get("question"), "question")
        task = text_of(entry.get("question_type"), "question_type")
        groups = {"task": (task,)}
        if entry.get("candidates") is None:  # sub-scene captioning and video summarization
            points = entry.get("scoring_points")
            return Question(
                f"{name}/{video}",
                path,
                question,
                text_of(entry.get("answer"), "answer"),
                "open",
                groups=groups,
                rubrics={"VS": "mlvu_summary"} if points is None else {"SSC": "mlvu_ssc"},
                extra={} if points is None else {"scoring_points": _join_points(points)},
            )
        options = texts_of(entry["candidates"], "candidates")
        answer = letter_of_text(entry.get("answer"), "answer", options)
        return Question(f"{name}/{video}", path, question, answer, "choice", options, groups)

    return parse


def _join_points(value: JsonValue) -> str:
    """Return the scoring points of a sub-scene, a text or a list of texts, as one text."""
    if isinstance(value, list):
        return "\n".join(text_of(each, f"scoring_points[{i}]") for i, each in enumerate(value))
    return text_of(value, "scoring_points")


def measure_dev(graded: Sequence[GradedAnswer]) -> Measurement:
    """Measure M-Avg, the mean of the accuracies of the tasks with options. (G-Avg is of judged answers.)"""
    return mean_over("task", name="M-Avg", num_categories=NUM_CHOICE_TASKS)(graded)


def read_test(annotations: Path, media: MediaFolder) -> list[Question]:
    """Read the test set, whose answers are not published; videos at NAME or video/NAME."""

    def parse(entry: dict[str, JsonValue]) -> Question:
        video = text_of(entry.get("video"), "video")
        options = texts_of(entry.get("candidates"), "candidates")
        return Question(
            id_of(entry.get("question_id")),
            first_existing([video, f"video/{video}"], "video", media),
            text_of(entry.get("question"), "question"),
            None,
            "choice",
            options,
            {"task": (text_of(entry.get("question_type"), "question_type"),)},
            extra={"question_id": word_of(entry["question_id"], "question_id")},
        )

    return read_questions(annotations, json_list_entries(annotations), parse)


def measure_test(graded: Sequence[GradedAnswer]) -> Measurement:
    """Measure the fraction of questions that have an option to submit."""

    def answered(members: Sequence[GradedAnswer]) -> float | None:
        return mean(float(member.parsed is not None) for member in members)

    return Measurement({"answered": answered(graded)}, {"task": tabulate(graded, "task", answered=answered)})


def make_submission(graded: Sequence[GradedAnswer]) -> list[dict[str, str]]:
    """Return the submission to the authors: the option chosen for each question, "" without an answer."""
    return [
        {
            "question_id": each.question.extra["question_id"],
            "question_type": each.question.groups["task"][0],
            "option": str(each.parsed or ""),
        }
        for each in graded
    ]


_CHOICE = {
    **LONG_VIDEO,
    "prompt": (
        "Carefully watch this video and pay attention to every detail. Based on your observations, select "
        "the best option that accurately addresses the question.\nQuestion: {question}\nOptions:\n{options}\n"
        "Only give the best option."
    ),
    "option": "({letter}) {option}",
    "answer_start": "Best Option: (",
}

BENCHMARKS = {
    "mlvu": Benchmark("MLVU", read_dev, measure_dev, judged_mean="G-Avg", num_dimensions=2, settings=_CHOICE),
    "mlvu_test": Benchmark("MLVU test", read_test, measure_test, make_submission, settings=_CHOICE),
}
