"""`train` from video files to answers, then `chat`, as a user runs them."""

import json
import re
import shutil

import pytest
from PIL import Image

from dynfocus_jax.data.prepare import prepare_data_root
from tests.commands import command
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def heldout(data_root):
    """Folder of the generated data."""
    config = tiny_config()
    config.data.root = str(data_root)
    return prepare_data_root(config.data)


@pytest.fixture(scope="module")
def run(data_root, tmp_path_factory):
    """(workdir, arguments, stdout) of a finished run that was stopped and resumed once."""
    folder = tmp_path_factory.mktemp("end_to_end")
    (folder / "tiny.py").write_text("from tests.tiny import tiny_config as get_config\n")
    workdir = folder / "run"
    arguments = [f"--config={folder}/tiny.py", f"--config.data.root={data_root}", f"--workdir={workdir}"]
    code, stdout, stderr = command("train", *arguments, "--stop_at=pretrain_sequences:2")
    assert code == 0, stderr
    assert "stopped at step 2 of stage pretrain_sequences" in stdout
    assert not (workdir / "eval.json").exists()

    unfinished = folder / "unfinished"
    shutil.copytree(workdir, unfinished)
    code, stdout, stderr = command("train", *arguments)
    assert code == 0, stderr
    assert "stage pretrain_images: already finished" in stdout
    assert "resumed at step 2" in stdout
    return workdir, arguments, stdout


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_evaluation_file(run, heldout):
    results = json.loads((run[0] / "eval.json").read_text())
    questions = json.loads((heldout / "heldout.json").read_text())
    assert results["questions"] == len(questions)
    assert results["unread"] == 0
    for key in ("accuracy", "needle_recall", "selection_chance"):
        assert isinstance(results[key], float)
        assert 0 <= results[key] <= 1
    assert set(results["accuracy_by_type"]) == {entry["type"] for entry in questions}
    assert results["frames"] == 16
    # Of 16 frames, J = 2 are cones of P = 4 and M = 4 + 2 tokens; the others have two tokens each.
    assert results["visual_tokens"] == 2 * 14 + 2 * 10
    assert list(results["seconds_by_stage"]) == [
        *("data", "pretrain_images", "pretrain_sequences", "align", "instruct", "evaluation")
    ]
    assert all(seconds >= 0 for seconds in results["seconds_by_stage"].values())


def test_predictions_agree_with_the_metrics(run, heldout):
    results = json.loads((run[0] / "eval.json").read_text())
    predictions = read_jsonl(run[0] / "predictions.jsonl")
    questions = json.loads((heldout / "heldout.json").read_text())
    assert [entry["id"] for entry in predictions] == [entry["id"] for entry in questions]
    for prediction, question in zip(predictions, questions, strict=True):
        assert prediction["answer"] == question["conversations"][1]["value"]
        assert [prediction["needles"]] == question["needle_frames"]
        assert prediction["correct"] == (prediction["prediction"] == prediction["answer"])
        assert len(set(prediction["focus"])) == 2
        assert prediction["focus"] == sorted(prediction["focus"])
    recalls = [
        len(set(entry["focus"]) & set(entry["needles"])) / len(entry["needles"])
        for entry in predictions
        if entry["needles"]
    ]
    assert results["needle_recall"] == pytest.approx(sum(recalls) / len(recalls))
    assert results["accuracy"] == pytest.approx(
        sum(entry["correct"] for entry in predictions) / len(questions)
    )


def test_printed_table(run):
    assert re.search(r"accuracy +\d+\.\d %", run[2])
    assert re.search(r"needle recall +\d+\.\d % \(random \d+\.\d %\)", run[2])
    assert "48.0 for 16.0 frames" in run[2]


def test_metrics(run):
    metrics = read_jsonl(run[0] / "metrics.jsonl")
    names = ("pretrain_images", "pretrain_sequences", "align", "instruct")
    assert [(entry["stage"], entry["step"]) for entry in metrics] == [(n, s) for n in names for s in (2, 4)]
    for entry in metrics:
        assert entry["loss"] > 0
        assert entry["grad_norm"] > 0
        assert entry["frames_per_second"] > 0
        assert entry["tokens_per_second"] > 0
        assert entry["skipped"] == 0


def test_focus_picture(run):
    with Image.open(run[0] / "focus.png") as picture:
        width, height = picture.size
        assert 1500 < width < 4000
        assert 500 < height < 2000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000


