"""VCG-Bench (Video-ChatGPT): free answers judged in five dimensions."""

from collections.abc import Callable
from pathlib import Path

from dynfocus_jax.evaluation.questions import (
    Question,
    annotation_files,
    media_file,
    read_questions,
    with_suffixes,
)
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import json_list_entries
from dynfocus_jax.records.fields import text_of

_FILES = ("generic_qa.json", "temporal_qa.json", "consistency_qa.json")
# {dimension: what the judge is asked}, the dimensions as the papers abbreviate them.
_RUBRICS = {
    "generic_qa": {"CI": "vcg_correctness", "DO": "vcg_detail", "CU": "vcg_context"},
    "temporal_qa": {"TU": "vcg_temporal"},
    "consistency_qa": {"CO": "vcg_consistency"},
}


def read_vcg(annotations: Path, media: MediaFolder) -> list[Question]:
    """The folder with the three files, or one of them; videos at NAME.mp4 or Test_Videos/NAME.mp4.

    An entry of consistency_qa.json is two questions, which are judged together.
    """
    questions = []
    for file in annotation_files(annotations, _FILES):
        questions += read_questions(file, json_list_entries(file), _parser(file.stem, media))
    return questions


def _parser(name: str, media: MediaFolder) -> Callable[[dict], list[Question]]:
    entries = 0

    def parse(entry: dict) -> list[Question]:
        nonlocal entries
        number, entries = entries, entries + 1
        video = text_of(entry.get("video_name"), "video_name")
        path = media_file(media, "video_name", with_suffixes(video, "Test_Videos", "videos"))
        answer = text_of(entry.get("A"), "A")
        keys = ("Q1", "Q2") if name == "consistency_qa" else ("Q",)
        return [
            Question(
                f"{name}/{number}/{key}",
                path,
                text_of(entry.get(key), key),
                answer,
                "open",
                groups={"file": (name,)},
                belongs_to=f"{name}/{number}",
                about={"rubrics": _RUBRICS.get(name, _RUBRICS["generic_qa"])},
            )
            for key in keys
        ]

    return parse
