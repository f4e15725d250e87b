"""Published annotation formats: small files as published, and their records."""

import csv
import json

import pytest

from dynfocus_jax.config import source
from dynfocus_jax.errors import UserError
from dynfocus_jax.records import prompts
from dynfocus_jax.records.formats import FORMATS
from dynfocus_jax.records.records import Record, RefusedEntry
from dynfocus_jax.records.sources import read_source


def write(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    elif name.endswith(".csv"):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(content)
    else:
        path.write_text(json.dumps(content))
    return path


def touch(root, *names):
    for name in names:
        write(root, name, "")


def read(root, form, content, *, suffix="json", **fields):
    write(root, f"a.{suffix}", content)
    return read_source(
        source(name="s", annotations=f"a.{suffix}", format=form, media="media", **fields), root
    )


@pytest.fixture(autouse=True)
def _media(tmp_path):
    (tmp_path / "media").mkdir()


def places(records):
    return {record.id: record.visual_at_end for record in records}


def test_every_format_is_tested_here():
    assert set(FORMATS) == {"llava", "videochat2", "videochatgpt", "webvid", "scienceqa", "nextqa", "clevrer"}


# ---- Questions for captions ------------------------------------------------------------------------------


def test_caption_requests():
    """They depend only on the id; all are used about equally often, for each place of the video."""
    ids = [f"{1_000_000 + 37 * i}" for i in range(11_000)]
    requests = [prompts.caption_request("video", name) for name in ids]
    assert requests[:3] == [prompts.caption_request("video", name) for name in ids[:3]]
    assert {request for request in requests if "{" in request} == set()
    counts = [requests.count(each.format("video")) for each in prompts.CAPTION_REQUESTS]
    assert sum(counts) == len(ids)
    assert all(800 < count < 1200 for count in counts)
    at_end = [prompts.visual_at_end(name) for name in ids]
    assert 0.47 < sum(at_end) / len(ids) < 0.53
    for each in prompts.CAPTION_REQUESTS:  # the place is independent of the request
        places = [
            end for end, request in zip(at_end, requests, strict=True) if request == each.format("video")
        ]
        assert 0.4 < sum(places) / len(places) < 0.6
    assert prompts.caption_request("image", "x") == prompts.caption_request("video", "x").replace(
        "video", "image"
    )
    assert prompts.caption_request("video", "1066674784") == "Provide a brief description of the given video."


# ---- LLaVA -----------------------------------------------------------------------------------------------

LLAVA_558K = [
    {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": [
            {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
            {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"},
        ],
    }
]
LLAVA_665K = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
            {"from": "gpt", "value": "The bus in the image is white and red."},
            {"from": "human", "value": "Is the bus driving down the street or pulled off to the side?"},
            {"from": "gpt", "value": "The bus is driving down the street."},
        ],
    },
    {
        "id": "wgByO4Y_0",
        "model": "",
        "conversations": [{"from": "human", "value": "Write a poem"}, {"from": "gpt", "value": "Roses"}],
    },
    {"id": "late", "model": "", "conversations": [{"from": "gpt", "value": "Roses"}]},
]


def test_llava(tmp_path):
    media = tmp_path / "media"
    records, refused = read(tmp_path, "llava", LLAVA_558K + LLAVA_665K)
    assert records == [
        Record(
            "004539375",
            media / "00453/004539375.jpg",
            (
                (
                    "Render a clear and concise summary of the photo.",
                    "select luxury furniture 3 - inch gel memory foam mattress topper",
                ),
            ),
            visual_at_end=True,
            source="s",
            modality="image",
        ),
        Record(
            "000000033471",
            media / "coco/train2017/000000033471.jpg",
            (
                ("What are the colors of the bus in the image?", "The bus in the image is white and red."),
                (
                    "Is the bus driving down the street or pulled off to the side?",
                    "The bus is driving down the street.",
                ),
            ),
            source="s",
            modality="image",
        ),
        Record("wgByO4Y_0", None, (("Write a poem", "Roses"),), source="s", modality="text"),
    ]
    assert refused == [
        RefusedEntry(3, "late", "field \"conversations[0].from\" is 'gpt', expected 'human'", fault="turns")
    ]


