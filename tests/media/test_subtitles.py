"""Subtitles: both formats with the variations that occur, assignment to frames, tokenization."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynfocus_jax.errors import MediaError
from dynfocus_jax.media.subtitles import Subtitle, assign_subtitles, read_subtitles, tokenize_subtitles

SRT = """1
00:00:01,000 --> 00:00:02,500
Hello,
<i>world</i>!

2
00:01:02,040 --> 00:01:03,000 X1:100 X2:200
{\\an8}- Who's there?

3
01:00:00,000 --> 01:00:01,000


4
01:00:02,000 --> 01:00:03,000
12 & <b>more</b> 3 < 4
"""
SRT_EXPECTED = [
    Subtitle(1.0, 2.5, "Hello, world!"),
    Subtitle(62.04, 63.0, "- Who's there?"),
    Subtitle(3602.0, 3603.0, "12 & more 3 < 4"),
]
VTT = """WEBVTT - a title
Kind: captions
Language: en

STYLE
::cue { color: red }

NOTE this is
not shown

intro
00:01.000 --> 00:02.500 align:start position:0%
<v Ann>Hi <00:01.500><c>there</c>

00:02.500 --> 00:04.000
A &amp; B &lt;3

1:00:00.000 --> 1:00:01.5
late
"""
VTT_EXPECTED = [
    Subtitle(1.0, 2.5, "Hi there"),
    Subtitle(2.5, 4.0, "A & B <3"),
    Subtitle(3600.0, 3601.5, "late"),
]


@pytest.mark.parametrize(("text", "expected"), [(SRT, SRT_EXPECTED), (VTT, VTT_EXPECTED)])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_both_formats(tmp_path, text, expected, newline, encoding):
    (tmp_path / "s.srt").write_bytes(text.replace("\n", newline).encode(encoding))
    assert read_subtitles(tmp_path / "s.srt") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("\n\n\n", []),
        ("WEBVTT\n", []),
        # no empty line between subtitles, no newline at the end, an empty line within a text
        ("1\n0:0:1,0 --> 0:0:2,0\na\n2\n0:0:3,0 --> 0:0:4,0\nb\n\nc", [(1, 2, "a"), (3, 4, "b c")]),
        # not in order; the end before the start; a text of digits
        ("00:05.0 --> 00:04.0\n77\n\n00:01.0 --> 00:02.0\n2\n", [(1, 2, "2"), (5, 5, "77")]),
        ("1\n00:00:01,05 --> 00:00:02,5\nx", [(1.05, 2.5, "x")]),
    ],
)
def test_variations_of_the_formats(tmp_path, text, expected):
    (tmp_path / "s.srt").write_text(text, encoding="utf-8")
    assert read_subtitles(tmp_path / "s.srt") == [Subtitle(*each) for each in expected]


def test_other_encodings(tmp_path):
    (tmp_path / "s.srt").write_bytes("1\n00:00:01,000 --> 00:00:02,000\nCafé „gut“\n".encode("cp1252"))
    assert read_subtitles(tmp_path / "s.srt") == [Subtitle(1.0, 2.0, "Café „gut“")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"just some text\nwithout times\n", "'just some text' has no timing"),
        (b"1\n00:00:01,000 -> 00:00:02,000\nx\n", "line 2: invalid timing"),
        (
            b"1\n00:00:01,000 --> 00:00:02,000\nx\n\n2\n00:00:0x --> 00:00:03,000\ny\n",
            "no timing|line 6: invalid timing",
        ),
        (b"words\n\n00:00:01,000 --> 00:00:02,000\nx\n", "'words' has no timing"),
    ],
)
def test_invalid_files_are_refused(tmp_path, content, message):
    (tmp_path / "s.srt").write_bytes(content)
    with pytest.raises(MediaError, match=message) as error:
        read_subtitles(tmp_path / "s.srt")
    assert "s.srt" in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(MediaError, match=r"none\.srt: no such file"):
        read_subtitles(tmp_path / "none.srt")


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("s") / "s.vtt"
    path.write_bytes(content)
    with contextlib.suppress(MediaError):
        read_subtitles(path)


def test_each_belongs_to_the_frame_that_shows_it():
    subtitles = [
        Subtitle(0.0, 4.0, "ends before the first frame"),
        Subtitle(4.0, 6.0, "at the first"),
        Subtitle(5.0, 5.0, "without duration, at the first"),
        Subtitle(6.0, 9.0, "between the first and the second"),
        Subtitle(9.0, 21.0, "at the second and the third"),
        Subtitle(15.0, 15.0, "without duration, at the second"),
        Subtitle(24.0, 26.0, "at the last"),
        Subtitle(90.0, 99.0, "after the last"),
    ]
    texts = [[each.text for each in frame] for frame in assign_subtitles(subtitles, [5.0, 15.0, 20.0, 25.0])]
    assert texts == [
        [
            "ends before the first frame",
            "at the first",
            "without duration, at the first",
            "between the first and the second",
        ],
        ["at the second and the third", "without duration, at the second"],
        [],
        ["at the last", "after the last"],
    ]


def test_span():
    subtitles = [Subtitle(float(i), i + 1.0, str(i)) for i in range(10)]
    frames = assign_subtitles(subtitles, [3.5, 5.5], span=(3.0, 6.5))
    assert [[each.text for each in frame] for frame in frames] == [["3", "4"], ["5", "6"]]
    assert assign_subtitles(subtitles, []) == []


def encode(text):
    """Return one token per character."""
    return list(map(ord, text))


def test_subtitles_of_a_frame_are_one_text():
    frames = [[Subtitle(0, 1, "ab"), Subtitle(1, 2, "c")], [], [Subtitle(5, 6, "de")]]
    tokens, places, kept = tokenize_subtitles(frames, encode, 6)
    assert ("".join(map(chr, tokens)), places, kept) == ("ab cde", [0, 0, 0, 0, 2, 2], 3)
    assert tokenize_subtitles([[], []], encode, 0) == ([], [], 0)
    assert tokenize_subtitles([], encode, 3) == ([], [], 0)


def test_whole_subtitles_are_dropped_evenly():
    frames = [[Subtitle(i, i + 1, chr(97 + i) * 2)] for i in range(9)]
    for room in range(18, -1, -1):
        tokens, places, kept = tokenize_subtitles(frames, encode, room)
        assert kept == room // 2  # two characters each
        chosen = places[::2]
        assert "".join(map(chr, tokens)) == "".join(chr(97 + i) * 2 for i in chosen)
        gaps = np.diff([-1, *chosen, 9])
        assert kept == 0 or gaps.max() <= -(-9 // kept) + 1  # the gaps are about equal
    assert tokenize_subtitles([[Subtitle(0, 1, "long")]], encode, 3) == ([], [], 0)


@settings(deadline=None, derandomize=True)
@given(
    starts=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 30)), max_size=30),
    times=st.lists(st.floats(0, 100), min_size=1, max_size=20, unique=True).map(sorted),
)
def test_every_subtitle_belongs_to_one_frame_in_order(starts, times):
    subtitles = [Subtitle(start, start + length, str(i)) for i, (start, length) in enumerate(starts)]
    frames = assign_subtitles(subtitles, times)
    assert len(frames) == len(times)
    assert sorted(each for frame in frames for each in frame) == sorted(subtitles)
    for i, frame in enumerate(frames):
        assert [each.start for each in frame] == sorted(each.start for each in frame)
        for each in frame:
            shown = [j for j, time in enumerate(times) if each.start <= time < each.end]
            if shown:
                assert i == shown[0]
            else:  # the last frame before it
                assert i == max(0, np.searchsorted(times, each.start, side="right") - 1)
