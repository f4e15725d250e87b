"""Open answers marked by a local judge with scripted replies, benchmark by benchmark."""

import json

import pytest

from dynfocus_jax.errors import RunError
from dynfocus_jax.evaluation.judge import Judge
from dynfocus_jax.evaluation.judge_settings import JudgeSettings
from tests.evaluation.chat_server import chat_server, send
from tests.evaluation.miniature import ScriptedEngine, evaluate, videos, write_json


def reply(text):
    return {"model": "local-1", "choices": [{"message": {"role": "assistant", "content": text}}]}


def judge_at(server, tmp_path):
    settings = JudgeSettings("local", server.url, key_variable="", cache=tmp_path / "judge.jsonl")
    return Judge(settings._replace(attempts=2, concurrency=2))


def test_question_answering(tmp_path):
    """Accuracy and score over four questions: right, wrong, with an unreadable reply, without a video."""
    rows = [
        {"video_name": f"v{i}", "question": f"who is {i}?", "question_id": str(i), "answer": "man"}
        for i in range(4)
    ]
    annotations = write_json(tmp_path / "test_qa.json", rows)
    media = videos(tmp_path / "videos", "v0.mp4", "v1.mp4", "v2.mp4")
    words = {"who is 0?": "{'pred': 'yes', 'score': 4}", "who is 1?": "{'pred': 'no', 'score': 1}"}

    def behave(handler, request, count):
        (question,) = [line for line in request.question.splitlines() if line.startswith("Question: ")]
        send(handler, 200, reply(words.get(question.removeprefix("Question: "), "I would rather not")))

    engine = ScriptedEngine({"0": "a man", "1": "a dog", "2": "man"})
    with chat_server(behave) as server, judge_at(server, tmp_path) as judge:
        results = evaluate("msrvtt_qa", annotations, media, tmp_path / "out", engine, judge=judge)
    judged = results["judged"]
    assert judged["overall"] == {"judged_accuracy": 1 / 4, "judged_score": pytest.approx(5 / 4)}
    assert sorted(each["id"] for each in judged["failed"]) == ["2", "3"]
    assert judged["judge"]["models_served"] == ["local-1"]
    # "man" and "a man" match exactly; this is a different measure, under its own name.
    assert results["offline"]["overall"]["exact_match"] == 0.5
    table = (tmp_path / "out" / "table.txt").read_text()
    assert "judged_accuracy 25.0 %, judged_score 1.25" in table
    assert "exact_match 50.0 %" in table


def test_vcgbench(tmp_path):
    """Generic answers are judged in three dimensions. A consistency item has both of its questions."""
    folder = tmp_path / "vcg"
    write_json(folder / "generic_qa.json", [{"Q": "What?", "A": "a red car", "video_name": "v"}])
    write_json(folder / "temporal_qa.json", [{"Q": "When?", "A": "at the end", "video_name": "v"}])
    write_json(
        folder / "consistency_qa.json",
        [{"Q1": "Which first?", "Q2": "Which second?", "A": "red", "video_name": "v"}],
    )
    media = videos(tmp_path / "videos", "v.mp4")
    seen = []

    def behave(handler, request, count):
        system = request.body["messages"][0]["content"]
        seen.append(request.question)
        marks = (("detail orientation", 2), ("contextual", 3), ("temporal", 1), ("consistency of", 5))
        score = next((score for words, score in marks if words in system), 4)
        send(handler, 200, reply(f"{{'score': {score}}}"))

    script = {"generic_qa/0/Q": "a car", "temporal_qa/0/Q": "now"}
    script |= {"consistency_qa/0/Q1": "first words", "consistency_qa/0/Q2": "second words"}
    with chat_server(behave) as server, judge_at(server, tmp_path) as judge:
        results = evaluate("vcgbench", folder, media, tmp_path / "out", ScriptedEngine(script), judge=judge)
    overall = results["judged"]["overall"]
    assert overall == {"CI": 4.0, "DO": 2.0, "CU": 3.0, "TU": 1.0, "CO": 5.0, "mean": 3.0}
    (consistency,) = [text for text in seen if "Which first?" in text]
    assert all(text in consistency for text in ("Which second?", "first words", "second words"))
    assert len(seen) == 5


def test_mlvu_generation(tmp_path):
    """G-Avg is the mean over the two tasks, each of which sums two scores."""
    folder = tmp_path / "json"
    free = {"video": "c.mp4", "duration": 9.0, "question": "What happens?", "answer": "The dog runs away"}
    points = {"question_type": "subPlot", "scoring_points": ["a dog", "it runs"]}
    write_json(folder / "8_sub_scene.json", [free | points])
    write_json(folder / "9_summary.json", [free | {"question_type": "summary"}])
    media = videos(tmp_path / "videos", "c.mp4")

    def behave(handler, request, count):
        if "it runs" in request.question:
            text = "{'score_accuracy': 4, 'score_relevance': 3}"
        else:
            text = "{'score_completeness': 2, 'score_reliability': 1}"
        send(handler, 200, reply(text))

    engine = ScriptedEngine({"8_sub_scene/c.mp4": "A dog", "9_summary/c.mp4": "Some dog"})
    with chat_server(behave) as server, judge_at(server, tmp_path) as judge:
        results = evaluate("mlvu", folder, media, tmp_path / "out", engine, judge=judge)
    assert results["judged"]["overall"] == {"SSC": 7.0, "VS": 3.0, "G-Avg": 5.0}
    assert "closed" not in results


def test_a_judge_that_is_down(tmp_path):
    """The answers are kept, so a later run only asks the judge."""
    rows = [{"video_name": "v", "question": "who?", "question_id": "1", "answer": "man"}]
    annotations = write_json(tmp_path / "test_qa.json", rows)
    media = videos(tmp_path / "videos", "v.mp4")
    options = {"key_variable": "", "attempts": 2}
    settings = JudgeSettings("local", "http://127.0.0.1:9/v1", **options)
    with Judge(settings) as judge, pytest.raises(RunError) as caught:
        evaluate("msrvtt_qa", annotations, media, tmp_path / "out", ScriptedEngine({"1": "man"}), judge=judge)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "results.json").exists()
    (line,) = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["prediction"] == "man"
    later = ScriptedEngine({})
    with (
        chat_server(lambda handler, *_: send(handler, 200, reply("{'pred': 'yes', 'score': 5}"))) as server,
        judge_at(server, tmp_path) as judge,
    ):
        results = evaluate("msrvtt_qa", annotations, media, tmp_path / "out", later, judge=judge)
    assert later.requests == []
    assert results["judged"]["overall"] == {"judged_accuracy": 1.0, "judged_score": 5.0}
