"""Every benchmark in its published file format, with a model whose right score is known by hand."""

import json

import pytest
from PIL import Image

from dynfocus_jax.config import UserError
from dynfocus_jax.evaluation.benchmarks import BENCHMARKS, nextqa, read_benchmark
from tests.evaluation.miniature import Scripted, evaluate, settings, videos, write_csv, write_json

COLOURS = ["A. Red.", "B. Blue.", "C. Green.", "D. Grey."]


def test_every_benchmark_has_its_settings():
    assert all(settings(name).prompt for name in BENCHMARKS)


# ---- Video-MME ------------------------------------------------------------------------------------------


def videomme(tmp_path):
    """Two videos with five questions; a third video is missing; one id occurs twice."""

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
    return write_json(tmp_path / "videomme.json", content), videos(
        tmp_path / "videos", "data/name001.mp4", "name002.mp4"
    )


def test_videomme(tmp_path):
    annotations, media = videomme(tmp_path)
    engine = Scripted({"001-1": "A", "001-2": "C. Green", "002-1": "(C)", "002-1#2": "I cannot tell"})
    results = evaluate("videomme", annotations, media, tmp_path / "out", engine)
    assert (results["questions"], results["answered"]) == (5, 4)
    # Right: 001-1 and 002-1. Wrong: 001-2. Not understood: the second 002-1. Missing: the video of 003-1.
    assert results["closed"]["overall"] == {"accuracy": 2 / 5}
    by = results["closed"]["by"]
    assert by["duration"] == {
        "short": {"questions": 2, "accuracy": 0.5},
        "long": {"questions": 3, "accuracy": pytest.approx(1 / 3)},
    }
    assert by["task_type"] == {
        "Counting": {"questions": 2, "accuracy": 0.5},
        "OCR": {"questions": 3, "accuracy": pytest.approx(1 / 3)},
    }
    assert by["domain"]["Sports"] == {"questions": 3, "accuracy": pytest.approx(1 / 3)}
    assert [each["id"] for each in results["not_understood"]] == ["002-1#2"]
    assert [each["id"] for each in results["failed"]] == ["003-1"]
    assert "no such file" in results["failed"][0]["reason"]
    assert engine.asked("001-1") == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with "
        "only the letter (A, B, C, or D) of the correct option.\nWhich 001-1?\nA. Red.\nB. Blue.\nC. Green.\n"
        "D. Grey.\nThe best answer is:"
    )
    table = (tmp_path / "out" / "table.txt").read_text()
    assert "short" in table
    assert "overall: accuracy 40.0 %" in table


def test_videomme_rows_and_subtitles(tmp_path):
    """The rows of the hub; subtitles that are on the screen at the frames, which are 0.1 s apart."""
    row = {
        "video_id": "001",
        "videoID": "abc",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "x",
        "task_type": "OCR",
        "question_id": "001-1",
        "question": "Which?",
        "options": COLOURS,
        "answer": "A",
    }
    annotations = tmp_path / "rows.jsonl"
    annotations.write_text(json.dumps(row) + "\n")
    media = videos(tmp_path / "media", "data/abc.mp4")
    (media / "subtitle").mkdir()
    # Frames 1, 3, 5 and 7 of eight are shown, at 0.1, 0.3, 0.5 and 0.7 s.
    (media / "subtitle" / "abc.srt").write_text(
        "1\n00:00:00,250 --> 00:00:00,550\nseen twice\n\n2\n00:00:00,560 --> 00:00:00,650\nbetween frames\n"
    )
    engine = Scripted({"001-1": "A"})
    results = evaluate(
        "videomme",
        annotations,
        media,
        tmp_path / "out",
        engine,
        settings=settings("videomme", subtitles=True),
    )
    assert results["closed"]["overall"] == {"accuracy": 1.0}
    assert engine.asked("001-1").startswith("This video's subtitles are listed below:\nseen twice\nSelect")
    without = Scripted({"001-1": "A"})
    evaluate("videomme", annotations, media, tmp_path / "without", without)
    assert "subtitles" not in without.asked("001-1")


