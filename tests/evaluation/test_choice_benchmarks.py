"""Multiple choice in the published file formats, with scripted answers and scores worked out by hand.

Each benchmark has an answer that cannot be parsed, a missing video, and an id that occurs twice.
"""

import json

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.benchmarks import BENCHMARKS, lvbench, read_benchmark
from tests.evaluation.miniature import (
    COLOURS,
    ScriptedEngine,
    evaluate,
    settings,
    videomme,
    videos,
    write_json,
)

THIRD = pytest.approx(1 / 3)


def test_every_benchmark_has_its_settings():
    assert all(settings(name).prompt for name in BENCHMARKS)


def ids(entries):
    return [each["id"] for each in entries]


# ---- Video-MME ------------------------------------------------------------------------------------------


def test_videomme(tmp_path):
    annotations, media = videomme(tmp_path)
    engine = ScriptedEngine({"001-1": "A", "001-2": "C. Green", "002-1": "(C)", "002-1#2": "I cannot tell"})
    results = evaluate("videomme", annotations, media, tmp_path / "out", engine)
    assert (results["questions"], results["answered"]) == (5, 4)
    # Right: 001-1 and 002-1. Wrong: 001-2. Unparsed: the second 002-1. Missing: the video of 003-1.
    assert results["closed"]["overall"] == {"accuracy": 2 / 5}
    by = results["closed"]["by"]
    assert by["duration"] == {
        "short": {"questions": 2, "accuracy": 0.5},
        "long": {"questions": 3, "accuracy": THIRD},
    }
    assert by["task_type"] == {
        "Counting": {"questions": 2, "accuracy": 0.5},
        "OCR": {"questions": 3, "accuracy": THIRD},
    }
    assert by["domain"]["Sports"] == {"questions": 3, "accuracy": THIRD}
    assert ids(results["not_understood"]) == ["002-1#2"]
    assert ids(results["failed"]) == ["003-1"]
    assert "no such file" in results["failed"][0]["reason"]
    assert engine.prompt("001-1") == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with "
        "only the letter (A, B, C, or D) of the correct option.\nWhich 001-1?\nA. Red.\nB. Blue.\nC. Green.\n"
        "D. Grey.\nThe best answer is:"
    )
    assert engine.requests[0].query == "Which 001-1?"  # the instructions would fill the text encoder
    table = (tmp_path / "out" / "table.txt").read_text()
    assert "short" in table
    assert "overall: accuracy 40.0 %" in table


def hub_row(number, **changes):
    return {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "x",
        "url": "https://www.youtube.com/watch?v=abc",
        "videoID": "abc",
        "question_id": f"001-{number}",
        "task_type": "OCR",
        "question": "Which?",
        "options": COLOURS,
        "answer": "A",
    } | changes


def write_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def test_videomme_in_the_format_of_the_hub(tmp_path):
    """A parquet file with several row groups gives the same results as JSON lines."""
    rows = [hub_row(1), hub_row(1), hub_row(2, options=["A. C.", "B. D."], answer="B")]
    rows.append(hub_row(3, videoID="gone", url="https://www.youtube.com/watch?v=gone"))
    rows[3]["video_id"] = "002"
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    media = videos(tmp_path / "media", "data/abc.mp4")
    script = {"001-1": "A", "001-1#2": "?", "001-2": "B"}
    both = [
        evaluate("videomme", annotations, media, tmp_path / annotations.suffix, ScriptedEngine(script))
        for annotations in (write_parquet(tmp_path / "test-00000-of-00001.parquet", rows), lines)
    ]
    assert both[0] == both[1]
    assert both[0]["closed"]["overall"] == {"accuracy": 0.5}
    assert ids(both[0]["failed"]) == ["001-3"]
    assert ids(both[0]["not_understood"]) == ["001-1#2"]


def test_parquet_that_is_damaged_or_lacks_a_column(tmp_path):
    media = videos(tmp_path / "media", "abc.mp4")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"broken\.parquet is not a parquet file"):
        read_benchmark("videomme", tmp_path / "broken.parquet", media)
    row = hub_row(1)
    del row["answer"]
    with pytest.raises(UserError, match='entry 0: field "answer" is missing'):
        read_benchmark("videomme", write_parquet(tmp_path / "rows.parquet", [row]), media)


