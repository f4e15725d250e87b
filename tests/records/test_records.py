"""LLaVA annotation files: records, error messages for each mistake, unique ids."""

import json
import time
from pathlib import Path

import pytest

from dynfocus_jax.errors import UserError
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.format_reader import SourceFiles
from dynfocus_jax.records.formats.llava import read_llava
from dynfocus_jax.records.records import Record
from dynfocus_jax.records.sources import read_records


def talk(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def read(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_records(path, tmp_path / "media")


def parse(tmp_path, entries):
    """Return (records, refused) of entries."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(entries))
    return read_llava(SourceFiles(path, MediaFolder(tmp_path)))


def test_records(tmp_path):
    media = tmp_path / "media"
    entries = [
        {"id": "a", "video": "v/1.mp4", "conversations": talk("<image>\nhow ?", "so", "and ?", "thus")},
        {
            "id": 7,
            "image": "1.png",
            "conversations": talk("what ?\n<image>", "this"),
            "type": "shape",
            "needle_frames": [[3, 9]],
            "other": None,
        },
        {"id": "t", "image": None, "start": None, "conversations": talk("why ?", " because ")},
        {
            "id": "v",
            "video": "2.mp4",
            "conversations": talk("<video>\nhow ?", "so"),
            "start": 1,
            "end": 2.5,
            "subtitles": "2.srt",
        },
        # Without a file, markers are text.
        {"id": "h", "conversations": talk("an <image> in <video> ?", "as <image>")},
    ]
    expected = [
        Record("a", media / "v/1.mp4", (("how ?", "so"), ("and ?", "thus")), modality="video"),
        Record(
            "7",
            media / "1.png",
            (("what ?", "this"),),
            visual_at_end=True,
            kind="shape",
            needle_frames=((3, 9),),
            modality="image",
        ),
        Record("t", None, (("why ?", "because"),), modality="text"),
        Record("v", media / "2.mp4", (("how ?", "so"),), span=(1.0, 2.5), subtitles=media / "2.srt"),
        Record("h", None, (("an <image> in <video> ?", "as <image>"),)),
    ]
    assert read(tmp_path, entries) == expected
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(map(json.dumps, entries)))
    assert read_records(lines, media) == expected


GOOD = {"id": "r1", "image": "1.png", "conversations": talk("<image>\nq", "a")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, '"id"'),
        ({"conversations": None}, '"conversations" is missing, expected a list'),
        ({"conversations": []}, '"conversations" is a list of 0, expected a list of 1 or more messages'),
        ({"conversations": talk("<image>\nq")}, "is a list of 1, expected an answer to each question"),
        ({"conversations": talk("<image>\nq", "a", "r")}, "is a list of 3, expected an answer"),
        ({"conversations": talk("<image>\nq", "a")[::-1]}, r'"conversations\[0\].from" is \'gpt\''),
        ({"conversations": talk("<image>\nq", "")}, r'"conversations\[1\].value" has no text'),
        ({"conversations": talk("<image>", "a")}, r'"conversations\[0\].value" has no text'),
        (
            {"conversations": talk("<image>\nq", "a", "<image> r", "b")},
            r'"conversations\[2\].value" contains <image>, expected only',
        ),
        ({"conversations": talk("see <image> there", "a")}, "contains <image> within the text"),
        ({"conversations": talk("<image>\nq", 5)}, r'"conversations\[1\].value" is 5, expected a string'),
        ({"conversations": ["q", "a"]}, r"\"conversations\[0\]\" is 'q', expected an object"),
        ({"conversations": talk("q", "a")}, "the first message has no <image>"),
        ({"image": 5}, '"image" is 5, expected a path'),
        ({"video": "1.mp4"}, 'both "image" and "video"'),
        ({"type": 3}, '"type" is 3, expected a string'),
        ({"id": ""}, '"id" has no text'),
        ({"id": True}, '"id" is True, expected a string or an integer'),
        ({"id": "a\nb"}, '"id" has unprintable characters'),
        ({"id": "i" * 2000}, '"id" has 2000 characters, expected at most 1024'),
        ({"image": "../1.png"}, r'"image": path \'../1.png\' contains "\.\."'),
        ({"image": "/1.png"}, '"image": path .* is absolute'),
        ({"image": ["1.png", "2.png"]}, '"image" is a list, expected a path'),
        ({"subtitles": "/1.srt"}, '"subtitles": path .* is absolute'),
        ({"start": 2, "end": 1}, '"start" and "end" are 2 and 1, expected seconds'),
        ({"start": "0", "end": 1}, '"start" and "end" are \'0\' and 1'),
        ({"start": 2, "end": 2}, '"start" and "end" are 2 and 2'),
        ({"start": 1}, '"start" and "end" are 1 and null'),
        ({"start": 0, "end": 10**400}, '"start" and "end" are 0 and 10000'),
        ({"conversations": talk("<image>\nq", "\ud800")}, r'"conversations\[1\].value" is not Unicode'),
        (
            {"conversations": talk("<image>\n" + "q" * 10**6, "a")},
            r'"conversations\[0\].value" has \d+ characters, expected at most 524288',
        ),
        (
            {"conversations": talk("<image>\nq", *["a" * 10**5] * 7)},
            "has 700009 characters of text, expected at most 524288",
        ),
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
    assert ("record r1: " in str(error.value)) == ("id" not in change)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_marker_without_media(tmp_path):
    entry = {key: value for key, value in GOOD.items() if key != "image"}
    with pytest.raises(UserError, match='no field "image" or "video"'):
        read(tmp_path, [entry])


def test_names_of_refused_entries(tmp_path):
    bad = [
        {"id": 5},
        {"id": "x" * 500},
        {"id": None, "video": "v.mp4"},
        {"id": [1]},
        "text",
    ]
    _, refused = parse(tmp_path, bad)
    assert [entry.number for entry in refused] == [0, 1, 2, 3, 4]
    assert [entry.id for entry in refused][::2] == ["5", "v.mp4", "number 4"]
    assert refused[3].id == "number 3"
    assert len(refused[1].id) < 100


def test_ids_become_unique(tmp_path):
    """Duplicates are refused; other entries of the same id are renamed, without using a name that exists."""

    def entry(name, answer="a", video=None):
        marker = "" if video is None else "<image>"
        media = {} if video is None else {"video": video}
        return {"id": name, "conversations": talk(marker + "q", answer)} | media

    entries = [
        entry("a"),
        entry("a#3"),
        entry("a", "b"),
        entry("a"),  # repeats the first
        entry("a", "c"),
        entry("a", "b"),  # repeats the third
        entry("a", video="1.mp4"),
        entry("a", video="2.mp4"),
        entry("a#3", "d"),
        entry("a#2", "e"),
    ]
    records, refused = parse(tmp_path, entries)
    assert [record.id for record in records] == ["a", "a#3", "a#2", "a#4", "a#5", "a#6", "a#3#2", "a#2#2"]
    assert [record.turns[0][1] for record in records] == ["a", "a", "b", "c", "a", "a", "d", "e"]
    assert [(entry.number, entry.id, entry.fault) for entry in refused] == [
        (3, "a", "duplicate"),
        (5, "a", "duplicate"),
    ]
    assert refused[0].reason == (
        "duplicates an earlier record; to use records several times, set `repeat` of the source"
    )


def test_many_records_of_one_id_are_fast(tmp_path):
    entries = [{"id": "a", "conversations": talk("q", str(i))} for i in range(20_000)]
    started = time.process_time()
    records, _ = parse(tmp_path, entries)
    assert time.process_time() - started < 20
    assert len({record.id for record in records}) == 20_000


def test_faults(tmp_path):
    image = {"image": "1.png"}
    cases = {
        "turns": {"conversations": talk("q", "a")[::-1]},
        "text": {"conversations": talk("q", "")},
        "path": {"conversations": talk("<image>q", "a")} | image | {"image": "/x"},
        "size": {"conversations": talk("q", "a" * 10**6)},
        "form": {"conversations": 5},
    }
    entries = [{"id": name, **case} for name, case in cases.items()]
    records, refused = parse(tmp_path, entries)
    assert records == []
    assert {entry.id: entry.fault for entry in refused} == {name: name for name in cases}


def test_default_modality():
    assert Record("a", None, ()).modality == "text"
    assert Record("a", Path("a.png"), ()).modality == "video"
    assert Record("a", Path("a.png"), (), modality="image").modality == "image"


def test_files_that_are_not_annotations(tmp_path):
    for content, message in [
        ("{", r"starts with '\{'"),
        ({"a": 1}, r"starts with '\{', expected a JSON list"),
        ("null", "starts with 'n'"),
        (["x"], "record number 0: is 'x', expected an object"),
    ]:
        with pytest.raises(UserError, match=message):
            read(tmp_path, content)
    with pytest.raises(UserError, match="No such file"):
        read_records(tmp_path / "none.json", Path())