# ---- MLVU -----------------------------------------------------------------------------------------------


def test_mlvu(tmp_path):
    """M-Avg is the mean of the tasks' accuracies, not of all questions'; free answers are another measure."""

    def choice(video, task, answer):
        candidates = ["Yellow", "Red", "White", "Blue"]
        return {
            "video": video,
            "duration": 480.0,
            "question": "What colour?",
            "candidates": candidates,
            "answer": answer,
            "question_type": task,
        }

    folder = tmp_path / "json"
    write_json(folder / "1_plotQA.json", [choice("a.mp4", "plotQA", "Yellow") for _ in range(3)])
    write_json(folder / "4_count.json", [choice("b.mp4", "count", "Red")])
    free = {"video": "c.mp4", "duration": 9.0, "question": "What happens?", "answer": "The dog runs away"}
    write_json(
        folder / "8_sub_scene.json",
        [free | {"question_type": "subPlot", "scoring_points": ["a dog", "it runs"]}],
    )
    write_json(folder / "9_summary.json", [free | {"question_type": "summary"}])
    media = videos(
        tmp_path / "videos", "1_plotQA/a.mp4", "video/4_count/b.mp4", "8_sub_scene/c.mp4", "9_summary/c.mp4"
    )
    engine = Scripted(
        {
            "1_plotQA/a.mp4": "A) Yellow",
            "1_plotQA/a.mp4#2": "yellow",
            "1_plotQA/a.mp4#3": "?",
            "4_count/b.mp4": "C",
            "8_sub_scene/c.mp4": "A dog runs",
            "9_summary/c.mp4": "the dog runs away.",
        }
    )
    results = evaluate("mlvu", folder, media, tmp_path / "out", engine)
    assert results["closed"]["overall"] == {"M-Avg": pytest.approx((2 / 3 + 0) / 2)}
    assert results["closed"]["by"]["task"]["plotQA"] == {"questions": 3, "accuracy": pytest.approx(2 / 3)}
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
    assert engine.asked("1_plotQA/a.mp4").endswith(
        "Question: What colour?\nOptions:\n(A) Yellow\n(B) Red\n(C) White\n(D) Blue\n"
        "Only give the best option."
    )
    assert engine.asked("9_summary/c.mp4") == "What happens?"
    (summary,) = [each for each in engine.requests if each.id == "9_summary/c.mp4"]
    assert (summary.answer_start, summary.max_new_tokens) == ("", 512)


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
        for name in "abc"
    ]
    annotations = write_json(tmp_path / "test.json", rows)
    engine = Scripted({"Qa": "(B", "Qb": "who knows"})
    media = videos(tmp_path / "videos", "a.mp4", "video/b.mp4")
    results = evaluate("mlvu_test", annotations, media, tmp_path / "out", engine)
    assert json.loads((tmp_path / "out" / "submission.json").read_text()) == [
        {"question_id": "Qa", "question_type": "ego", "option": "B"},
        {"question_id": "Qb", "question_type": "ego", "option": ""},
        {"question_id": "Qc", "question_type": "ego", "option": ""},
    ]
    assert results["closed"]["overall"] == {"answered": pytest.approx(1 / 3)}
    entries = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {entry["correct"] for entry in entries} == {None}  # nobody but the authors knows


# ---- LVBench --------------------------------------------------------------------------------------------