def test_videomme_with_subtitles(tmp_path):
    """The prompt has the subtitles shown at the frames' times."""
    annotations = tmp_path / "rows.jsonl"
    annotations.write_text("".join(json.dumps(hub_row(i)) + "\n" for i in range(2)))
    media = videos(tmp_path / "media", "data/abc.mp4")
    (media / "subtitle").mkdir()
    # Four of the eight frames are sampled: 1, 3, 5 and 7, at 0.1, 0.3, 0.5 and 0.7 s
    (media / "subtitle" / "abc.srt").write_text(
        '1\n00:00:00,250 --> 00:00:00,550\n<font color="white" size=".72c">seen twice</font>\n\n'
        "2\n00:00:00,560 --> 00:00:00,650\nbetween frames\n"
    )
    engine = ScriptedEngine({"001-0": "A", "001-1": "A"})
    section = settings("videomme", subtitles=True)
    results = evaluate("videomme", annotations, media, tmp_path / "out", engine, settings=section)
    assert results["closed"]["overall"] == {"accuracy": 1.0}
    assert engine.prompt("001-0").startswith(
        "This video's subtitles are listed below:\nseen twice\nSelect the best answer to the following "
        "multiple-choice question based on the video and the subtitles. Respond with only the letter"
    )
    without = ScriptedEngine({"001-0": "A", "001-1": "A"})
    evaluate("videomme", annotations, media, tmp_path / "without", without)
    assert "subtitles" not in without.prompt("001-0")


# ---- MLVU -----------------------------------------------------------------------------------------------


def test_mlvu(tmp_path):
    """M-Avg is the mean over tasks, not over questions. Open answers have a measure of their own."""

    def choice(video, task, answer):
        return {
            "video": video,
            "duration": 480.0,
            "question": "What colour?",
            "candidates": ["Yellow", "Red", "White", "Blue"],
            "answer": answer,
            "question_type": task,
        }

    folder = tmp_path / "json"
    files = ["1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning"]
    tasks = ["plotQA", "findNeedle", "ego", "count", "order", "anomaly_reco", "topic_reasoning"]
    for file, task in zip(files, tasks, strict=True):
        rows = [choice("a.mp4", task, "Yellow")] * (3 if task == "plotQA" else 1)
        write_json(folder / f"{file}.json", rows)
    write_json(folder / "4_count.json", [choice("gone.mp4", "count", "Red")])
    free = {"video": "c.mp4", "duration": 9.0, "question": "What happens?", "answer": "The dog runs away"}
    write_json(
        folder / "8_sub_scene.json",
        [free | {"question_type": "subPlot", "scoring_points": ["a dog", "it runs"]}],
    )
    write_json(folder / "9_summary.json", [free | {"question_type": "summary"}])
    media = videos(
        tmp_path / "videos",
        "1_plotQA/a.mp4",
        "video/2_needle/a.mp4",
        "a.mp4",
        "8_sub_scene/c.mp4",
        "9_summary/c.mp4",
    )
    script = {f"{file}/a.mp4": "A" for file in files} | {
        "1_plotQA/a.mp4": "A) Yellow",
        "1_plotQA/a.mp4#2": "yellow",
        "1_plotQA/a.mp4#3": "?",
        "3_ego/a.mp4": "C",
        "8_sub_scene/c.mp4": "A dog runs",
        "9_summary/c.mp4": "the dog runs away.",
    }
    engine = ScriptedEngine(script)
    results = evaluate("mlvu", folder, media, tmp_path / "out", engine)
    assert results["questions"] == 11
    # plotQA: 2 of 3 right; ego, and count with its missing video: none; the other four: all
    assert results["closed"]["overall"] == {"M-Avg": pytest.approx((2 / 3 + 4) / 7)}
    assert results["closed"]["by"]["task"]["plotQA"] == {"questions": 3, "accuracy": pytest.approx(2 / 3)}
    assert ids(results["failed"]) == ["4_count/gone.mp4"]
    assert ids(results["not_understood"]) == ["1_plotQA/a.mp4#3"]
    # "dog runs" against "dog runs away": precision 1, recall 2/3.
    assert results["offline"]["overall"] == {
        "questions": 2,
        "exact_match": 0.5,
        "token_f1": pytest.approx((0.8 + 1) / 2),
    }
    assert "judged" not in results
    assert "no judge" in results["offline"]["measure"]
    (first,) = [each for each in engine.requests if each.id == "1_plotQA/a.mp4"]
    assert first.answer_start == "Best Option: ("
    assert engine.prompt("1_plotQA/a.mp4").endswith(
        "Question: What colour?\nOptions:\n(A) Yellow\n(B) Red\n(C) White\n(D) Blue\n"
        "Only give the best option."
    )
    assert engine.prompt("9_summary/c.mp4") == "What happens?"
    (summary,) = [each for each in engine.requests if each.id == "9_summary/c.mp4"]
    assert (summary.answer_start, summary.max_new_tokens) == ("", 512)
    # The mean over one file is not M-Avg and has another name.
    one = evaluate("mlvu", folder / "3_ego.json", media, tmp_path / "one", ScriptedEngine(script))
    assert one["closed"]["overall"] == {"M-Avg of 1 of 7": 0.0}


