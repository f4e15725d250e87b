"""Answers that are judged together, spans of time and free answers, with scores known by hand.

In each there are an answer that cannot be understood, a video that is missing, and an id that occurs twice.
"""

import pytest

from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.benchmarks import nextqa, read_benchmark
from tests.evaluation.miniature import NEXTQA, ScriptedEngine, evaluate, videos, write_csv, write_json


def ids(entries):
    return [each["id"] for each in entries]


# ---- VideoHallucer --------------------------------------------------------------------------------------


def test_videohallucer(tmp_path):
    """A pair is right if both of its answers are. The measures are means over the sets."""

    def pair(video):
        ask = {"video": video, "question": "Is there a dog?"}
        return {
            "basic": ask | {"answer": "yes"},
            "hallucination": ask | {"answer": "no", "question": "A cat?"},
            "type": "subject",
        }

    folder = tmp_path / "videohallucer"
    content = {"object_relation": ["a.mp4", "b.mp4"], "temporal": ["c.mp4", "c.mp4"]}
    content |= {
        "semantic_detail": ["c.mp4"],
        "external_factual": ["gone.mp4"],
        "external_nonfactual": ["c.mp4"],
    }
    for name, names in content.items():
        write_json(folder / name / f"{name}.json", [pair(video) for video in names])
    media = videos(
        tmp_path / "media", "object_relation/videos/a.mp4", "object_relation/videos/b.mp4", "c.mp4"
    )
    script = {
        "object_relation/0": ("Yes.", "No, there is none."),
        "object_relation/1": ("yes", "yes"),
        "temporal/0": ("perhaps", "no"),
        "temporal/1": ("yes", "no"),
        "semantic_detail/0": ("no", "no"),
        "external_nonfactual/0": ("no", "yes"),
    }
    engine = ScriptedEngine(
        {f"{name}/basic": basic for name, (basic, _) in script.items()}
        | {f"{name}/hallucination": hallucinated for name, (_, hallucinated) in script.items()}
    )
    results = evaluate("videohallucer", folder, media, tmp_path / "out", engine)
    assert results["closed"]["by"]["set"] == {
        "object_relation": {"questions": 4, "basic": 1.0, "hallucinated": 0.5, "overall": 0.5},
        "temporal": {"questions": 4, "basic": 0.5, "hallucinated": 1.0, "overall": 0.5},
        "semantic_detail": {"questions": 2, "basic": 0.0, "hallucinated": 1.0, "overall": 0.0},
        "external_factual": {"questions": 2, "basic": 0.0, "hallucinated": 0.0, "overall": 0.0},
        "external_nonfactual": {"questions": 2, "basic": 0.0, "hallucinated": 0.0, "overall": 0.0},
    }
    assert results["closed"]["overall"] == {"basic": 0.3, "hallucinated": 0.5, "overall": 0.2}
    assert ids(results["not_understood"]) == ["temporal/0/basic"]
    assert ids(results["failed"]) == [f"external_factual/0/{kind}" for kind in ("basic", "hallucination")]
    assert engine.prompt("temporal/0/basic") == "Is there a dog?\nAnswer the question using 'yes' or 'no'."