def test_a_finished_run_is_not_repeated(run):
    workdir, arguments, _ = run
    checkpoints = sorted(path for path in (workdir / "checkpoints").rglob("*") if path.is_file())
    times = {path: path.stat().st_mtime_ns for path in checkpoints}
    assert len(times) > 10
    metrics, predictions = ((workdir / name).read_text() for name in ("metrics.jsonl", "predictions.jsonl"))
    evaluation = json.loads((workdir / "eval.json").read_text())
    code, stdout, stderr = command("train", *arguments)
    assert code == 0, stderr
    assert "stage instruct: already finished" in stdout
    after = sorted(path for path in (workdir / "checkpoints").rglob("*") if path.is_file())
    assert {path: path.stat().st_mtime_ns for path in after} == times
    assert (workdir / "metrics.jsonl").read_text() == metrics
    assert (workdir / "predictions.jsonl").read_text() == predictions
    again = json.loads((workdir / "eval.json").read_text())
    assert again.pop("seconds_by_stage").keys() == evaluation.pop("seconds_by_stage").keys()
    assert again == evaluation


@pytest.mark.parametrize("field", ["--config.stages[3].learning_rate=0.1", "--config.stages[0].clip=2.0"])
def test_changed_settings_are_refused_and_the_run_is_unchanged(run, field):
    """The settings of the last stage and of a finished one may not change; the workdir stays as it is."""
    workdir, arguments, _ = run
    before = {name: (workdir / name).read_text() for name in ("config.json", "metrics.jsonl", "eval.json")}
    code, _, stderr = command("train", *arguments, field)
    after = {name: (workdir / name).read_text() for name in before}
    for name, text in before.items():  # restored for the next tests
        (workdir / name).write_text(text)
    assert code == 2
    assert field.rpartition(".")[2].partition("=")[0] in stderr
    assert after == before


# --- Chat ---------------------------------------------------------------------------------------------


def test_chat_has_the_answer_and_focus_of_the_evaluation(run, heldout, tmp_path):
    workdir = run[0]
    prediction = read_jsonl(workdir / "predictions.jsonl")[0]
    (record,) = [r for r in json.loads((heldout / "heldout.json").read_text()) if r["id"] == prediction["id"]]
    picture = tmp_path / "focus.png"
    arguments = [f"--checkpoint={workdir}", f"--video={heldout / record['video']}"]
    limit = tiny_config().evaluation.max_new_tokens
    code, stdout, stderr = command(
        "chat",
        *arguments,
        f"--question={prediction['question']}",
        f"--focus_picture={picture}",
        f"--max_new_tokens={limit}",
    )
    assert code == 0, stderr
    answer, took, drawn = stdout.splitlines()
    assert answer == (prediction["prediction"] or "(no answer)")
    assert [int(i) for i in re.findall(r"(\d+) \(\d+\.\d\d s, score \d\.\d\d\)", took)] == prediction["focus"]
    assert "16 frames: 2 in focus with 10 tokens, 14 others with 2;" in took
    assert "48 visual and" in took
    assert drawn == f"wrote {picture}"
    with Image.open(picture) as image:
        assert image.size[0] > 1000

    again = command(
        "chat", *arguments, f"--max_new_tokens={limit}", input=f"{prediction['question']}\n/nothing\n/quit\n"
    )
    assert again[0] == 0, again[2]
    first, _, error = again[1].splitlines()
    assert first == answer
    assert error.startswith("error: /nothing is not a command")


def chat_error(*arguments):
    """Run `chat`, check that it fails, and return its error line."""
    code, stdout, stderr = command("chat", *arguments)
    assert code == 2, stderr
    assert stdout == ""
    (line,) = [line for line in stderr.splitlines() if line]
    assert line.startswith("error: ")
    return line


def test_chat_about_a_missing_file(run):
    line = chat_error(f"--checkpoint={run[0]}", "--video=nowhere.mp4", "--question=what shape is red ?")
    assert "--video nowhere.mp4 does not exist" in line


def test_chat_about_a_file_that_is_not_a_video(run, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    line = chat_error(f"--checkpoint={run[0]}", f"--video={text}", "--question=what shape is red ?")
    assert f"{text}: not a readable video" in line


def test_chat_with_an_unfinished_run(run):
    unfinished = run[0].parent / "unfinished"
    line = chat_error(f"--checkpoint={unfinished}", "--video=a.mp4", "--question=what ?")
    assert "instruct" in line
    assert "finish the training run" in line
