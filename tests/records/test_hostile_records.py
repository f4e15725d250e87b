"""Hostile annotation files: every entry is a valid record or refused, and no path leaves the media folder."""

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
from dynfocus_jax.records.sources import read_source

SETTINGS = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])

# A valid entry of each format.
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
    """A media folder with links that leave it, beside a secret folder."""
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
    """Read a source, check all guarantees, and return the numbers of the refused entries."""
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


HOSTILE_PATHS = [
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
HOSTILE_TEXTS = [
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
HOSTILE_VALUES = [
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
    st.sampled_from(HOSTILE_PATHS + HOSTILE_TEXTS + HOSTILE_VALUES)
    | st.text(max_size=5)
    | st.integers()
    | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    """Yield the path of every value within an entry."""
    yield path
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(inner, (*path, key))


@st.composite
def mutants(draw, form):
    """An entry with one to three values replaced or removed."""
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
def test_mutated_entries(root, form):
    @SETTINGS
    @given(st.lists(mutants(form) | st.just(ENTRIES[form]), min_size=1, max_size=4))
    def run(entries):
        entries = [ENTRIES[form], *entries]
        numbers = check(root, write(root, form, entries), len(entries))
        assert 0 not in numbers  # a valid entry is never lost because of the others

    run()


@pytest.mark.parametrize("form", [form for form in ENTRIES if FILES.get(form) == "a.csv"])
def test_mutated_rows(root, form):
    # Without cells above the limit: a row with line breaks would end within such a cell.
    cells = [each for each in HOSTILE_PATHS + HOSTILE_TEXTS if "\ud83d" not in each and len(each) < 10**5]
    fields = st.sampled_from(cells) | st.text(max_size=5)
    changes = st.dictionaries(st.sampled_from(sorted(ENTRIES[form])), fields, max_size=3)

    @SETTINGS
    @given(st.lists(changes, min_size=1, max_size=4))
    def run(changes):
        rows = [ENTRIES[form], *(ENTRIES[form] | change for change in changes)]
        assert 0 not in check(root, write(root, form, rows), len(rows))

    run()


@pytest.mark.parametrize("form", [form for form in ENTRIES if FILES.get(form) == "a.csv"])
def test_rows_with_a_huge_cell(root, form):
    for key in ENTRIES[form]:
        rows = [ENTRIES[form], ENTRIES[form] | {key: "x" * 2**20}]
        assert check(root, write(root, form, rows), 2) == [1]


def with_path(form, path):
    """Return a valid entry of a format, except for its path."""
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
    """By every format, including those that add a suffix or a folder; the reason names the path."""
    bare = path.removesuffix(".mp4") if form in ("videochatgpt", "webvid", "nextqa") else path
    if form == "scienceqa" and path in ("/etc/passwd", "folder_out/a.mp4", "out.mp4"):
        bare = f"../{path}"  # each of its images is in a folder of its own
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
def test_faults(root, change, fault):
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
def test_arbitrary_lines(root, lines):
    """Every line except the valid one is refused."""
    lines = [line.replace(b"\n", b"").replace(b"\r", b"") for line in lines]
    good = json.dumps(ENTRIES["llava"]).encode()
    (root / "a.jsonl").write_bytes(b"\n".join([good, *lines]))
    present = [line for line in lines if line.decode("utf-8", "surrogateescape").strip()]
    numbers = check(root, source(name="s", annotations="a.jsonl", media="media"), 1 + len(present))
    assert numbers == list(range(1, 1 + len(present)))


@SETTINGS
@given(st.sampled_from(sorted(ENTRIES)), st.binary(max_size=60))
def test_arbitrary_files(root, form, content):
    """Any file is read, or refused with a UserError of one line."""
    one = write(root, form, [])
    (root / one.annotations).write_bytes(content)
    message = ""
    try:
        read_source(one, root)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 500