# ---- NExT-QA --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["number", "text"])
def test_nextqa(tmp_path, form):
    """Right answers as option numbers, or as texts; one text is a number, but not that of its option."""
    options = ["2", "0", "sit", "run", "jump"]

    def row(video, number, qid, kind):
        answer = number if form == "number" else options[number]
        return [video, 99, 64, 48, "why does it stop", answer, qid, kind, *options]

    rows = [row("1", 0, "0", "CW"), row("1", 4, "1", "CH"), row("2", 1, "0", "TN"), row("3", 3, "0", "DO")]
    rows += [row("1", 2, "1", "CH"), row("gone", 1, "0", "TC")]
    annotations = write_csv(tmp_path / "test.csv", NEXTQA, rows)
    write_json(tmp_path / "map_vid_vidorID.json", {"1": "1164/one"})
    media = videos(tmp_path / "videos", "1164/one.mp4", "2.mp4", "3.webm")
    engine = ScriptedEngine({"1_0": "A", "1_1": "E. jump", "1_1#2": "sit", "2_0": "(C) sit", "3_0": "F"})
    results = evaluate("nextqa", annotations, media, tmp_path / "out", engine)
    assert results["closed"]["overall"] == {"accuracy": 0.5}
    assert ids(results["failed"]) == ["gone_0"]
    assert results["closed"]["by"] == {
        "kind": {
            "causal": {"questions": 3, "accuracy": 1.0},
            "temporal": {"questions": 2, "accuracy": 0.0},
            "descriptive": {"questions": 1, "accuracy": 0.0},
        },
        "type": {
            "CW": {"questions": 1, "accuracy": 1.0},
            "CH": {"questions": 2, "accuracy": 1.0},
            "TN": {"questions": 1, "accuracy": 0.0},
            "DO": {"questions": 1, "accuracy": 0.0},
            "TC": {"questions": 1, "accuracy": 0.0},
        },
    }
    assert [each["id"] for each in results["not_understood"]] == ["3_0"]
    assert "(A, B, C, D, or E)" in engine.prompt("1_0")


def test_overlap():
    """IoP and IoU are each the best over several spans, as in NExT-GQA."""
    assert nextqa.overlap((2.0, 6.0), [(4.0, 10.0)]) == (0.5, 0.25)
    assert nextqa.overlap((2.0, 6.0), [(4.0, 10.0), (3.0, 5.0)]) == (0.5, 0.5)
    assert nextqa.overlap((2.0, 3.0), [(4.0, 5.0)]) == (0.0, 0.0)
    assert nextqa.overlap((4.0, 4.0), [(3.0, 5.0)]) == (1.0, 0.0)
    assert nextqa.overlap((6.0, 6.0), [(3.0, 5.0)]) == (0.0, 0.0)