def test_lvbench(tmp_path):
    """Options stand in the question; a question of two types counts in both."""

    def asked(uid, answer, *types):
        text = "What (in short) is seen?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633"
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
            "qa": [asked("0", "D", "key information retrieval", "reasoning"), asked("1", "A", "reasoning")],
        },
        {"key": "other", "type": "live", "qa": [asked("2", "B", "entity recognition")]},
    ]
    annotations = tmp_path / "video_info.meta.jsonl"
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    media = videos(tmp_path / "videos", "all_videos/Cm73ma6Ibcs.mp4", "other.mp4")
    engine = Scripted({"0": "1633", "1": "B", "2": "B"})
    results = evaluate("lvbench", annotations, media, tmp_path / "out", engine)
    assert results["closed"]["overall"] == {"accuracy": pytest.approx(2 / 3)}
    assert results["closed"]["by"]["question_type"] == {
        "KIR": {"questions": 1, "accuracy": 1.0},
        "Rea": {"questions": 2, "accuracy": 0.5},
        "ER": {"questions": 1, "accuracy": 1.0},
    }
    assert "What (in short) is seen?\nA. 1636\nB. 1366\nC. 1363\nD. 1633\n" in engine.asked("0")


# ---- VideoHallucer --------------------------------------------------------------------------------------


def test_videohallucer(tmp_path):
    """A pair is right when both of its questions are; the figures are means over the sets."""

    def pair(video):
        ask = {"video": video, "question": "Is there a dog?"}
        return {
            "basic": ask | {"answer": "yes"},
            "hallucination": ask | {"answer": "no", "question": "A cat?"},
            "type": "subject",
        }

    folder = tmp_path / "videohallucer"
    write_json(folder / "object_relation" / "object_relation.json", [pair("a.mp4"), pair("b.mp4")])
    write_json(folder / "temporal" / "temporal.json", [pair("c.mp4")])
    media = videos(
        tmp_path / "media", "object_relation/videos/a.mp4", "object_relation/videos/b.mp4", "c.mp4"
    )
    engine = Scripted(
        {
            "object_relation/0/basic": "Yes.",
            "object_relation/0/hallucination": "No, there is none.",
            "object_relation/1/basic": "yes",
            "object_relation/1/hallucination": "yes",
            "temporal/0/basic": "perhaps",
            "temporal/0/hallucination": "no",
        }
    )
    results = evaluate("videohallucer", folder, media, tmp_path / "out", engine)
    assert results["closed"]["by"]["set"] == {
        "object_relation": {"questions": 4, "basic": 1.0, "hallucinated": 0.5, "overall": 0.5},
        "temporal": {"questions": 2, "basic": 0.0, "hallucinated": 1.0, "overall": 0.0},
    }
    assert results["closed"]["overall"] == {"basic": 0.5, "hallucinated": 0.75, "overall": 0.25}
    assert [each["id"] for each in results["not_understood"]] == ["temporal/0/basic"]
    assert engine.asked("temporal/0/basic") == "Is there a dog?\nAnswer the question using 'yes' or 'no'."


# ---- MVBench --------------------------------------------------------------------------------------------


def test_mvbench(tmp_path):
    """Videos where the archives put them, seconds of a video, and a folder of frames as a video."""

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
    write_json(folder / "action_antonym.json", [row("b.mp4", "Took it.")])
    write_json(folder / "episodic_reasoning.json", [row("clip", "Threw it.", start=0.0, end=2.0)])
    media = videos(tmp_path / "video", "star/Charades_v1_480/a.mp4", "ssv2_video/b.mp4")
    frames = media / "tvqa" / "frames_fps3_hq" / "clip"
    frames.mkdir(parents=True)
    for number in range(9):
        Image.new("RGB", (20, 16), (28 * number, 0, 0)).save(frames / f"{number + 1:05}.png")
    engine = Scripted(
        {"action_sequence/a.mp4": "A", "action_antonym/b.mp4": "Took it", "episodic_reasoning/clip": "A"}
    )
    results = evaluate("mvbench", tmp_path, media, tmp_path / "out", engine)
    # The second question of action_sequence is about seconds that its video does not have.
    assert [each["id"] for each in results["failed"]] == ["action_sequence/a.mp4#2"]
    assert results["closed"]["by"]["task"] == {
        "action_sequence": {"questions": 2, "accuracy": 0.5},
        "action_antonym": {"questions": 1, "accuracy": 1.0},
        "episodic_reasoning": {"questions": 1, "accuracy": 0.0},
    }
    assert results["closed"]["overall"] == {"mean_accuracy": 0.5}
    clips = {each.id: each.clip for each in engine.requests}
    assert clips["action_sequence/a.mp4"].indices.tolist() == [2, 3, 5, 6]  # of frames 2 to 6
    # Six images are shown within two seconds; of six, four are 0.75, 2.25, 3.75 and 5.25 sixths in.
    assert clips["episodic_reasoning/clip"].indices.tolist() == [0, 2, 3, 5]
    assert clips["episodic_reasoning/clip"].frames[:, 0, 0, 0].tolist() == [0, 56, 84, 140]


