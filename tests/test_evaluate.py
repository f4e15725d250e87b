"""`python -m dynfocus_jax.evaluate` from the command line: uninterrupted, killed, and in two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dynfocus_jax.sections import to_dict
from dynfocus_jax.training.checkpoints import save_params
from tests.commands import REPOSITORY, command
from tests.evaluation.miniature import videos, write_json
from tests.tiny import VOCABULARY, make_sample, model_of, pad, random_params, stack, tiny_config

FRAMES, QUESTIONS = 4, 24
LAUNCHER = REPOSITORY / "launch" / "local_multiprocess.py"


def make_run(workdir, seed=0):
    """Write the checkpoint of a training run, with random parameters."""
    workdir.mkdir(exist_ok=True)
    config = tiny_config()
    config.evaluation.media_frames = FRAMES
    config.generation.update({"max_new_tokens": 4, "text": (128,), "batch": (4,), "cache": 64})
    batch = stack([pad(make_sample(np.random.default_rng(0), 3, 4, 3), FRAMES, 6)])
    params = jax.tree.map(np.asarray, random_params(model_of(config), batch, seed))
    stage = config.stages[-1]
    save_params(workdir / "checkpoints" / stage.name / str(stage.steps), params)
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    words = ["a", "b", "c", "d", "a.", "b.", "(c)", *(f"w{i}" for i in range(VOCABULARY - 11))]
    (workdir / "vocabulary.json").write_text(json.dumps(words))
    return workdir


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """Questions about four videos, one of which is missing."""
    folder = tmp_path_factory.mktemp("benchmark")
    rows = [
        {
            "video": f"v{i % 4}.mp4",
            "question": f"w{i} w{i + 1} ?",
            "candidates": ["w1", "w2", "w3"],
            "answer": "w2",
            "question_type": "ego",
        }
        for i in range(QUESTIONS)
    ]
    annotations = write_json(folder / "3_ego.json", rows)
    return annotations, videos(folder / "videos", "v0.mp4", "v1.mp4", "v2.mp4")


def flags(checkpoint, benchmark, output, *more):
    annotations, media = benchmark
    return [
        "--benchmark=mlvu",
        f"--checkpoint={checkpoint}",
        f"--annotations={annotations}",
        f"--media={media}",
        f"--output={output}",
        "--config.batch_size=4",
        "--config.mlvu.max_new_tokens=4",
        *more,
    ]


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, benchmark, tmp_path_factory):
    """(folder, stdout) of an uninterrupted run."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    code, stdout, stderr = command("evaluate", *flags(checkpoint, benchmark, output))
    assert code == 0, stderr
    return output, stdout


def entries_of(folder: Path) -> list[dict]:
    files = sorted(folder.glob("predictions*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_run(uninterrupted):
    output, stdout = uninterrupted
    results = json.loads((output / "results.json").read_text())
    assert (results["questions"], results["answered"]) == (QUESTIONS, 18)
    assert all("v3.mp4: no such file" in each["reason"] for each in results["failed"])
    entries = entries_of(output)
    assert len(entries) == QUESTIONS
    right = sum(entry["correct"] for entry in entries)
    assert results["closed"]["overall"] == {"M-Avg of 1 of 7": right / QUESTIONS}
    made = results["predictions"]
    assert (made["checkpoint"]["stage"], made["checkpoint"]["step"]) == ("instruct", "4")
    assert len(made["checkpoint"]["weights"]) == 16
    assert made["model"]["num_frames"] == FRAMES
    assert made["asked"]["answer_start"] == "Best Option: ("
    assert len(made["made_by"]) == 1
    assert "24 questions about 4 videos, 1 of them missing" in stdout
    assert (output / "table.txt").read_text().strip() in stdout


def test_killed_and_resumed(uninterrupted, checkpoint, benchmark, tmp_path):
    arguments = flags(checkpoint, benchmark, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "dynfocus_jax.evaluate", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
    )
    file = tmp_path / "predictions.jsonl"
    while not (file.exists() and b'"parsed"' in file.read_bytes()):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= len(file.read_text().splitlines()) < QUESTIONS
    (tmp_path / "predictions.jsonl").open("a").write('{"id": "half a li')
    code, _, stderr = command("evaluate", *arguments)
    assert code == 0, stderr
    assert (tmp_path / "results.json").read_bytes() == (uninterrupted[0] / "results.json").read_bytes()
    assert len({entry["id"] for entry in entries_of(tmp_path)}) == QUESTIONS


def test_predictions_of_other_weights_are_not_mixed(uninterrupted, benchmark, tmp_path):
    """A run with the same settings and step but other weights is refused, and changes nothing."""
    before = {path.name: path.read_bytes() for path in uninterrupted[0].iterdir()}
    code, _, stderr = command(
        "evaluate", *flags(make_run(tmp_path / "other", seed=1), benchmark, uninterrupted[0])
    )
    assert code == 2
    assert "has predictions made with other settings (checkpoint.weights: then" in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in uninterrupted[0].iterdir()} == before


def test_two_processes(uninterrupted, checkpoint, benchmark, tmp_path):
    arguments = flags(checkpoint, benchmark, tmp_path)
    launched = [sys.executable, str(LAUNCHER), "--processes=2", "--", sys.executable, "-m"]
    done = subprocess.run(
        [*launched, "dynfocus_jax.evaluate", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "results.json").read_bytes() == (uninterrupted[0] / "results.json").read_bytes()
    of_first = {json.loads(line)["id"] for line in (tmp_path / "predictions.jsonl").open()}
    of_second = {json.loads(line)["id"] for line in (tmp_path / "predictions.1.jsonl").open()}
    assert of_first.isdisjoint(of_second)
    assert len(of_first | of_second) == QUESTIONS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--benchmark=videome", "--benchmark is 'videome', expected one of"),
        ("--annotations=", "--annotations is missing"),
        ("--checkpoint=nowhere", "has no config.json"),
        ("--config.mlvu.nm_frames=3", "config.mlvu.nm_frames is not a field"),
        ("--config.judge.model=some-judge", "OPENAI_API_KEY is not set"),
        ("--config.batch_size=0", "config.batch_size is 0, expected an integer at least 1"),
        ("--config.mlvu.sampling.kind=odd", "config.mlvu.sampling.kind is 'odd', expected one of"),
    ],
)
def test_errors_in_the_flags(checkpoint, benchmark, tmp_path, change, message):
    code, _, stderr = command(
        "evaluate", *flags(checkpoint, benchmark, tmp_path, change), OPENAI_API_KEY="", timeout=300
    )
    assert code == 2
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1