def test_nextgqa(tmp_path):
    """Acc@GQA counts an answer only if IoP is at least 0.5. Rows without spans are not asked."""
    options = ["walk", "sit", "run", "jump", "fly"]

    def row(qid, answer, video="7"):
        return [video, 99, 64, 48, "why does it stop", answer, qid, "CW", *options]

    header = ["video_id", *NEXTQA[1:]]
    rows = [row("0", "run"), row("1", "sit"), row("2", "fly"), row("9", "fly"), row("0", "sit", "gone")]
    write_csv(tmp_path / "test.csv", header, rows)
    places = {
        "7": {
            "duration": 30.0,
            "location": {"0": [[2, 6]], "1": [[2, 6], [10, 12]], "2": [[0, 1]]},
            "fps": 3,
        },
        "gone": {"duration": 30.0, "location": {"0": [[2, 6]]}, "fps": 3},
    }
    annotations = write_json(tmp_path / "gsub_test.json", places)
    media = videos(tmp_path / "videos", "7.mp4")
    engine = ScriptedEngine(
        {
            "7_0": "C",
            "7_0/when": "from 4.0 to 8.0 seconds",  # IoP 0.5, IoU 2/6
            "7_1": "B",
            "7_1/when": "0:10 - 0:20",  # IoP 0.2, IoU 0.2
            "7_2": "A",
            "7_2/when": "at the beginning",  # unparsed: 0
        }
    )
    results = evaluate("nextgqa", annotations, media, tmp_path / "out", engine)
    assert results["questions"] == 8
    assert results["closed"]["overall"] == {
        "Acc@GQA": 0.25,
        "Acc@QA": 0.5,
        "mIoP": pytest.approx(0.7 / 4),
        "mIoU": pytest.approx((1 / 3 + 0.2) / 4),
        "IoP@0.3": 0.25,
        "IoP@0.5": 0.25,
        "IoU@0.3": 0.25,
        "IoU@0.5": 0.0,
    }
    assert results["closed"]["by"]["kind"]["causal"]["questions"] == 4
    assert ids(results["not_understood"]) == ["7_2/when"]
    assert ids(results["failed"]) == ["gone_0", "gone_0/when"]
    assert "seconds" in engine.prompt("7_0/when")
    # Spans that match two rows are ambiguous.
    write_csv(tmp_path / "test.csv", header, [*rows, row("1", "fly")])
    with pytest.raises(UserError, match="has 2 rows for entry '7_1'"):
        read_benchmark("nextgqa", annotations, media)


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
    """A needle is right if all four tries are. The measure is the mean over types."""
    fruits = ["pear", "plum", "fig", "kiwi"]
    needles = [
        ("a.mp4", "ret_edit1"),
        ("b.mp4", "ret_edit1"),
        ("u.mp4", "ret_edit1"),
        ("gone.mp4", "ret_edit1"),
    ]
    rows = []
    for video, kind in [*needles, ("c.mp4", "cnt_insert1")]:
        for number in range(4):
            options = fruits[number:] + fruits[:number]
            rows.append(needle(video, kind, number, options, "plum"))
    rows += [row for row in rows if "c.mp4" in row["video"]]  # occurs twice, once with a wrong answer
    annotations = write_json(tmp_path / "VNBench-main-4try.json", rows)
    media = videos(tmp_path / "videos", "VNBench_new/a.mp4", "b.mp4", "c.mp4", "u.mp4")
    right = dict(enumerate("BADC"))  # the letter of "plum" in each try
    script = {f"ret_edit1/a.mp4/{n}": right[n] for n in range(4)}
    script |= {f"ret_edit1/b.mp4/{n}": "B" for n in range(4)}  # right in one of four tries
    script |= {f"ret_edit1/u.mp4/{n}": right[n] if n else "plum or fig" for n in range(4)}
    script |= {f"cnt_insert1/c.mp4/{n}": "plum" for n in range(4)}
    alone = ScriptedEngine(script | {f"cnt_insert1/c.mp4/{n}#2": "plum" for n in range(4)})
    results = evaluate("vnbench", annotations, media, tmp_path / "out", alone)
    assert results["closed"]["by"]["type"] == {
        "ret_edit1": {"questions": 16, "accuracy": 0.25},
        "cnt_insert1": {"questions": 8, "accuracy": 1.0},
    }
    assert results["closed"]["overall"] == {"mean_accuracy": 0.625}
    assert ids(results["failed"]) == [f"ret_edit1/gone.mp4/{n}" for n in range(4)]
    assert ids(results["not_understood"]) == ["ret_edit1/u.mp4/0"]
    once = ScriptedEngine(script | {f"cnt_insert1/c.mp4/{n}#2": "plum" if n else "fig" for n in range(4)})
    results = evaluate("vnbench", annotations, media, tmp_path / "once", once)
    assert results["closed"]["by"]["type"]["cnt_insert1"] == {"questions": 8, "accuracy": 0.0}


def test_vnbench_with_a_missing_try(tmp_path):
    rows = [needle("a.mp4", "ret_edit1", number, ["pear", "plum"], "plum") for number in range(3)]
    annotations = write_json(tmp_path / "vnbench.json", rows)
    with pytest.raises(UserError, match="has 3 tries, expected 4"):
        read_benchmark("vnbench", annotations, videos(tmp_path / "videos", "a.mp4"))


# ---- Open answers ---------------------------------------------------------------------------------------


