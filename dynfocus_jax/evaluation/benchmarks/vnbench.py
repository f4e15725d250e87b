"""VNBench: needles in videos. Each is asked about four times with the options in another order."""

from pathlib import Path

from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.measures import all_right, mean_over
from dynfocus_jax.evaluation.questions import (
    Question,
    letter_of,
    letter_of_text,
    media_file,
    read_questions,
    table_entries,
    texts_of,
    word_of,
)
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.fields import ensure, text_of

TRIES = 4
_TASKS = {"ret": "retrieval", "ord": "ordering", "cnt": "counting"}

# A needle counts only when all of its tries are right.
measure_vnbench = mean_over("type", named="mean_accuracy", of=all_right, also=("task",))


def read_vnbench(annotations: Path, media: MediaFolder) -> list[Question]:
    """`VNBench-main-4try.json`; videos at their path (from its "/" on) below the media folder, or in it.

    Raises:
      UserError: a needle does not have its four tries.
    """

    def parse(entry: dict) -> Question:
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
            media_file(media, "video", [video, Path(video).name]),
            question,
            answer,
            "choice",
            options,
            {"type": (kind,), "task": (_TASKS.get(kind[:3], kind),)},
            belongs_to=f"{kind}/{video}/{question}",
            about={"try": word_of(number, "try")},
        )

    questions = read_questions(annotations, table_entries(annotations), parse)
    tries: dict[str, set] = {}
    for question in questions:
        tries.setdefault(question.belongs_to, set()).add(question.about["try"])
    short = [name for name, found in tries.items() if len(found) < TRIES]
    if short:
        raise UserError(
            f"annotation file {annotations}: {short[0]!r} has {len(tries[short[0]])} of its {TRIES} tries, "
            f"and {len(short)} needles are like that; take the file with all tries, which are one answer."
        )
    return questions
