"""VCG-Bench (Video-ChatGPT): open answers, judged in five dimensions."""

import itertools
from collections.abc import Callable
from pathlib import Path

from dynfocus_jax.evaluation.benchmark import Benchmark
from dynfocus_jax.evaluation.questions import (
    Question,
    annotation_files,
    read_questions,
    video_paths,
)
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import JsonValue, json_list_entries
from dynfocus_jax.records.fields import first_existing, text_of

_FILES = ("generic_qa.json", "temporal_qa.json", "consistency_qa.json")
# {dimension: rubric}, with the papers' abbreviations of the dimensions
_RUBRICS = {
    "generic_qa": {"CI": "vcg_correctness", "DO": "vcg_detail", "CU": "vcg_context"},
    "temporal_qa": {"TU": "vcg_temporal"},
    "consistency_qa": {"CO": "vcg_consistency"},
}


def read_vcg(annotations: Path, media: MediaFolder) -> list[Question]:
    """Read a folder with the three files, or one of them; videos at NAME.mp4 or Test_Videos/NAME.mp4.

    An entry of consistency_qa.json has two questions, which are judged together.
    """
    questions = []
    for file in annotation_files(annotations, _FILES):
        questions += read_questions(file, json_list_entries(file), _make_parser(file.stem, media))
    return questions


def _make_parser(name: str, media: MediaFolder) -> Callable[[dict[str, JsonValue]], list[Question]]:
    numbers = itertools.count()

    def parse(entry: dict[str, JsonValue]) -> list[Question]:
        number = next(numbers)
        video = text_of(entry.get("video_name"), "video_name")
        path = first_existing(video_paths(video, "Test_Videos", "videos"), "video_name", media)
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
                unit=f"{name}/{number}",
                rubrics=_RUBRICS.get(name, _RUBRICS["generic_qa"]),
            )
            for key in keys
        ]

    return parse


BENCHMARKS = {"vcgbench": Benchmark("VCG-Bench", read_vcg, num_dimensions=5)}