def test_msvd_qa(tmp_path):
    rows = [
        {"id": 1, "video_id": 1301, "question": "what is sitting?", "answer": "cat"},
        {"id": 2, "video_id": 1302, "question": "what is chewed?", "answer": "nut"},
        {"id": 3, "video_id": 1303, "question": "who runs?", "answer": "man"},
        {"id": 2, "video_id": 1302, "question": "what is chewed?", "answer": "nut"},
    ]
    annotations = write_json(tmp_path / "test_qa.json", rows)
    (tmp_path / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1301\n")
    media = videos(tmp_path / "videos", "YouTubeClips/-4wsuPCjDBc_5_15.avi", "vid1302.avi")
    engine = ScriptedEngine({"1": "A cat.", "2": "a nut on a plate", "2#2": " "})
    results = evaluate("msvd_qa", annotations, media, tmp_path / "out", engine)
    assert "closed" not in results
    # "nut on plate" against "nut": precision 1/3, recall 1.
    assert results["offline"]["overall"] == {
        "questions": 4,
        "exact_match": 1 / 4,
        "token_f1": pytest.approx((1 + 0.5 + 0 + 0) / 4),
    }
    assert ids(results["failed"]) == ["3"]
    assert ids(results["not_understood"]) == ["2#2"]


def test_msrvtt_qa(tmp_path):
    rows = [{"video_name": "video7010", "question": "who?", "question_id": "v1", "answer": "girl"}]
    rows += [{"id": 158581, "video_id": 7011, "question": "who?", "answer": "boy"}]
    rows += [rows[0], rows[0] | {"video_name": "video7012", "question_id": "v2"}]
    annotations = write_json(tmp_path / "test_qa.json", rows)
    media = videos(tmp_path / "videos", "video7010.mp4", "TestVideo/video7011.mp4")
    engine = ScriptedEngine({"v1": "girl", "158581": "girl", "v1#2": ""})
    results = evaluate("msrvtt_qa", annotations, media, tmp_path / "out", engine)
    assert results["offline"]["overall"]["exact_match"] == 0.25
    assert (ids(results["failed"]), ids(results["not_understood"])) == (["v2"], ["v1#2"])


def test_activitynet_qa_joins_by_id(tmp_path):
    asked = [{"video_name": "abc", "question": f"q{i}?", "question_id": f"v_abc_{i}"} for i in (1, 2, 1)]
    asked += [{"video_name": "gone", "question": "q?", "question_id": "v_gone_1"}]
    annotations = write_json(tmp_path / "test_q.json", asked)
    answers = [{"answer": "two", "type": 3, "question_id": "v_abc_2"}]
    answers += [{"answer": "yes", "type": 3, "question_id": f"v_{name}_1"} for name in ("gone", "abc")]
    write_json(tmp_path / "test_a.json", answers)
    media = videos(tmp_path / "videos", "v_abc.mkv")
    engine = ScriptedEngine({"v_abc_1": "yes", "v_abc_2": "yes", "v_abc_1#2": "..."})
    results = evaluate("activitynet_qa", annotations, media, tmp_path / "out", engine)
    assert results["offline"]["overall"]["exact_match"] == 0.25
    assert ids(results["failed"]) == ["v_gone_1"]
    write_json(tmp_path / "test_a.json", answers[:1])
    with pytest.raises(UserError, match="'v_abc_1' has no answer"):
        read_benchmark("activitynet_qa", annotations, media)
    write_json(tmp_path / "test_a.json", [*answers, answers[0] | {"answer": "three"}])
    with pytest.raises(UserError, match="has two answers, 'two' and 'three'"):
        read_benchmark("activitynet_qa", annotations, media)


def test_vcgbench(tmp_path):
    folder = tmp_path / "vcg"
    write_json(folder / "generic_qa.json", [{"Q": "What?", "A": "a red car", "video_name": "v_a"}])
    temporal = {"Q": "When?", "A": "at the end", "video_name": "v_a"}
    write_json(folder / "temporal_qa.json", [temporal, temporal, temporal | {"video_name": "gone"}])
    write_json(
        folder / "consistency_qa.json",
        [{"Q1": "Which?", "Q2": "Which one?", "A": "red", "video_name": "v_b"}],
    )
    media = videos(tmp_path / "videos", "Test_Videos/v_a.mp4", "v_b.mkv")
    engine = ScriptedEngine(
        {
            "generic_qa/0/Q": "the red car",
            "temporal_qa/0/Q": "never",
            "temporal_qa/1/Q": "",
            "consistency_qa/0/Q1": "red",
            "consistency_qa/0/Q2": "blue",
        }
    )
    results = evaluate("vcgbench", folder, media, tmp_path / "out", engine)
    assert results["offline"]["overall"] == {"questions": 6, "exact_match": 2 / 6, "token_f1": 2 / 6}
    assert ids(results["failed"]) == ["temporal_qa/2/Q"]
    assert ids(results["not_understood"]) == ["temporal_qa/1/Q"]
    assert results["offline"]["by"]["file"]["consistency_qa"]["questions"] == 2
    assert engine.prompt("consistency_qa/0/Q2") == "Which one?"  # not the first question twice