# ---- NExT-QA --------------------------------------------------------------------------------------------

NEXTQA = ["video", "frame_count", "width", "height", "question", "answer", "qid", "type"]
NEXTQA += ["a0", "a1", "a2", "a3", "a4"]


@pytest.mark.parametrize("form", ["number", "text"])
def test_nextqa(tmp_path, form):
    """Answers as numbers; or as texts, one of which is a number that is an option, but not of that number."""
    options = ["2", "0", "sit", "run", "jump"]

    def row(video, number, qid, kind):
        answer = number if form == "number" else options[number]
        return [video, 99, 64, 48, "why does it stop", answer, qid, kind, *options]

    rows = [row("1", 0, "0", "CW"), row("1", 4, "1", "CH"), row("2", 1, "0", "TN"), row("3", 3, "0", "DO")]
    annotations = write_csv(tmp_path / "test.csv", NEXTQA, rows)
    write_json(tmp_path / "map_vid_vidorID.json", {"1": "1164/one"})
    media = videos(tmp_path / "videos", "1164/one.mp4", "2.mp4", "3.webm")
    engine = Scripted({"1_0": "A", "1_1": "E. jump", "2_0": "(C) sit", "3_0": "F"})
    results = evaluate("nextqa", annotations, media, tmp_path / "out", engine)
    assert results["closed"]["overall"] == {"accuracy": 0.5}
    assert results["closed"]["by"] == {
        "kind": {
            "causal": {"questions": 2, "accuracy": 1.0},
            "temporal": {"questions": 1, "accuracy": 0.0},
            "descriptive": {"questions": 1, "accuracy": 0.0},
        },
        "type": {
            "CW": {"questions": 1, "accuracy": 1.0},
            "CH": {"questions": 1, "accuracy": 1.0},
            "TN": {"questions": 1, "accuracy": 0.0},
            "DO": {"questions": 1, "accuracy": 0.0},
        },
    }
    assert [each["id"] for each in results["not_understood"]] == ["3_0"]
    assert "(A, B, C, D, or E)" in engine.asked("1_0")


def test_overlap():
    """As NExT-GQA computes it: the best of several spans, for each of both measures."""
    assert nextqa.overlap((2.0, 6.0), [(4.0, 10.0)]) == (0.5, 0.25)
    assert nextqa.overlap((2.0, 6.0), [(4.0, 10.0), (3.0, 5.0)]) == (0.5, 0.5)
    assert nextqa.overlap((2.0, 3.0), [(4.0, 5.0)]) == (0.0, 0.0)
    assert nextqa.overlap((4.0, 4.0), [(3.0, 5.0)]) == (1.0, 0.0)
    assert nextqa.overlap((6.0, 6.0), [(3.0, 5.0)]) == (0.0, 0.0)


