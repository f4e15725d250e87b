"""Miniature benchmarks: videos, annotation files in the published formats, and a scripted engine."""

import csv
import json
import runpy
import shutil
from pathlib import Path

from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.evaluation.benchmark_run import prepare_output, run_benchmark
from dynfocus_jax.evaluation.benchmarks import read_benchmark
from dynfocus_jax.evaluation.question_prompts import ClipReader
from dynfocus_jax.media.frame_sampling import UNIFORM
from dynfocus_jax.serving.engine import Completion
from tests.media.videos import encode, numbered

FRAMES = 4
COLOURS = ["A. Red.", "B. Blue.", "C. Green.", "D. Grey."]
NEXTQA = ["video", "frame_count", "width", "height", "question", "answer", "qid", "type"]
NEXTQA += ["a0", "a1", "a2", "a3", "a4"]
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "benchmarks.py"


class ScriptedEngine:
    """An engine that answers each question with its words in `script`, and records the requests.

    fails: ids whose completion is an error.
    """

    def __init__(self, script, fails=()):
        self.script, self.fails, self.requests = dict(script), set(fails), []

    def generate(self, requests):
        self.requests += requests
        return [self._complete(request) for request in requests]

    def _complete(self, request):
        assert len(request.clip.frames) == FRAMES  # each question has a video
        if request.id in self.fails:
            return Completion(request.id, error="the conversation is too long")
        return Completion(request.id, self.script[request.id], (1, 2), "stop", 8, 10)

    def prompt(self, question_id):
        """Return the text of the user's turn of a question."""
        (request,) = [each for each in self.requests if each.id == question_id]
        ((role, text),) = request.messages
        assert role == "user"
        return text


def videos(folder, *names):
    """Write small videos with these names below the folder, and return it."""
    source = folder / ".source.mp4"
    folder.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        encode(source, numbered(8, 32, 32))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    return folder


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_csv(path, header, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def settings(name, **changes):
    """Return a benchmark's section of configs/benchmarks.py, with changes."""
    section = runpy.run_path(str(CONFIG))["get_config"]()[name]
    section.update(changes)
    return section


def make_clips(limit=FRAMES):
    return ClipReader(MediaReader(16), limit, UNIFORM)


def evaluate(name, annotations, media, output, engine, **options):
    """Evaluate a benchmark with a scripted engine and return the results."""
    questions = read_benchmark(name, annotations, media)
    section = options.pop("settings", settings(name))
    prepare_output(output, name, questions, {"checkpoint": "scripted"})
    return run_benchmark(output, name, questions, engine, make_clips(), section, **options)


def videomme(tmp_path):
    """Write five questions about three videos, one of which is missing, and return (annotations, media).

    One id occurs twice.
    """

    def video(number, duration, domain, *questions):
        return {
            "video_id": number,
            "duration": duration,
            "domain": domain,
            "sub_category": "Colours",
            "url": f"https://www.youtube.com/watch?v=name{number}",
            "questions": [
                {
                    "question_id": i,
                    "task_type": task,
                    "question": f"Which {i}?",
                    "options": COLOURS,
                    "answer": a,
                }
                for i, task, a in questions
            ],
        }

    content = [
        video("001", "short", "Knowledge", ("001-1", "Counting", "A"), ("001-2", "OCR", "B")),
        video("002", "long", "Sports", ("002-1", "OCR", "C"), ("002-1", "OCR", "D")),
        video("003", "long", "Sports", ("003-1", "Counting", "A")),
    ]
    media = videos(tmp_path / "videos", "data/name001.mp4", "name002.mp4")
    return write_json(tmp_path / "videomme.json", content), media