def test_llava_lines(tmp_path):
    lines = "\n".join(map(json.dumps, LLAVA_558K + LLAVA_665K))
    from_lines = read(tmp_path, "llava", lines, suffix="jsonl")
    assert from_lines == read(tmp_path, "llava", LLAVA_558K + LLAVA_665K)


# ---- VideoChat2-IT ---------------------------------------------------------------------------------------


def test_videochat2(tmp_path):
    media = tmp_path / "media"
    choose = "Watch closely and select the best option."
    records, refused = read(
        tmp_path,
        "videochat2",
        [
            {
                "video": "1164/3238737531.mp4",
                "QA": [
                    {
                        "i": choose,
                        "q": "Question: how?\nOptions:\n(A) so.\n(B) thus.",
                        "a": "Answer: (B) thus.",
                    },
                    {"i": choose, "q": "and why?", "a": "because"},
                    {"i": "Now briefly.", "q": "when?", "a": "then"},
                ],
            },
            {"video": "v.mp4", "QA": [{"i": "", "q": "", "a": "A dog runs."}], "start": 3, "end": 7.5},
            {"image": "i.jpg", "QA": [{"i": "Describe.", "q": "", "a": "A cat."}]},
            {"video": "v.mp4", "QA": [{"q": "what?", "a": "this"}]},
            {"QA": [{"q": "what?", "a": "this"}]},
            {"video": "w.mp4", "QA": []},
            {"video": "w.mp4", "QA": [{"q": "what?"}]},
            {"video": "w.mp4", "QA": [["what?", "this"]]},
            {"video": "../w.mp4", "QA": [{"q": "what?", "a": "this"}]},
        ],
    )
    assert [record.turns for record in records] == [
        (
            (f"{choose}\nQuestion: how?\nOptions:\n(A) so.\n(B) thus.", "Answer: (B) thus."),
            ("and why?", "because"),
            ("Now briefly.\nwhen?", "then"),
        ),
        ((prompts.caption_request("video", "v.mp4 0"), "A dog runs."),),
        ((f"Describe.\n{prompts.caption_request('image', 'i.jpg 0')}", "A cat."),),
        (("what?", "this"),),
    ]
    assert [(r.id, r.media, r.modality, r.span, r.source) for r in records] == [
        ("1164/3238737531.mp4", media / "1164/3238737531.mp4", "video", None, "s"),
        ("v.mp4", media / "v.mp4", "video", (3.0, 7.5), "s"),
        ("i.jpg", media / "i.jpg", "image", None, "s"),
        ("v.mp4#2", media / "v.mp4", "video", None, "s"),
    ]
    assert [(entry.number, entry.id, entry.reason) for entry in refused] == [
        (4, "number 4", 'has neither "image" nor "video"'),
        (5, "w.mp4", 'field "QA" is a list of 0, expected a list of 1 or more turns'),
        (6, "w.mp4", 'field "QA[0].a" is missing, expected a string'),
        (7, "w.mp4", 'field "QA[0]" is a list, expected an object'),
        (8, "../w.mp4", 'field "video": path \'../w.mp4\' contains "..", which could leave the media folder'),
    ]


# ---- VideoChatGPT-100K -----------------------------------------------------------------------------------


