"""Annotation files made to do harm: every entry is a sound record or refused, and none leaves its folder."""

import copy
import csv
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynfocus_jax.config import source
from dynfocus_jax.errors import UserError
from dynfocus_jax.records.entries import MAX_TEXT
from dynfocus_jax.records.formats import read_source

SETTINGS = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])

# An entry of each format that is right, and the fields of it that name a file.
TALK = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
ENTRIES = {
    "llava": {
        "id": "good",
        "video": "a.mp4",
        "conversations": TALK,
        "start": 0,
        "end": 2,
        "subtitles": "a.srt",
    },
    "videochat2": {"video": "a.mp4", "QA": [{"i": "", "q": "q", "a": "a"}, {"i": "i", "q": "", "a": "b"}]},
    "videochatgpt": {"video_id": "a", "q": "q", "a": "a"},
    "webvid": {"videoid": "a", "name": "caption", "page_dir": ""},
    "scienceqa": {
        "question": "q",
        "choices": ["a", "b"],
        "answer": 1,
        "image": "a.png",
        "hint": "",
        "lecture": "",
    },
    "nextqa": {"video": "a", "question": "q", "answer": "0", "qid": "1", "type": "CH"}
    | {f"a{i}": f"option {i}" for i in range(5)},
    "clevrer": {
        "video_filename": "a.mp4",
        "questions": [
            {"question": "q", "answer": "a"},
            {"question": "q", "choices": [{"choice": "c", "answer": "wrong"}]},
        ],
    },
}
FILES = {name: "a.csv" for name in ("webvid", "nextqa")} | {"scienceqa": "problems.json"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Media with links that leave the folder, and a secret outside."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "secret").mkdir()
    media = root / "media"
    media.mkdir()
    for name in ("a.mp4", "a.png", "good.mp4"):
        (media / name).write_text(name)
        (root / "secret" / name).write_text("secret")
    os.symlink(root / "secret", media / "folder_out")
    for name in ("out", "out.mp4", "out.png", "out.srt"):
        os.symlink(root / "secret" / "a.mp4", media / name)
    os.mkfifo(media / "pipe.mp4")
    return root


def write(root, form, entries):
    path = root / FILES.get(form, "a.json")
    if path.suffix == ".csv":
        out = io.StringIO()
        rows = csv.DictWriter(out, list(ENTRIES[form]), extrasaction="ignore")
        rows.writeheader()
        rows.writerows(entries)
        path.write_text(out.getvalue(), encoding="utf-8", errors="surrogatepass", newline="")
    elif form == "scienceqa":
        path.write_text(json.dumps({f"{i}": entry for i, entry in enumerate(entries)}))
    else:
        path.write_text(json.dumps(entries))
    return source(name="s", annotations=path.name, format=form, media="media")


def check(root, one, count):
    """Reads a source and holds every promise against what comes of it; the numbers of refused entries."""
    records, refused = read_source(one, root)
    assert len(records) + len(refused) == count
    numbers = [entry.number for entry in refused]
    assert numbers == sorted(set(numbers))
    assert all(0 <= number < count for number in numbers)
    assert len({record.id for record in records}) == len(records)
    for entry in refused:
        assert entry.reason
        for text in (entry.id, entry.reason):
            assert len(text) < 400
            assert text.isprintable()
    inside = os.path.realpath(root / "media")
    for record in records:
        assert record.id.isprintable()
        for path in filter(None, (record.media, record.subtitles)):
            assert isinstance(path, Path)
            assert Path(os.path.realpath(path)).is_relative_to(inside)
            assert not path.exists() or path.is_file()
        assert record.turns
        for text in (text for turn in record.turns for text in turn):
            assert text.strip() == text != ""
            text.encode("utf-8")
        assert sum(len(text) for turn in record.turns for text in turn) <= MAX_TEXT
        assert record.modality in ("text", "image", "video")
        assert (record.media is None) == (record.modality == "text")
        assert record.span is None or 0 <= record.span[0] < record.span[1]
    return numbers


EVIL_PATHS = [
    *("../../etc/passwd", "/etc/passwd", "//etc/passwd", "..", "a/../../secret/a.mp4", "./../secret/a.mp4"),
    *(
        "out",
        "out.mp4",
        "out.png",
        "folder_out/a.mp4",
        "folder_out/a",
        "./folder_out//a.mp4",
        "pipe.mp4",
        ".",
    ),
    *(
        "a\0.mp4",
        "a.mp4\0/etc/passwd",
        "file:///etc/passwd",
        "http://x/a.mp4",
        "concat:/etc/passwd",
        "~/a.mp4",
    ),
    *("x" * 300, "x/" * 4000, "", " ", "\ud800", "folder_out", "..\\..\\etc\\passwd", "%2e%2e/secret/a.mp4"),
]
EVIL_TEXTS = [
    "",
    " \n",
    "x" * 10**6,
    "\ud83d",
    "a\udc80",
    "<image>",
    "see <image> there",
    "<video>",
    "\0",
    "a\r\nb",
    "\u2019",
    "\r",
]
EVIL_VALUES = [
    None,
    True,
    -1,
    0,
    10**300,
    1.5,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    ["x"] * 9,
]
VALUES = st.recursive(
    st.sampled_from(EVIL_PATHS + EVIL_TEXTS + EVIL_VALUES)
    | st.text(max_size=5)
    | st.integers()
    | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    """Where something can be put in an entry."""
    yield path
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(inner, (*path, key))


@st.composite
def mutants(draw, form):
    """An entry with one to three of its parts replaced or left out."""
    entry = copy.deepcopy(ENTRIES[form])
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(entry), key=str)))
        if not path:
            return copy.deepcopy(draw(VALUES))
        inner = entry
        for key in path[:-1]:
            inner = inner[key]
        if draw(st.booleans()):
            inner[path[-1]] = copy.deepcopy(draw(VALUES))
        else:
            del inner[path[-1]]
    return entry


