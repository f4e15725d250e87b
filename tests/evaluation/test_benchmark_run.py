"""Runs of a benchmark: interrupted, by several processes, with failures, and with errors in the input."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.evaluation.answering import assign_questions
from dynfocus_jax.evaluation.benchmark_run import Processes, prepare_output, run_benchmark, write_results
from dynfocus_jax.evaluation.benchmarks import read_benchmark
from dynfocus_jax.evaluation.predictions import PredictionStore
from tests.evaluation.miniature import (
    NEXTQA,
    ScriptedEngine,
    evaluate,
    make_clips,
    settings,
    videomme,
    videos,
    write_csv,
    write_json,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = dict.fromkeys(("001-1", "001-2", "002-1", "002-1#2"), "A")


def results_of(folder):
    return (folder / "results.json").read_bytes()


def entries_of(folder):
    files = sorted(folder.glob("predictions*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_killed_and_resumed(tmp_path):
    """After kill -9 between two answers, the results equal those of an uninterrupted run, byte for byte."""
    annotations, media = videomme(tmp_path)
    command = [sys.executable, "-m", "tests.evaluation.slow_run", annotations, media, tmp_path / "killed"]
    process = subprocess.Popen(
        list(map(str, command)), cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}
    )
    file = tmp_path / "killed" / "predictions.jsonl"
    deadline = time.monotonic() + 240
    while not (file.exists() and file.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = entries_of(tmp_path / "killed")
    assert 1 <= len(before) < 5
    assert not (tmp_path / "killed" / "results.json").exists()
    engine = ScriptedEngine(SCRIPT)
    evaluate("videomme", annotations, media, tmp_path / "killed", engine)
    assert {each.id for each in engine.requests} == set(SCRIPT) - {each["id"] for each in before}
    evaluate("videomme", annotations, media, tmp_path / "uninterrupted", ScriptedEngine(SCRIPT))
    assert results_of(tmp_path / "killed") == results_of(tmp_path / "uninterrupted")


def test_a_second_run_asks_only_failed_questions(tmp_path):
    """A question whose video appears after the first run is answered and counts."""
    annotations, media = videomme(tmp_path)
    evaluate("videomme", annotations, media, tmp_path / "out", ScriptedEngine(SCRIPT))
    again = ScriptedEngine(SCRIPT)
    evaluate("videomme", annotations, media, tmp_path / "out", again)
    assert again.requests == []
    videos(media, "data/name003.mp4")
    later = ScriptedEngine({"003-1": "A"})
    results = evaluate("videomme", annotations, media, tmp_path / "out", later)
    assert [each.id for each in later.requests] == ["003-1"]
    assert results["failed"] == []
    assert results["answered"] == 5
    assert results["closed"]["overall"] == {"accuracy": 2 / 5}


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes(tmp_path, processes):
    """Each process answers its own questions, and the results equal those of one process."""
    annotations, media = videomme(tmp_path)
    evaluate("videomme", annotations, media, tmp_path / "one", ScriptedEngine(SCRIPT))
    questions = read_benchmark("videomme", annotations, media)
    output, engines = tmp_path / "several", [ScriptedEngine(SCRIPT) for _ in range(processes)]
    prepare_output(output, "videomme", questions, {"checkpoint": "scripted"})
    returned = {}

    def work(process):
        name = "predictions.jsonl" if process == 0 else f"predictions.{process}.jsonl"
        share = Processes(process, processes)
        returned[process] = run_benchmark(
            output,
            "videomme",
            questions,
            engines[process],
            make_clips(),
            settings("videomme"),
            processes=share,
            file_name=name,
            poll_seconds=0.01,
        )

    threads = [threading.Thread(target=work, args=(process,)) for process in reversed(range(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results_of(output) == results_of(tmp_path / "one")
    assert [returned[0]] * processes == list(returned.values())
    asked = [each.id for engine in engines for each in engine.requests]
    assert sorted(asked) == sorted(SCRIPT)
    assert sorted(each["id"] for each in entries_of(output)) == sorted([*SCRIPT, "003-1"])
    # A run with another number of processes resumes.
    last = ScriptedEngine(SCRIPT)
    evaluate("videomme", annotations, media, output, last)
    assert last.requests == []
    assert results_of(output) == results_of(tmp_path / "one")


def test_processes_get_disjoint_and_complete_questions(tmp_path):
    rows = [
        {"video_name": f"v{i % 5}", "question": "who?", "question_id": str(i), "answer": "x"}
        for i in range(23)
    ]
    annotations = write_json(tmp_path / "qa.json", rows)
    questions = read_benchmark("msrvtt_qa", annotations, videos(tmp_path / "media", "v0.mp4"))
    shares = [assign_questions(questions, process, 3) for process in range(3)]
    assert sorted(q.id for share in shares for q in share) == sorted(q.id for q in questions)
    for i, share in enumerate(shares):
        for other in shares[:i]:
            assert {q.media for q in share}.isdisjoint(q.media for q in other)
        names = [q.media for q in share]
        assert names == sorted(names, key=names.index)  # questions about a video are adjacent


def test_a_video_is_read_once(tmp_path):
    """Also if its questions are in several batches. Each question about a missing video fails."""
    rows = [
        {"video_name": f"v{i % 3}", "question": "who?", "question_id": str(i), "answer": "x"}
        for i in range(12)
    ]
    questions = read_benchmark(
        "msrvtt_qa", write_json(tmp_path / "qa.json", rows), videos(tmp_path / "media", "v0.mp4", "v1.mp4")
    )
    clips, read = make_clips(), []
    one = clips.read
    clips.read = lambda question: (read.append(question.media.name), one(question))[1]
    engine = ScriptedEngine({str(i): "x" for i in range(12)})
    prepare_output(tmp_path / "out", "msrvtt_qa", questions, {})
    results = run_benchmark(
        tmp_path / "out",
        "msrvtt_qa",
        questions,
        engine,
        clips,
        settings("msrvtt_qa"),
        batch_size=3,
        threads=4,
    )
    assert sorted(read) == ["v0.mp4", "v1.mp4", "v2.mp4"]
    assert sorted(each["id"] for each in results["failed"]) == ["11", "2", "5", "8"]
    assert results["answered"] == 8


def test_a_failed_answer_is_recorded_and_wrong(tmp_path):
    annotations, media = videomme(tmp_path)
    engine = ScriptedEngine(SCRIPT, fails=["001-1"])
    results = evaluate("videomme", annotations, media, tmp_path / "out", engine)
    assert results["closed"]["overall"] == {"accuracy": 0.0}
    assert [each["id"] for each in results["failed"]] == ["001-1", "003-1"]
    entry = next(each for each in entries_of(tmp_path / "out") if each["id"] == "001-1")
    assert entry["prediction"] is None
    assert entry["correct"] is False
    assert entry["reason"] == "the conversation is too long"
    assert entry["answer"] == "A"


def test_damaged_and_truncated_videos(tmp_path):
    """Questions about the next video are not answered with frames of the damaged one."""
    annotations, media = videomme(tmp_path)
    whole = (media / "name002.mp4").read_bytes()
    (media / "name002.mp4").write_bytes(whole[: len(whole) // 2])
    (media / "data" / "name001.mp4").write_text("words")
    videos(media, "data/name003.mp4")
    engine = ScriptedEngine(SCRIPT | {"003-1": "A"})
    results = evaluate("videomme", annotations, media, tmp_path / "out", engine)
    assert [each.id for each in engine.requests] == ["003-1"]
    assert results["closed"]["overall"] == {"accuracy": 1 / 5}
    assert len(entries_of(tmp_path / "out")) == 5


def test_predictions_of_other_questions_are_not_mixed(tmp_path):
    annotations, media = videomme(tmp_path)
    evaluate("videomme", annotations, media, tmp_path / "out", ScriptedEngine(SCRIPT))
    content = json.loads(annotations.read_text())
    content[0]["questions"][0]["question"] = "Another?"
    write_json(annotations, content)
    with pytest.raises(UserError, match=r"made with other settings \(questions: then "):
        evaluate("videomme", annotations, media, tmp_path / "out", ScriptedEngine(SCRIPT))
    questions = read_benchmark("videomme", annotations, media)
    with pytest.raises(UserError, match=r"; checkpoint: then 'scripted', now 'other'\)"):
        prepare_output(tmp_path / "out", "videomme", questions, {"checkpoint": "other"})


def test_a_folder_with_the_predictions_of_a_training_run(tmp_path):
    annotations, media = videomme(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.jsonl").write_text('{"id": "heldout-0", "prediction": "square"}\n')
    with pytest.raises(UserError, match=r"made with other settings \(there is no run\.json"):
        evaluate("videomme", annotations, media, tmp_path / "out", ScriptedEngine(SCRIPT))


def test_changes_of_code_and_checkpoint_path_are_recorded(tmp_path, monkeypatch, capsys):
    """A change of the code is also printed, as answers may differ."""
    annotations, media = videomme(tmp_path)
    questions = read_benchmark("videomme", annotations, media)
    prepare_output(tmp_path / "out", "videomme", questions, {}, "runs/a")
    prepare_output(tmp_path / "out", "videomme", questions, {}, "runs/moved")
    assert capsys.readouterr().out == ""
    other = {"source": "other", "commit": None, "jax": "0"}
    monkeypatch.setattr("dynfocus_jax.evaluation.benchmark_run.code_version", lambda: other)
    prepare_output(tmp_path / "out", "videomme", questions, {}, "runs/moved")
    assert "of another version of the code" in capsys.readouterr().out
    made_by = json.loads((tmp_path / "out" / "run.json").read_text())["made_by"]
    assert [each["checkpoint"] for each in made_by] == ["runs/a", "runs/moved", "runs/moved"]
    assert made_by[2]["code"] == other


def test_results_need_every_question(tmp_path):
    annotations, media = videomme(tmp_path)
    questions = read_benchmark("videomme", annotations, media)
    prepare_output(tmp_path / "out", "videomme", questions, {})
    predictions = PredictionStore(tmp_path / "out")
    predictions.add({"id": "001-1", "prediction": "A"})
    with pytest.raises(RunError, match="4 of 5 questions have no prediction, such as '001-2'"):
        write_results(tmp_path / "out", "videomme", questions, predictions, None)


# ---- Errors in the input --------------------------------------------------------------------------------


def user_error(call):
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_missing_files(tmp_path):
    annotations, media = videomme(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()

    def read(name, annotations, media):
        return user_error(lambda: read_benchmark(name, annotations, media))

    assert "--benchmark is 'videome', expected one of" in read("videome", annotations, media)
    assert "does not exist" in read("videomme", tmp_path / "no.json", media)
    assert "is not a folder" in read("videomme", annotations, tmp_path / "no")
    assert "has none of the videos of 5 questions" in read("videomme", annotations, empty)
    assert "has none of the files 1_plotQA.json" in read("mlvu", empty, media)
    assert "test_q.json" in read("activitynet_qa", annotations, media)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.pop("answer"), 'field "answer" is missing'),
        (lambda q: q.update(answer="E"), 'field "answer" is'),
        (lambda q: q.pop("options"), 'field "options" is null'),
        (lambda q: q.update(options=["A. Red."]), "list of 2 to 26 options"),
        (lambda q: q.pop("question"), 'field "question" is missing'),
        (lambda q: q.pop("question_id"), 'field "id" is missing'),
        (lambda q: q.pop("task_type"), 'field "task_type" is missing'),
    ],
)
def test_a_missing_field(tmp_path, change, message):
    """No entry is skipped: an invalid one ends the run with an error that has its number."""
    annotations, media = videomme(tmp_path)
    content = json.loads(annotations.read_text())
    change(content[1]["questions"][0])
    write_json(annotations, content)
    text = user_error(lambda: read_benchmark("videomme", annotations, media))
    assert f"{annotations}, entry 1: " in text
    assert message in text


def test_a_malformed_url(tmp_path):
    annotations, media = videomme(tmp_path)
    content = json.loads(annotations.read_text())
    content[1]["url"] = "https://[www.youtube.com/watch?v=name002"
    write_json(annotations, content)
    text = user_error(lambda: read_benchmark("videomme", annotations, media))
    assert f"{annotations}, entry 1: " in text
    assert "expected an address" in text


def test_a_path_that_leaves_the_media_folder(tmp_path):
    row = {
        "video": "../x.mp4",
        "question": "?",
        "candidates": ["a", "b"],
        "answer": "a",
        "question_type": "ego",
    }
    annotations = write_json(tmp_path / "3_ego.json", [row])
    text = user_error(lambda: read_benchmark("mlvu", annotations, videos(tmp_path / "media", "x.mp4")))
    assert '".."' in text


def test_csv_without_a_column_and_files_that_do_not_match(tmp_path):
    media = videos(tmp_path / "media", "1.mp4")
    columns = [column for column in NEXTQA if column != "a4"]
    annotations = write_csv(tmp_path / "test.csv", columns, [])
    assert "no column 'a4'" in user_error(lambda: read_benchmark("nextqa", annotations, media))
    write_csv(tmp_path / "test.csv", NEXTQA, [])
    assert "has no questions" in user_error(lambda: read_benchmark("nextqa", annotations, media))
    row = ["1", 9, 9, 9, "why", 0, "0", "CW", "a", "b", "c", "d", "e"]
    write_csv(tmp_path / "test.csv", NEXTQA, [row])
    assert "gsub_test.json: cannot be read" in user_error(
        lambda: read_benchmark("nextgqa", annotations, media)
    )
    write_json(tmp_path / "gsub_test.json", {"1": {"location": {"5": [[0, 1]]}}})
    text = user_error(lambda: read_benchmark("nextgqa", annotations, media))
    assert "has 0 rows for entry '1_5'" in text
