"""MVBench: twenty tasks of multiple choice, in a file each. Its measure is the mean of their accuracies."""

from pathlib import Path
from typing import NamedTuple

from dynfocus_jax.evaluation.benchmark import CHOICE_PROMPT, Benchmark
from dynfocus_jax.evaluation.measures import mean_over
from dynfocus_jax.evaluation.questions import (
    Question,
    annotation_files,
    letter_of_text,
    read_questions,
    texts_of,
)
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import JsonValue, json_list_entries
from dynfocus_jax.records.fields import first_existing, path_of, span_of, text_of


class _Task(NamedTuple):
    folder: str  # of the videos
    has_span: bool = False  # questions are about the seconds from "start" to "end"
    has_frames: bool = False  # a video is a folder of frames, at 3 frames per second


_CHARADES, _CLEVRER, _PERCEPTION = "star/Charades_v1_480", "clevrer/video_validation", "perception/videos"
_TASKS = {
    "action_sequence": _Task(_CHARADES, has_span=True),
    "action_prediction": _Task(_CHARADES, has_span=True),
    "action_antonym": _Task("ssv2_video"),
    "fine_grained_action": _Task("Moments_in_Time_Raw/videos"),
    "unexpected_action": _Task("FunQA_test/test"),
    "object_existence": _Task(_CLEVRER),
    "object_interaction": _Task(_CHARADES, has_span=True),
    "object_shuffle": _Task(_PERCEPTION),
    "moving_direction": _Task(_CLEVRER),
    "action_localization": _Task("sta/sta_video", has_span=True),
    "scene_transition": _Task("scene_qa/video"),
    "action_count": _Task(_PERCEPTION),
    "moving_count": _Task(_CLEVRER),
    "moving_attribute": _Task(_CLEVRER),
    "state_change": _Task(_PERCEPTION),
    "fine_grained_pose": _Task("nturgbd"),
    "character_order": _Task(_PERCEPTION),
    "egocentric_navigation": _Task("vlnqa"),
    "episodic_reasoning": _Task("tvqa/frames_fps3_hq", has_span=True, has_frames=True),
    "counterfactual_inference": _Task(_CLEVRER),
}

measure_mvbench = mean_over("task", name="mean_accuracy", num_categories=len(_TASKS))


def read_mvbench(annotations: Path, media: MediaFolder) -> list[Question]:
    """Read the files TASK.json of a folder or of its subfolder "json", or a single one of them.

    Videos are at the published archives' paths, below the media folder, its "video" or its "data0613".
    """
    files = annotation_files(annotations, [f"{task}.json" for task in _TASKS])
    return [question for file in files for question in _read_task(file, media)]


def _read_task(file: Path, media: MediaFolder) -> list[Question]:
    name = file.stem
    task = _TASKS.get(name, _Task(""))

    def parse(entry: dict[str, JsonValue]) -> Question:
        options = texts_of(entry.get("candidates"), "candidates")
        video = text_of(entry.get("video"), "video")
        places = [f"{parent}{task.folder}/{video}" for parent in ("", "video/", "data0613/")] + [video]
        if task.has_frames:
            place = next(filter(media.has, places), places[0])
            path = path_of(f"{place}/00001.jpg", "video", media).parent
        else:
            path = first_existing(places, "video", media)
        return Question(
            f"{name}/{video}",
            path,
            text_of(entry.get("question"), "question"),
            letter_of_text(entry.get("answer"), "answer", options),
            "choice",
            options,
            {"task": (name,)},
            span=span_of(entry) if task.has_span else None,
            frames_per_second=3.0 if task.has_frames else None,
        )

    return read_questions(file, json_list_entries(file), parse)


BENCHMARKS = {
    "mvbench": Benchmark("MVBench", read_mvbench, measure_mvbench, settings={"prompt": CHOICE_PROMPT})
}
