"""LLaVA annotation files: what is read, and what each mistake says."""

import json
from pathlib import Path

import pytest

from dynfocus_jax.config import UserError
from dynfocus_jax.data.sources import Record, read_records


def talk(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def read(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_records(path, tmp_path / "media")


def test_records(tmp_path):
    media = tmp_path / "media"
    assert read(
        tmp_path,
        [
            {"id": "a", "video": "v/1.mp4", "conversations": talk("<image>\nhow ?", "so", "and ?", "thus")},
            {
                "id": 7,
                "image": "1.png",
                "conversations": talk("what ?\n<image>", "this"),
                "type": "shape",
                "needle_frames": [[3, 9]],
                "other": None,
            },
            {"id": "t", "conversations": talk("why ?", " because ")},
            {"id": "v", "video": "2.mp4", "conversations": talk("<video>\nhow ?", "so")},
        ],
    ) == [
        Record("a", media / "v/1.mp4", (("how ?", "so"), ("and ?", "thus"))),
        Record(
            "7",
            media / "1.png",
            (("what ?", "this"),),
            visual_at_end=True,
            kind="shape",
            needle_frames=((3, 9),),
        ),
        Record("t", None, (("why ?", "because"),)),
        Record("v", media / "2.mp4", (("how ?", "so"),)),
    ]


GOOD = {"id": "r1", "image": "1.png", "conversations": talk("<image>\nq", "a")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, '"id"'),
        ({"conversations": None}, '"conversations" must be a list'),
        ({"conversations": []}, '"conversations" must be a list'),
        ({"conversations": talk("<image>\nq")}, '"conversations" must be a list'),
        ({"conversations": talk("<image>\nq", "a")[::-1]}, r'"conversations\[0\].from" is \'gpt\''),
        ({"conversations": talk("<image>\nq", "")}, r'"conversations\[1\].value" has no text'),
        ({"conversations": talk("<image>", "a")}, r'"conversations\[0\].value" has no text'),
        (
            {"conversations": talk("<image>\nq", "a", "<image> r", "b")},
            r'"conversations\[2\].value" has a stray',
        ),
        ({"conversations": talk("see <image> there", "a")}, "<image> inside"),
        ({"conversations": talk("<image>\nq", 5)}, r'"conversations\[1\].value" is missing or not a string'),
        ({"conversations": ["q", "a"]}, r'"conversations\[0\]" is a string'),
        ({"conversations": talk("q", "a")}, "first human turn has no <image>"),
        ({"image": 5}, '"image" is not a path'),
        ({"video": "1.mp4"}, 'both "image" and "video"'),
        ({"type": 3}, '"type" is the value 3'),
        ({"needle_frames": [[1, "2"]]}, '"needle_frames" is'),
        ({"needle_frames": [[-1]]}, '"needle_frames" is'),
        ({"needle_frames": [1]}, '"needle_frames" is'),
        ({"needle_frames": [[1], [2]]}, '"needle_frames" is'),
    ],
)
def test_mistakes_name_file_record_and_field(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, [dict(GOOD, id="r0"), GOOD | change])
    assert str(tmp_path / "a.json") in str(error.value)
    assert ("record r1" if change.get("id", "r1") else "record None") in str(error.value)
    assert "\n" not in str(error.value)


def test_marker_without_media(tmp_path):
    entry = {key: value for key, value in GOOD.items() if key != "image"}
    with pytest.raises(UserError, match='no field "image" or "video"'):
        read(tmp_path, [entry])


def test_files_that_are_no_annotations(tmp_path):
    for content, message in [
        ("{", "not JSON"),
        ({"a": 1}, "an object: expected a list"),
        ("null", "null"),
        (["x"], "record number 0: is a string"),
    ]:
        with pytest.raises(UserError, match=message):
            read(tmp_path, content)
    with pytest.raises(UserError, match="No such file"):
        read_records(tmp_path / "none.json", Path())