def test_nextgqa(tmp_path):
    """The answer counts for Acc@GQA only with half of the predicted span inside; other rows are not asked."""
    options = ["walk", "sit", "run", "jump", "fly"]

    def row(qid, answer):
        return ["7", 99, 64, 48, "why does it stop", answer, qid, "CW", *options]

    header = ["video_id", *NEXTQA[1:]]
    write_csv(
        tmp_path / "test.csv", header, [row("0", "run"), row("1", "sit"), row("2", "fly"), row("9", "fly")]
    )
    places = {
        "7": {"duration": 30.0, "location": {"0": [[2, 6]], "1": [[2, 6], [10, 12]], "2": [[0, 1]]}, "fps": 3}
    }
    annotations = write_json(tmp_path / "gsub_test.json", places)
    media = videos(tmp_path / "videos", "7.mp4")
    engine = Scripted(
        {
            "7_0": "C",
            "7_0/when": "from 4.0 to 8.0 seconds",  # IoP 0.5, IoU 2/6
            "7_1": "B",
            "7_1/when": "0:10 - 0:20",  # IoP 0.2, IoU 0.2
            "7_2": "A",
            "7_2/when": "at the beginning",  # not understood: 0
        }
    )
    results = evaluate("nextgqa", annotations, media, tmp_path / "out", engine)
    assert results["questions"] == 6
    third = pytest.approx(1 / 3)
    assert results["closed"]["overall"] == {
        "Acc@GQA": third,
        "Acc@QA": pytest.approx(2 / 3),
        "mIoP": pytest.approx(0.7 / 3),
        "mIoU": pytest.approx((1 / 3 + 0.2) / 3),
        "IoP@0.3": third,
        "IoP@0.5": third,
        "IoU@0.3": third,
        "IoU@0.5": 0.0,
    }
    assert results["closed"]["by"]["kind"]["causal"]["questions"] == 3
    assert [each["id"] for each in results["not_understood"]] == ["7_2/when"]
    assert "seconds" in engine.asked("7_0/when")


# ---- VNBench --------------------------------------------------------------------------------------------


def needle(video, kind, number, options, answer, **more):
    return {
        "video": f"/VNBench_new/{video}",
        "question": "Which fruit?",
        "options": options,
        "gt": answer,
        "gt_option": "ABCD"[options.index(answer)],
        "needle_time": [3],
        "length": 30,
        "type": kind,
        "try": number,
    } | more


def test_vnbench(tmp_path):
    """A needle is right only when all four tries are; the figure is the mean over types."""
    fruits = ["pear", "plum", "fig", "kiwi"]
    rows = []
    for video, kind in (("a.mp4", "ret_edit1"), ("b.mp4", "ret_edit1"), ("c.mp4", "cnt_insert1")):
        for number in range(4):
            options = fruits[number:] + fruits[:number]
            rows.append(needle(video, kind, number, options, "plum"))
    annotations = write_json(tmp_path / "VNBench-main-4try.json", rows)
    media = videos(tmp_path / "videos", "VNBench_new/a.mp4", "b.mp4", "c.mp4")
    right = dict(enumerate("BADC"))  # where the plum is in each try
    script = {f"ret_edit1/a.mp4/{n}": right[n] for n in range(4)}
    script |= {f"ret_edit1/b.mp4/{n}": "B" for n in range(4)}  # always the same letter: one of four is right
    script |= {f"cnt_insert1/c.mp4/{n}": "plum" for n in range(4)}
    results = evaluate("vnbench", annotations, media, tmp_path / "out", Scripted(script))
    assert results["closed"]["by"]["type"] == {
        "ret_edit1": {"questions": 8, "accuracy": 0.5},
        "cnt_insert1": {"questions": 4, "accuracy": 1.0},
    }
    assert results["closed"]["overall"] == {"mean_accuracy": 0.75}


def test_vnbench_with_a_try_missing(tmp_path):
    rows = [needle("a.mp4", "ret_edit1", number, ["pear", "plum"], "plum") for number in range(3)]
    annotations = write_json(tmp_path / "vnbench.json", rows)
    with pytest.raises(UserError, match="has 3 of its 4 tries"):
        read_benchmark("vnbench", annotations, videos(tmp_path / "videos", "a.mp4"))


# ---- Free answers ---------------------------------------------------------------------------------------


