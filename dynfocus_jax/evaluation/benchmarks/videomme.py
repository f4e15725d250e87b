"""Video-MME: multiple choice, with or without subtitles, by duration, domain and type of question."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from dynfocus_jax.evaluation.benchmark import CHOICE_PROMPT, LONG_VIDEO, Benchmark
from dynfocus_jax.evaluation.measures import accuracy_by
from dynfocus_jax.evaluation.questions import (
    Question,
    letter_of,
    read_questions,
    table_entries,
    texts_of,
    video_paths,
    word_of,
)
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import InvalidEntry, JsonValue
from dynfocus_jax.records.fields import ensure, first_existing, id_of, kind_of, list_of, object_of, text_of

measure_videomme = accuracy_by("duration", "domain", "sub_category", "task_type")


def read_videomme(annotations: Path, media: MediaFolder) -> list[Question]:
    """Read entries with a list of "questions" each, or (as on the Hugging Face hub) a row per question.

    Videos are at NAME.mp4 or data/NAME.mp4, subtitles at subtitle/NAME.srt. NAME is the video's id on YouTube
    ("videoID", or the v of "url") or its "video_id".
    """

    def parse(entry: dict[str, JsonValue]) -> list[Question]:
        rows = list_of(entry.get("questions", [entry]), "questions", "questions")
        return [
            _parse_question(entry, object_of(row, f"questions[{i}]"), media) for i, row in enumerate(rows)
        ]

    return read_questions(annotations, table_entries(annotations), parse)


def _parse_question(video: dict[str, JsonValue], row: dict[str, JsonValue], media: MediaFolder) -> Question:
    options = tuple(_strip_letter(option) for option in texts_of(row.get("options"), "options"))
    names = _video_names(video)
    subtitles = [f"{folder}/{name}.srt" for folder in ("subtitle", "subtitles") for name in names]
    subtitle = next(filter(media.has, subtitles), None)
    groups = {key: (word_of(video.get(key), key),) for key in ("duration", "domain", "sub_category")}
    return Question(
        id_of(row.get("question_id")),
        first_existing([place for n in names for place in video_paths(n, "data", "videos")], "video", media),
        text_of(row.get("question"), "question"),
        letter_of(row.get("answer"), "answer", options),
        "choice",
        options,
        groups | {"task_type": (text_of(row.get("task_type"), "task_type"),)},
        subtitles=None if subtitle is None else media.file(subtitle),
    )


def _video_names(video: dict[str, JsonValue]) -> Sequence[str]:
    """Return the names that the files of a video may have."""
    url = video.get("url")
    try:
        watched = parse_qs(urlsplit(url).query).get("v", []) if isinstance(url, str) else []
    except ValueError:
        raise InvalidEntry(f'field "url" is {kind_of(url)}, expected an address') from None
    ids = [video[key] for key in ("videoID", "video_id") if video.get(key) not in (None, "")]
    names = [word_of(name, "videoID") for name in [*ids[:-1], *watched, *ids[-1:]]]
    ensure(bool(names), 'has neither "videoID" nor "video_id"')
    return names


def _strip_letter(option: str) -> str:
    """Return "Apples." for "A. Apples."."""
    head, dot, rest = option.partition(".")
    return rest.strip() if dot and len(head) == 1 and rest.strip() else option


BENCHMARKS = {
    "videomme": Benchmark(
        "Video-MME", read_videomme, measure_videomme, settings={"prompt": CHOICE_PROMPT, **LONG_VIDEO}
    )
}