def test_mlvu_test_writes_a_submission(tmp_path):
    rows = [
        {
            "video": f"{name}.mp4",
            "duration": 1.0,
            "question": "Which?",
            "candidates": ["x", "y"],
            "question_type": "ego",
            "question_id": f"Q{name}",
        }
        for name in "abca"
    ]
    annotations = write_json(tmp_path / "test.json", rows)
    engine = ScriptedEngine({"Qa": "(B", "Qb": "who knows", "Qa#2": "x"})
    media = videos(tmp_path / "videos", "a.mp4", "video/b.mp4")
    results = evaluate("mlvu_test", annotations, media, tmp_path / "out", engine)
    assert json.loads((tmp_path / "out" / "submission.json").read_text()) == [
        {"question_id": "Qa", "question_type": "ego", "option": "B"},
        {"question_id": "Qb", "question_type": "ego", "option": ""},
        {"question_id": "Qc", "question_type": "ego", "option": ""},
        {"question_id": "Qa", "question_type": "ego", "option": "A"},
    ]
    assert results["closed"]["overall"] == {"answered": 0.5}
    entries = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {entry["correct"] for entry in entries} == {None}  # the answers are not published


# ---- LVBench --------------------------------------------------------------------------------------------


def test_lvbench(tmp_path):
    """The options are in the text of the question. A question with two types counts in both."""

    def asked(uid, answer, *types):
        text = "What (in short) is seen?\n(A) 1636\n(B) A\n(C) 1363\n(D) 1633"
        return {
            "uid": uid,
            "question": text,
            "answer": answer,
            "question_type": list(types),
            "time_reference": "00:15-00:19",
        }

    rows = [
        {
            "key": "Cm73ma6Ibcs",
            "type": "cartoon",
            "qa": [
                asked("0", "D", "key information retrieval", "reasoning"),
                asked("1", "A", "reasoning"),
                asked("1", "B", "summarization"),
            ],
        },
        {"key": "other", "type": "live", "qa": [asked("2", "B", "entity recognition")]},
        {"key": "gone", "type": "live", "qa": [asked("3", "B", "temporal grounding")]},
    ]
    annotations = tmp_path / "video_info.meta.jsonl"
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    media = videos(tmp_path / "videos", "all_videos/Cm73ma6Ibcs.mp4", "other.mp4")
    engine = ScriptedEngine({"0": "1633", "1": "B", "1#2": "no idea", "2": "B"})
    results = evaluate("lvbench", annotations, media, tmp_path / "out", engine)
    assert results["closed"]["overall"] == {"accuracy": 2 / 5}
    assert results["closed"]["by"]["question_type"] == {
        "KIR": {"questions": 1, "accuracy": 1.0},
        "Rea": {"questions": 2, "accuracy": 0.5},
        "Sum": {"questions": 1, "accuracy": 0.0},
        "ER": {"questions": 1, "accuracy": 1.0},
        "TG": {"questions": 1, "accuracy": 0.0},
    }
    assert ids(results["failed"]) == ["3"]
    assert ids(results["not_understood"]) == ["1#2"]
    assert "What (in short) is seen?\nA. 1636\nB. A\nC. 1363\nD. 1633\n" in engine.prompt("0")


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("Which?\n(A) red\n(B) blue", ("Which?", ("red", "blue"))),
        ("Which?\n\nA. red\n B. blue\n", ("Which?", ("red", "blue"))),
        (
            "As in\n(A) above, which?\n(A) red\nor pink\n(B) A",
            ("As in\n(A) above, which?", ("red\nor pink", "A")),
        ),
        ("Which?\n(A) red\n(C) blue", None),
        ("Which?\n(A) red\n(B)", None),
        ("(A) red\n(B) blue", None),
        ("Which?", None),
    ],
)
def test_options_in_a_question(text, split):
    if split:
        assert lvbench.split_options(text, "q") == split
    else:
        with pytest.raises(Exception, match="has no options"):
            lvbench.split_options(text, "q")


