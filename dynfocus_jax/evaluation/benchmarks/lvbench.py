"""LVBench: multiple choice about hours of video. A question may have several types."""

import re
from pathlib import Path

from dynfocus_jax.evaluation.benchmark import CHOICE_PROMPT, LONG_VIDEO, Benchmark
from dynfocus_jax.evaluation.measures import accuracy_by
from dynfocus_jax.evaluation.questions import (
    Question,
    letter_of,
    read_questions,
    table_entries,
    video_paths,
)
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import JsonValue
from dynfocus_jax.records.fields import ensure, first_existing, id_of, list_of, object_of, text_of
from dynfocus_jax.records.prompts import LETTERS

_OPTION = re.compile(r"^\s*\(?([A-Z])[).]\s*", re.MULTILINE)
# The paper's abbreviations.
_TYPES = {
    "entity recognition": "ER",
    "event understanding": "EU",
    "key information retrieval": "KIR",
    "temporal grounding": "TG",
    "reasoning": "Rea",
    "summarization": "Sum",
}

measure_lvbench = accuracy_by("question_type", "video_type")


def read_lvbench(annotations: Path, media: MediaFolder) -> list[Question]:
    """Read `video_info.meta.jsonl`, with a video per line; videos at KEY.mp4 or all_videos/KEY.mp4."""

    def parse(entry: dict[str, JsonValue]) -> list[Question]:
        key = id_of(entry.get("key"))
        file = first_existing(video_paths(key, "all_videos", "videos"), "key", media)
        rows = list_of(entry.get("qa"), "qa", "questions")
        kind = text_of(entry.get("type"), "type")
        return [_parse_question(row, f"qa[{i}]", kind, file) for i, row in enumerate(rows)]

    return read_questions(annotations, table_entries(annotations), parse)


def _parse_question(value: JsonValue, where: str, kind: str, file: Path) -> Question:
    row = object_of(value, where)
    question, options = split_options(text_of(row.get("question"), f"{where}.question"), where)
    types = list_of(row.get("question_type"), f"{where}.question_type", "types")
    names = [text_of(each, f"{where}.question_type") for each in types]
    return Question(
        id_of(row.get("uid")),
        file,
        question,
        letter_of(row.get("answer"), f"{where}.answer", options),
        "choice",
        options,
        {
            "question_type": tuple(dict.fromkeys(_TYPES.get(name.lower(), name) for name in names)),
            "video_type": (kind,),
        },
    )


def split_options(text: str, where: str) -> tuple[str, tuple[str, ...]]:
    """Split a text into the question and its options, the last lines: "(A) 1636", "(B) 1366"."""
    marks = list(_OPTION.finditer(text))
    marks = marks[max((i for i, mark in enumerate(marks) if mark[1] == "A"), default=len(marks)) :]
    starts, ends = [mark.start() for mark in marks] or [0], [mark.end() for mark in marks]
    options = tuple(text[i:k].strip() for i, k in zip(ends, [*starts[1:], len(text)], strict=False))
    question = text[: starts[0]].strip()
    in_order = LETTERS.startswith("".join(mark[1] for mark in marks))
    ensure(
        bool(question) and len(options) > 1 and all(options) and in_order,
        f'field "{where}.question" has no options (A), (B), ... in its last lines',
    )
    return question, options


BENCHMARKS = {
    "lvbench": Benchmark(
        "LVBench", read_lvbench, measure_lvbench, settings={"prompt": CHOICE_PROMPT, **LONG_VIDEO}
    )
}