def test_msvd_qa(tmp_path):
    rows = [
        {"id": 1, "video_id": 1301, "question": "what is sitting?", "answer": "cat"},
        {"id": 2, "video_id": 1302, "question": "what is chewed?", "answer": "nut"},
        {"id": 3, "video_id": 1303, "question": "who runs?", "answer": "man"},
    ]
    annotations = write_json(tmp_path / "test_qa.json", rows)
    (tmp_path / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1301\n")
    media = videos(tmp_path / "videos", "YouTubeClips/-4wsuPCjDBc_5_15.avi", "vid1302.avi")
    engine = Scripted({"1": "A cat.", "2": "a nut on a plate"})
    results = evaluate("msvd_qa", annotations, media, tmp_path / "out", engine)
    assert "closed" not in results
    # "nut on plate" against "nut": precision 1/3, recall 1.
    assert results["offline"]["overall"] == {
        "questions": 3,
        "exact_match": pytest.approx(1 / 3),
        "token_f1": pytest.approx((1 + 0.5 + 0) / 3),
    }
    assert [each["id"] for each in results["failed"]] == ["3"]


def test_msrvtt_qa(tmp_path):
    rows = [{"video_name": "video7010", "question": "who?", "question_id": "v1", "answer": "girl"}]
    rows += [{"id": 158581, "video_id": 7011, "question": "who?", "answer": "boy"}]
    annotations = write_json(tmp_path / "test_qa.json", rows)
    media = videos(tmp_path / "videos", "video7010.mp4", "TestVideo/video7011.mp4")
    results = evaluate(
        "msrvtt_qa", annotations, media, tmp_path / "out", Scripted({"v1": "girl", "158581": "girl"})
    )
    assert results["offline"]["overall"]["exact_match"] == 0.5


def test_activitynet_qa_joins_by_id(tmp_path):
    asked = [{"video_name": "abc", "question": f"q{i}?", "question_id": f"v_abc_{i}"} for i in (1, 2)]
    annotations = write_json(tmp_path / "test_q.json", asked)
    answers = [{"answer": "two", "type": 3, "question_id": "v_abc_2"}]
    answers += [{"answer": "yes", "type": 3, "question_id": "v_abc_1"}]  # in another order
    write_json(tmp_path / "test_a.json", answers)
    media = videos(tmp_path / "videos", "v_abc.mkv")
    engine = Scripted({"v_abc_1": "yes", "v_abc_2": "yes"})
    results = evaluate("activitynet_qa", annotations, media, tmp_path / "out", engine)
    assert results["offline"]["overall"]["exact_match"] == 0.5
    write_json(tmp_path / "test_a.json", answers[:1])
    with pytest.raises(UserError, match="'v_abc_1' has no answer"):
        read_benchmark("activitynet_qa", annotations, media)
    write_json(tmp_path / "test_a.json", [*answers, answers[0] | {"answer": "three"}])
    with pytest.raises(UserError, match="a second answer"):
        read_benchmark("activitynet_qa", annotations, media)


def test_vcgbench(tmp_path):
    folder = tmp_path / "vcg"
    write_json(folder / "generic_qa.json", [{"Q": "What?", "A": "a red car", "video_name": "v_a"}])
    write_json(folder / "temporal_qa.json", [{"Q": "When?", "A": "at the end", "video_name": "v_a"}])
    write_json(
        folder / "consistency_qa.json",
        [{"Q1": "Which?", "Q2": "Which one?", "A": "red", "video_name": "v_b"}],
    )
    media = videos(tmp_path / "videos", "Test_Videos/v_a.mp4", "v_b.mkv")
    engine = Scripted(
        {
            "generic_qa/0/Q": "the red car",
            "temporal_qa/0/Q": "never",
            "consistency_qa/0/Q1": "red",
            "consistency_qa/0/Q2": "blue",
        }
    )
    results = evaluate("vcgbench", folder, media, tmp_path / "out", engine)
    assert results["offline"]["overall"] == {"questions": 4, "exact_match": 0.5, "token_f1": 0.5}
    assert results["offline"]["by"]["file"]["consistency_qa"]["questions"] == 2
    assert engine.asked("consistency_qa/0/Q2") == "Which one?"  # not the first question twice