@pytest.mark.parametrize("form", [form for form in ENTRIES if FILES.get(form) != "a.csv"])
def test_changed_entries(root, form):
    @SETTINGS
    @given(st.lists(mutants(form) | st.just(ENTRIES[form]), min_size=1, max_size=4))
    def run(entries):
        entries = [ENTRIES[form], *entries]
        numbers = check(root, write(root, form, entries), len(entries))
        assert 0 not in numbers  # what is right is never lost to what is not

    run()


@pytest.mark.parametrize("form", [form for form in ENTRIES if FILES.get(form) == "a.csv"])
def test_changed_rows(root, form):
    # Without what is too large for a cell, whose row would end in the middle of those with line breaks.
    cells = [each for each in EVIL_PATHS + EVIL_TEXTS if "\ud83d" not in each and len(each) < 10**5]
    fields = st.sampled_from(cells) | st.text(max_size=5)
    changes = st.dictionaries(st.sampled_from(sorted(ENTRIES[form])), fields, max_size=3)

    @SETTINGS
    @given(st.lists(changes, min_size=1, max_size=4))
    def run(changes):
        rows = [ENTRIES[form], *(ENTRIES[form] | change for change in changes)]
        assert 0 not in check(root, write(root, form, rows), len(rows))

    run()


@pytest.mark.parametrize("form", [form for form in ENTRIES if FILES.get(form) == "a.csv"])
def test_rows_with_a_cell_of_a_megabyte(root, form):
    for key in ENTRIES[form]:
        rows = [ENTRIES[form], ENTRIES[form] | {key: "x" * 2**20}]
        assert check(root, write(root, form, rows), 2) == [1]


def with_path(form, path):
    """A right entry of a format, but for the path that it names."""
    entry = copy.deepcopy(ENTRIES[form])
    key = {"llava": "video", "videochat2": "video", "videochatgpt": "video_id", "webvid": "videoid"}.get(form)
    entry[key or {"scienceqa": "image", "nextqa": "video", "clevrer": "video_filename"}[form]] = path
    return entry


@pytest.mark.parametrize("form", ENTRIES)
@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "../secret/a.mp4",
        "a/../../secret/a.mp4",
        "folder_out/a.mp4",
        "out.mp4",
    ],
)
def test_paths_that_leave_the_folder_are_refused(root, form, path):
    """By every format, with a reason of the path; those formats that add a suffix or a folder as well."""
    bare = path.removesuffix(".mp4") if form in ("videochatgpt", "webvid", "nextqa") else path
    if form == "scienceqa" and path in ("/etc/passwd", "folder_out/a.mp4", "out.mp4"):
        bare = f"../{path}"  # its images are in folders of their own
    _, refused = read_source(write(root, form, [ENTRIES[form], with_path(form, bare)]), root)
    assert [(entry.number, entry.fault) for entry in refused] == [(1, "path")]
    assert (
        ".." in refused[0].reason
        or "absolute" in refused[0].reason
        or "link that leaves" in refused[0].reason
    )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"id": 1.5}, "form"),
        ({"id": None}, "form"),
        ({"conversations": {}}, "form"),
        ({"conversations": [1, 2]}, "form"),
        ({"conversations": TALK[::-1]}, "turns"),
        ({"conversations": TALK[:1]}, "turns"),
        ({"conversations": TALK[:1] * 2}, "turns"),
        ({"conversations": [TALK[0], {"from": "gpt", "value": ""}]}, "text"),
        ({"conversations": [TALK[0], {"from": "gpt", "value": " \n"}]}, "text"),
        ({"conversations": [TALK[0], {"from": "gpt", "value": None}]}, "form"),
        ({"conversations": [TALK[0], {"from": "gpt", "value": "x" * 2**20}]}, "size"),
        ({"id": "x" * 2**20}, "size"),
        ({"video": "x" * 2**20}, "path"),
        ({"type": "x" * 2**20}, "size"),
        ({"subtitles": "../a.srt"}, "path"),
        ({}, "duplicate"),
    ],
)
def test_what_is_wrong_with_a_record(root, change, fault):
    entries = [ENTRIES["llava"], ENTRIES["llava"] | change]
    one = write(root, "llava", entries)
    assert check(root, one, 2) == [1]
    _, refused = read_source(one, root)
    assert refused[0].fault == fault


@SETTINGS
@given(
    st.lists(
        st.binary(max_size=40) | st.sampled_from([b"[" * 10**5, b"1" * 10**4, b'{"id":' * 50]), max_size=5
    )
)
def test_lines_of_anything(root, lines):
    """A file of lines, each refused but the right one: nothing else can be meant by them."""
    lines = [line.replace(b"\n", b"").replace(b"\r", b"") for line in lines]
    good = json.dumps(ENTRIES["llava"]).encode()
    (root / "a.jsonl").write_bytes(b"\n".join([good, *lines]))
    present = [line for line in lines if line.decode("utf-8", "surrogateescape").strip()]
    numbers = check(root, source(name="s", annotations="a.jsonl", media="media"), 1 + len(present))
    assert numbers == list(range(1, 1 + len(present)))


@SETTINGS
@given(st.sampled_from(sorted(ENTRIES)), st.binary(max_size=60))
def test_files_of_anything(root, form, content):
    """A file is read or refused as a whole, in one sentence; nothing else is raised."""
    one = write(root, form, [])
    (root / one.annotations).write_bytes(content)
    said = ""
    try:
        read_source(one, root)
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 500