def test_videochatgpt(tmp_path):
    media = tmp_path / "media"
    touch(media, "v_k_ZXmr8pmrs.mkv", "v_two.webm", "v_two.mp4")
    question = "Describe the process of the makeup."
    records, refused = read(
        tmp_path,
        "videochatgpt",
        [
            {"q": question, "a": "She applies it.", "video_id": "v_k_ZXmr8pmrs"},
            {"q": "What next?", "a": "Mascara.", "video_id": "v_k_ZXmr8pmrs"},
            {"q": "What next?", "a": "Mascara.", "video_id": "v_k_ZXmr8pmrs"},
            {"q": "What?", "a": "It.", "video_id": "v_two"},
            {"q": "What?", "a": "It.", "video_id": "v_none"},
            {"q": "What?", "a": "", "video_id": "v_two"},
            {"q": "What?", "a": "It.", "video_id": "/etc/passwd"},
            {"q": "What?", "a": "It.", "video_id": 3},
        ],
    )
    assert [(record.id, record.media.name, record.turns) for record in records] == [
        ("v_k_ZXmr8pmrs", "v_k_ZXmr8pmrs.mkv", ((question, "She applies it."),)),
        ("v_k_ZXmr8pmrs#2", "v_k_ZXmr8pmrs.mkv", (("What next?", "Mascara."),)),
        ("v_two", "v_two.mp4", (("What?", "It."),)),
        ("v_none", "v_none.mp4", (("What?", "It."),)),
    ]
    assert {record.media.parent for record in records} == {media}
    assert {record.modality for record in records} == {"video"}
    assert [(entry.number, entry.fault) for entry in refused] == [
        (2, "duplicate"),
        (5, "text"),
        (6, "path"),
        (7, "form"),
    ]


def test_place_of_the_video_differs_between_questions(tmp_path):
    entries = [{"q": f"What {i}?", "a": "It.", "video_id": "v"} for i in range(400)]
    records, _ = read(tmp_path, "videochatgpt", entries)
    assert 150 < sum(record.visual_at_end for record in records) < 250
    again, _ = read(tmp_path, "videochatgpt", entries)
    assert places(again) == places(records)


# ---- WebVid ----------------------------------------------------------------------------------------------

WEBVID = ["videoid", "contentUrl", "duration", "page_dir", "name"]


def test_webvid(tmp_path):
    media = tmp_path / "media"
    touch(media, "006001_006050/1066674784.mp4", "25.mp4")
    url = "https://ak.picdn.net/shutterstock/videos/1066674784/preview/stock-footage.mp4"
    records, refused = read(
        tmp_path,
        "webvid",
        [
            WEBVID,
            ["1066674784", url, "PT00H00M10S", "006001_006050", 'A "great" view, of mountains.'],
            ["25", url, "PT00H00M10S", "000001_000050", "Flat."],
            ["26", url, "PT00H00M10S", "000001_000050", "Nowhere."],
            ["27", url, "PT00H00M10S", "", "No folder."],
            ["28", url, "PT00H00M10S", "000001_000050", " "],
            ["../../etc/passwd", url, "PT00H00M10S", "000001_000050", "Evil."],
            ["29", url, "PT00H00M10S", "../../etc", "Evil."],
            ["", url, "PT00H00M10S", "000001_000050", "Nameless."],
        ],
        suffix="csv",
    )
    assert [(record.id, str(record.media.relative_to(media)), record.turns) for record in records] == [
        (
            "1066674784",
            "006001_006050/1066674784.mp4",
            (
                (
                    "Provide a brief description of the given video.",
                    'A "great" view, of mountains.',
                ),
            ),
        ),
        ("25", "25.mp4", ((prompts.caption_request("video", "25"), "Flat."),)),
        ("26", "000001_000050/26.mp4", ((prompts.caption_request("video", "26"), "Nowhere."),)),
        ("27", "27.mp4", ((prompts.caption_request("video", "27"), "No folder."),)),
    ]
    assert [(entry.number, entry.id, entry.fault) for entry in refused] == [
        (4, "28", "text"),
        (5, "../../etc/passwd", "path"),
        (6, "29", "path"),
        (7, "number 7", "text"),
    ]


