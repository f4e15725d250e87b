"""VNBench: needles in videos. Each is asked about four times, with its options in different orders."""

from pathlib import Path

from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.benchmark import CHOICE_PROMPT, LONG_VIDEO, Benchmark
from dynfocus_jax.evaluation.measures import all_correct, mean_over
from dynfocus_jax.evaluation.questions import (
    Question,
    letter_of,
    letter_of_text,
    read_questions,
    table_entries,
    texts_of,
)
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import JsonValue
from dynfocus_jax.records.fields import ensure, first_existing, text_of

NUM_TRIES = 4
_TASKS = {"ret": "retrieval", "ord": "ordering", "cnt": "counting"}

# A needle counts as correct if all of its tries are.
measure_vnbench = mean_over("type", name="mean_accuracy", statistic=all_correct, also_by=("task",))


def read_vnbench(annotations: Path, media: MediaFolder) -> list[Question]:
    """Read `VNBench-main-4try.json`; videos at their path, without the leading "/", or by name.

    Raises:
      UserError: a needle has fewer than four tries.
    """

    def parse(entry: dict[str, JsonValue]) -> Question:
        options = texts_of(entry.get("options"), "options")
        video = text_of(entry.get("video"), "video").lstrip("/")
        kind = text_of(entry.get("type"), "type")
        number = entry.get("try")
        ensure(type(number) is int, 'field "try" is missing or not an integer')
        if entry.get("gt_option") is not None:
            answer = letter_of(entry["gt_option"], "gt_option", options)
        else:
            answer = letter_of_text(entry.get("gt"), "gt", options)
        question = text_of(entry.get("question"), "question")
        return Question(
            f"{kind}/{Path(video).name}/{number}",
            first_existing([video, Path(video).name], "video", media),
            question,
            answer,
            "choice",
            options,
            {"type": (kind,), "task": (_TASKS.get(kind[:3], kind),)},
            unit=f"{kind}/{video}/{question}",
            extra={"try": str(number)},
        )

    questions = read_questions(annotations, table_entries(annotations), parse)
    tries: dict[str, set[str]] = {}
    for question in questions:
        tries.setdefault(question.unit, set()).add(question.extra["try"])
    incomplete = [name for name, found in tries.items() if len(found) < NUM_TRIES]
    if incomplete:
        name = incomplete[0]
        raise UserError(
            f"annotation file {annotations}: needle {name!r} has {len(tries[name])} tries, expected "
            f"{NUM_TRIES} ({len(incomplete)} needles have too few); use the published file with all tries."
        )
    return questions


BENCHMARKS = {
    "vnbench": Benchmark(
        "VNBench", read_vnbench, measure_vnbench, settings={"prompt": CHOICE_PROMPT, **LONG_VIDEO}
    )
}
