"""MSVD-QA, MSRVTT-QA and ActivityNet-QA: short open answers."""

from collections.abc import Callable, Mapping
from pathlib import Path

from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.benchmark import Benchmark
from dynfocus_jax.evaluation.questions import (
    Question,
    read_questions,
    table_entries,
    video_paths,
    word_of,
)
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import InvalidEntry, JsonValue
from dynfocus_jax.records.fields import first_existing, id_of, text_of

_RUBRICS = {"judge": "video_chatgpt_qa"}


def read_msvd(annotations: Path, media: MediaFolder) -> list[Question]:
    """Read `test_qa.json`; videos at NAME.avi, or by number: vidN.avi, or a name in youtube_mapping.txt."""
    mapping = annotations.with_name("youtube_mapping.txt")
    lines = mapping.read_text(encoding="utf-8").splitlines() if mapping.is_file() else []
    name_of = {number: name for name, _, number in (line.strip().partition(" ") for line in lines)}

    def places(video: str) -> list[str]:
        number = f"vid{video}" if video.isdecimal() else video
        names = [video, number, *filter(None, [name_of.get(number)])]
        return [place for name in names for place in video_paths(name, "videos", "YouTubeClips")]

    return _read(annotations, media, places)


def read_msrvtt(annotations: Path, media: MediaFolder) -> list[Question]:
    """Read `test_qa.json`; videos at NAME.mp4, or by number at videoN.mp4."""

    def places(video: str) -> list[str]:
        names = [f"video{video}", video] if video.isdecimal() else [video]
        return [place for name in names for place in video_paths(name, "videos", "TestVideo")]

    return _read(annotations, media, places)


def read_activitynet(annotations: Path, media: MediaFolder) -> list[Question]:
    """Read `test_q.json` and `test_a.json` beside it, joined by question_id; videos at v_NAME.mp4, .mkv, ...

    Raises:
      UserError: a question has no answer, or two different ones.
    """
    if not annotations.stem.endswith("_q"):
        raise UserError(
            f"--annotations is {str(annotations)!r}, expected the file of questions, such as test_q.json."
        )
    answers = _read_answers(
        annotations.with_name(f"{annotations.stem.removesuffix('_q')}_a{annotations.suffix}")
    )

    def places(video: str) -> list[str]:
        names = [video] if video.startswith("v_") else [f"v_{video}", video]
        return [place for name in names for place in video_paths(name, "videos", "all_test")]

    return _read(annotations, media, places, answers)


def _read_answers(path: Path) -> dict[str, str]:
    """Return {question_id: answer}."""
    answers: dict[str, str] = {}

    def parse(entry: dict[str, JsonValue]) -> list[Question]:
        name = id_of(entry.get("question_id"))
        answer = word_of(entry.get("answer"), "answer")
        if answers.setdefault(name, answer) != answer:
            raise InvalidEntry(f"question {name!r} has two answers, {answers[name]!r} and {answer!r}")
        return [Question(name, path, "", answer, "open")]

    read_questions(path, table_entries(path), parse)
    return answers


def _read(
    annotations: Path,
    media: MediaFolder,
    places: Callable[[str], list[str]],
    answers: Mapping[str, str] | None = None,
) -> list[Question]:
    """Read a file of questions.

    places: turns a video's name into the paths at which it may be. answers: by question id; None: they are in
    the file itself.
    """

    def parse(entry: dict[str, JsonValue]) -> Question:
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
            first_existing(places(video), "video_name", media),
            text_of(entry.get("question"), "question"),
            answer,
            "open",
            rubrics=_RUBRICS,
        )

    return read_questions(annotations, table_entries(annotations), parse)


BENCHMARKS = {
    "msvd_qa": Benchmark("MSVD-QA", read_msvd, settings={"free_max_new_tokens": 64}),
    "msrvtt_qa": Benchmark("MSRVTT-QA", read_msrvtt, settings={"free_max_new_tokens": 64}),
    "activitynet_qa": Benchmark("ActivityNet-QA", read_activitynet, settings={"free_max_new_tokens": 64}),
}