def test_webvid_header(tmp_path):
    with pytest.raises(UserError, match="the header 'videoid, name' has no column 'page_dir', expected"):
        read(tmp_path, "webvid", [["videoid", "name"], ["1", "x"]], suffix="csv")


# ---- ScienceQA -------------------------------------------------------------------------------------------


def test_scienceqa_in_llava_form(tmp_path):
    entries = [
        {
            "id": "1",
            "image": "1/image.png",
            "conversations": [
                {"from": "human", "value": "Which?\nContext: N/A\nOptions: (A) a (B) b\n<image>"},
                {"from": "gpt", "value": "Because. The answer is A."},
            ],
        },
        {
            "id": "2",
            "conversations": [
                {"from": "human", "value": "Which?\nContext: x\nOptions: (A) a (B) b"},
                {"from": "gpt", "value": "The answer is B."},
            ],
        },
    ]
    assert read(tmp_path, "scienceqa", entries) == read(tmp_path, "llava", entries)
    records, _ = read(tmp_path, "scienceqa", entries)
    assert [(record.modality, record.visual_at_end) for record in records] == [
        ("image", True),
        ("text", False),
    ]


PROBLEM = {
    "question": "Which of these states is farthest north?",
    "choices": ["West Virginia", "Louisiana"],
    "answer": 0,
    "hint": "",
    "image": "image.png",
    "task": "closed choice",
    "grade": "grade2",
    "lecture": "Maps have four cardinal directions.",
    "solution": "West Virginia is farthest north.",
    "split": "train",
}


def test_scienceqa_problems(tmp_path):
    media = tmp_path / "media"
    touch(media, "7/image.png")
    problems = {
        "1": PROBLEM,
        "3": PROBLEM | {"split": "test"},
        "5": PROBLEM | {"image": None, "hint": "Read.", "lecture": "", "answer": 1},
        "7": PROBLEM,
        "8": PROBLEM | {"split": "val"},
        "9": PROBLEM | {"answer": 2},
        "10": PROBLEM | {"choices": ["a"]},
        "11": "text",
        "12": PROBLEM | {"image": "../../../etc/passwd"},
    }
    write(tmp_path, "problems.json", problems)
    one = source(name="s", annotations="problems.json", format="scienceqa", media="media")
    records, refused = read_source(one, tmp_path)
    asked = "Which of these states is farthest north?\nContext: {}\nOptions: (A) West Virginia (B) Louisiana"
    told = "Maps have four cardinal directions. West Virginia is farthest north. The answer is A."
    assert [(record.id, record.media, record.turns, record.modality) for record in records] == [
        ("1", media / "train/1/image.png", ((asked.format("N/A"), told),), "image"),
        (
            "5",
            None,
            ((asked.format("Read."), "West Virginia is farthest north. The answer is B."),),
            "text",
        ),
        ("7", media / "7/image.png", ((asked.format("N/A"), told),), "image"),
    ]
    assert [(entry.number, entry.id, entry.fault) for entry in refused] == [
        (3, "9", "form"),
        (4, "10", "form"),
        (5, "number 5", "form"),
        (6, "12", "path"),
    ]


# ---- NExT-QA ---------------------------------------------------------------------------------------------

NEXTQA = ["video", "frame_count", "width", "height", "question", "answer", "qid", "type"]
NEXTQA += ["a0", "a1", "a2", "a3", "a4"]
OPTIONS = ["roll the handle", "tap their feet", "strum the string", "hit with sticks", "pat with hand"]


def nextqa(video, answer, qid, options=OPTIONS, question="how do the two man play the instrument"):
    return [video, "369", "640", "480", question, answer, qid, "CH", *options]