# ---- MVBench --------------------------------------------------------------------------------------------


def test_mvbench(tmp_path):
    """Videos at the archives' paths, spans of videos, and a folder of frames."""

    def row(video, answer, **more):
        candidates = ["Ate it.", "Threw it.", "Took it."]
        return {
            "video": video,
            "question": "What happened?",
            "candidates": candidates,
            "answer": answer,
        } | more

    folder = tmp_path / "json"
    write_json(
        folder / "action_sequence.json",
        [row("a.mp4", "Ate it.", start=0.2, end=0.7), row("a.mp4", "Took it.", start=40.0, end=50.0)],
    )
    write_json(folder / "action_antonym.json", [row("b.mp4", "took it"), row("b.mp4", "Took it.")])
    write_json(folder / "episodic_reasoning.json", [row("clip", "Threw it.", start=0.0, end=2.0)])
    write_json(folder / "moving_count.json", [row("gone.mp4", "Ate it."), row("v.mp4", "Ate it.")])
    media = videos(
        tmp_path / "video",
        "star/Charades_v1_480/a.mp4",
        "ssv2_video/b.mp4",
        "data0613/clevrer/video_validation/v.mp4",
    )
    frames = media / "tvqa" / "frames_fps3_hq" / "clip"
    frames.mkdir(parents=True)
    for number in range(9):
        Image.new("RGB", (20, 16), (28 * number, 0, 0)).save(frames / f"{number + 1:05}.png")
    engine = ScriptedEngine(
        {
            "action_sequence/a.mp4": "A",
            "action_antonym/b.mp4": "Took it",
            "action_antonym/b.mp4#2": "Ate it or took it",
            "episodic_reasoning/clip": "A",
            "moving_count/v.mp4": "(A)",
        }
    )
    results = evaluate("mvbench", tmp_path, media, tmp_path / "out", engine)
    # The span of the second question of action_sequence lies after the end of its video.
    assert ids(results["failed"]) == ["action_sequence/a.mp4#2", "moving_count/gone.mp4"]
    assert ids(results["not_understood"]) == ["action_antonym/b.mp4#2"]
    assert results["closed"]["by"]["task"] == {
        "action_sequence": {"questions": 2, "accuracy": 0.5},
        "action_antonym": {"questions": 2, "accuracy": 0.5},
        "moving_count": {"questions": 2, "accuracy": 0.5},
        "episodic_reasoning": {"questions": 1, "accuracy": 0.0},
    }
    assert results["closed"]["overall"] == {"mean_accuracy of 4 of 20": 1.5 / 4}
    clips = {each.id: each.clip for each in engine.requests}
    assert clips["action_sequence/a.mp4"].indices.tolist() == [2, 3, 5, 6]  # of frames 2 to 6
    # The span has six images, at 3 per second. Four are sampled, at 0.75, 2.25, 3.75 and 5.25 sixths of it.
    assert clips["episodic_reasoning/clip"].indices.tolist() == [0, 2, 3, 5]
    assert clips["episodic_reasoning/clip"].frames[:, 0, 0, 0].tolist() == [0, 56, 84, 140]
