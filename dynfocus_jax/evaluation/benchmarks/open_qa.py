"""MSVD-QA, MSRVTT-QA and ActivityNet-QA: short free answers."""

from pathlib import Path

from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.questions import (
    Question,
    media_file,
    read_questions,
    table_entries,
    with_suffixes,
    word_of,
)
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import InvalidEntry
from dynfocus_jax.records.fields import id_of, text_of

RUBRICS = {"judge": "video_chatgpt_qa"}


def read_msvd(annotations: Path, media: MediaFolder) -> list[Question]:
    """`test_qa.json`; videos are NAME.avi or, by number, vidN.avi or as youtube_mapping.txt names it."""
    mapping = annotations.with_name("youtube_mapping.txt")
    lines = mapping.read_text(encoding="utf-8").splitlines() if mapping.is_file() else []
    name_of = {number: name for name, _, number in (line.strip().partition(" ") for line in lines)}

    def places(video: str) -> list[str]:
        number = f"vid{video}" if video.isdecimal() else video
        names = [video, number, *filter(None, [name_of.get(number)])]
        return [place for name in names for place in with_suffixes(name, "videos", "YouTubeClips")]

    return _read(annotations, media, places)


def read_msrvtt(annotations: Path, media: MediaFolder) -> list[Question]:
    """`test_qa.json`; a video is NAME.mp4, or videoN.mp4 by its number."""

    def places(video: str) -> list[str]:
        names = [f"video{video}", video] if video.isdecimal() else [video]
        return [place for name in names for place in with_suffixes(name, "videos", "TestVideo")]

    return _read(annotations, media, places)


def read_activitynet(annotations: Path, media: MediaFolder) -> list[Question]:
    """`test_q.json` with `test_a.json` beside it, joined by question_id; videos at v_NAME.mp4 (or .mkv ...).

    Raises:
      UserError: a question has no answer, or two.
    """
    if not annotations.stem.endswith("_q"):
        raise UserError(f"--annotations is {str(annotations)!r}, expected the questions, test_q.json.")
    answers = _answers(annotations.with_name(f"{annotations.stem.removesuffix('_q')}_a{annotations.suffix}"))

    def places(video: str) -> list[str]:
        names = [video] if video.startswith("v_") else [f"v_{video}", video]
        return [place for name in names for place in with_suffixes(name, "videos", "all_test")]

    return _read(annotations, media, places, answers)


def _answers(path: Path) -> dict[str, str]:
    """{question_id: answer}."""
    answers: dict[str, str] = {}

    def parse(entry: dict) -> list[Question]:
        name = id_of(entry.get("question_id"))
        answer = word_of(entry.get("answer"), "answer")
        if answers.setdefault(name, answer) != answer:
            raise InvalidEntry(f"gives question {name!r} a second answer, {answer!r} after {answers[name]!r}")
        return [Question(name, path, "", answer, "open")]

    read_questions(path, table_entries(path), parse)
    return answers


def _read(annotations: Path, media: MediaFolder, places, answers: dict[str, str] | None = None):
    def parse(entry: dict) -> Question:
        name = id_of(entry.get("question_id", entry.get("id")))
        video = word_of(entry.get("video_name", entry.get("video_id")), "video_name")
        if answers is None:
            answer = word_of(entry.get("answer"), "answer")
        elif name in answers:
            answer = answers[name]
        else:
            raise InvalidEntry(f"question {name!r} has no answer in the file of answers")
        return Question(
            name,
            media_file(media, "video_name", places(video)),
            text_of(entry.get("question"), "question"),
            answer,
            "open",
            about={"rubrics": RUBRICS},
        )

    return read_questions(annotations, table_entries(annotations), parse)