def test_nextqa(tmp_path):
    media = tmp_path / "media"
    touch(media, "1164/40.mp4", "41.mp4", "42.webm")
    write(tmp_path, "map_vid_vidorID.json", {"40": "1164/40", "41": "1150/41", "43": "1101/43"})
    records, refused = read(
        tmp_path,
        "nextqa",
        [
            NEXTQA,
            nextqa("40", "0", "6"),
            nextqa("41", "4", "1"),
            nextqa("42", "strum the string", "2", question="What is played?"),
            nextqa("43", "2", "3", ["one", "two", "three", "four", "five"]),
            nextqa("40", "5", "7"),
            nextqa("40", "jump", "8"),
            nextqa("40", "", "9"),
            nextqa("40", "0", "10", ["", *OPTIONS[1:]]),
            nextqa("../../etc/passwd", "0", "11"),
        ],
        suffix="csv",
    )
    choices = (
        "\nA. roll the handle\nB. tap their feet\nC. strum the string\nD. hit with sticks\nE. pat with hand\n"
        "Answer with the option's letter from the given choices directly."
    )
    asked = "how do the two man play the instrument?" + choices
    assert [(record.id, str(record.media.relative_to(media)), record.turns[0]) for record in records] == [
        ("40_6", "1164/40.mp4", (asked, "A")),
        ("41_1", "41.mp4", (asked, "E")),
        ("42_2", "42.webm", ("What is played?" + choices, "C")),
        (
            "43_3",
            "1101/43.mp4",
            (
                "how do the two man play the instrument?\nA. one\nB. two\nC. three\nD. four\nE. five\n"
                "Answer with the option's letter from the given choices directly.",
                "C",
            ),
        ),
    ]
    assert {record.kind for record in records} == {"CH"}
    assert [(entry.number, entry.fault) for entry in refused] == [
        (4, "form"),
        (5, "form"),
        (6, "text"),
        (7, "text"),
        (8, "path"),
    ]


def test_nextqa_without_a_map_or_with_an_invalid_one(tmp_path):
    rows = [NEXTQA, nextqa("40", "0", "6")]
    records, _ = read(tmp_path, "nextqa", rows, suffix="csv")
    assert records[0].media == tmp_path / "media/40.mp4"
    write(tmp_path, "map_vid_vidorID.json", {"40": 5})
    with pytest.raises(UserError, match=r"map_vid_vidorID.json: not NExT-QA"):
        read(tmp_path, "nextqa", rows, suffix="csv")
    write(tmp_path, "map_vid_vidorID.json", {"40": "../../etc/passwd"})
    _, refused = read(tmp_path, "nextqa", rows, suffix="csv")
    assert refused[0].fault == "path"


# ---- CLEVRER ---------------------------------------------------------------------------------------------


def choice(number, text, answer):
    return {"choice_id": number, "choice": text, "program": [], "answer": answer}


def test_clevrer(tmp_path):
    media = tmp_path / "media"
    touch(media, "video_10000.mp4")
    questions = [
        {
            "question_id": 0,
            "question": "How many spheres are moving?",
            "question_type": "descriptive",
            "program": ["events"],
            "answer": "2",
        },
        {
            "question_id": 1,
            "question": "Which will happen next?",
            "question_type": "predictive",
            "choices": [choice(0, "they collide", "correct"), choice(1, "they part", "wrong")],
        },
        {
            "question_id": 2,
            "question": "Which is responsible?",
            "question_type": "explanatory",
            "choices": [choice(0, "a", "correct"), choice(1, "b", "wrong"), choice(2, "c", "correct")],
        },
        {"question": "Which would?", "choices": [choice(0, "a", "wrong")]},
    ]
    bad = [
        {"question": "Which?", "choices": [choice(0, "a", "maybe")]},
        {"question": "Which?", "choices": []},
        {"question": "Which?", "choices": ["a"]},
        {"question": "How many?"},  # as in the test set, which has no answers
        {"answer": "2"},
        "text",
    ]
    records, refused = read(
        tmp_path,
        "clevrer",
        [
            {"scene_index": 10, "video_filename": "video_00010.mp4", "questions": questions},
            {"scene_index": 10000, "video_filename": "video_10000.mp4", "questions": questions[:1]},
            {"scene_index": 1, "video_filename": "other.mp4", "questions": questions[:1]},
            *({"video_filename": "video_00001.mp4", "questions": [question]} for question in bad),
            {"video_filename": "video_00001.mp4", "questions": []},
            {"video_filename": "../video_00001.mp4", "questions": questions},
        ],
    )
    several = "Answer with the letters of all options that are right, or with None."
    assert records[0].turns == (
        ("How many spheres are moving?\nAnswer the question using a single word or phrase.", "2"),
        (f"Which will happen next?\nA. they collide\nB. they part\n{several}", "A"),
        (f"Which is responsible?\nA. a\nB. b\nC. c\n{several}", "A, C"),
        (f"Which would?\nA. a\n{several}", "None"),
    )
    assert [(record.id, str(record.media.relative_to(media))) for record in records] == [
        ("video_00010.mp4", "video_00000-01000/video_00010.mp4"),
        ("video_10000.mp4", "video_10000.mp4"),
        ("other.mp4", "other.mp4"),
    ]
    assert [entry.number for entry in refused] == [3, 4, 5, 6, 7, 8, 9, 10]
    assert [entry.fault for entry in refused] == ["form"] * 7 + ["path"]
    assert refused[0].reason.startswith(
        "field \"questions[0].choices[0].answer\" is 'maybe', expected 'correct'"
    )
    assert refused[3].reason == 'field "questions[0].answer" is missing, expected a string'


# ---- Common to all formats -------------------------------------------------------------------------------


def test_modality_of_a_source(tmp_path):
    """Records of another modality are refused; "auto" allows all."""
    video = {"id": "v", "video": "v.mp4", "conversations": LLAVA_558K[0]["conversations"]}
    entries = [LLAVA_558K[0], LLAVA_665K[1], video]
    for modality, kept in (("auto", [0, 1, 2]), ("image", [0]), ("text", [1]), ("video", [2])):
        records, refused = read(tmp_path, "llava", entries, modality=modality)
        assert [record.id for record in records] == [entries[i]["id"] for i in kept], modality
        assert {entry.fault for entry in refused} <= {"modality"}
        assert sorted([entry.number for entry in refused] + kept) == [0, 1, 2]
    _, refused = read(tmp_path, "llava", entries, modality="text")
    assert refused[0].reason == "has modality 'image', but its source has modality 'text'"


def test_paths_of_a_source(tmp_path, monkeypatch):
    """Relative to the data root, absolute, or in the home folder."""
    elsewhere = tmp_path / "elsewhere"
    path = write(elsewhere, "b.json", LLAVA_558K)
    expected = elsewhere / "00453/004539375.jpg"
    monkeypatch.setenv("HOME", str(tmp_path))
    for annotations, media in (
        (str(path), str(elsewhere)),
        ("../elsewhere/b.json", "../elsewhere"),
        ("~/elsewhere/b.json", "~/elsewhere"),
    ):
        records, _ = read_source(source(name="s", annotations=annotations, media=media), tmp_path / "media")
        assert records[0].media == expected
    records, _ = read_source(source(name="s", annotations="b.json"), elsewhere)
    assert records[0].media == expected


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"annotation file .*none.json: cannot be read \(No such file"):
        read_source(source(name="s", annotations="none.json"), tmp_path)
    write(tmp_path, "a.json", LLAVA_558K)
    with pytest.raises(UserError, match=r"source 's': media is 'none', but .* is not a folder"):
        read_source(source(name="s", annotations="a.json", media="none"), tmp_path)
    write(tmp_path, "problems.json", [])
    with pytest.raises(UserError, match=r"problems.json is a list, expected a JSON object of problems"):
        read_source(source(name="s", annotations="problems.json", format="scienceqa"), tmp_path)
