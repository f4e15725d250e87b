"""Subtitles of a video: SubRip (.srt) and WebVTT (.vtt) files, which frame each belongs to, their tokens."""

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dynfocus_jax.errors import MediaError
from dynfocus_jax.media.frame_sampling import sample_indices
from dynfocus_jax.media.images import check_exists

_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})"
_TIMING = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?$")
_LIKE_TIMING = re.compile(r"-->|\d\s*->\s*\d")
_TAG = re.compile(r"</?[a-zA-Z0-9][^<>]*>|\{\\[^{}]*\}")  # <i>, <c.yellow>, <00:01.000>; {\an8}
_HIDDEN = ("WEBVTT", "NOTE", "STYLE", "REGION")  # first words of a paragraph that is not shown


class Subtitle(NamedTuple):
    """Words that are shown for a while."""

    start: float  # seconds since the beginning of the video
    end: float
    text: str  # one line, without formatting


def read_subtitles(path: str | Path) -> list[Subtitle]:
    """Read an SRT or WebVTT file, whichever it is, in order of time; subtitles without words are left out.

    Text is UTF-8, UTF-16 with its mark, or else Windows-1252. Formatting and positions are dropped, the lines
    of a subtitle joined by a space. The line before a timing is its number or name when it is a number, or
    follows an empty line.

    Raises MediaError when the file is missing, holds words before the first timing, or a timing that cannot
    be read.
    """
    check_exists(path)
    try:
        lines = ["", *_decode(Path(path).read_bytes()).splitlines()]
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror}), check the file") from error
    cues: list[tuple[float, float, list[str]]] = []
    words: list[str] = []  # of the last cue; before the first one there should be none
    hidden = False
    for number, line in enumerate(lines):
        after_gap = not lines[number - 1].strip()
        if timing := _TIMING.match(line):
            if words and not after_gap and (words[-1].isdigit() or not lines[number - 2].strip()):
                words.pop()
            _refuse(words if not cues else (), path)
            words, hidden = [], False
            cues.append((*_times(timing), words))
        elif _LIKE_TIMING.search(line):
            raise MediaError(
                f"{path}: line {number} is no timing like 00:01:02,500 --> 00:01:04,000, correct it"
            )
        elif after_gap and line.split()[:1] and line.split()[0] in _HIDDEN:
            hidden = True
        elif not line.strip():
            hidden = False
        elif not hidden:
            words.append(line.strip())
    _refuse(words if not cues else (), path)
    found = (Subtitle(start, max(start, end), _plain(words)) for start, end, words in cues)
    return sorted((each for each in found if each.text), key=lambda each: each.start)


def _refuse(words: Sequence[str], path: str | Path) -> None:
    if words:
        raise MediaError(f"{path}: {words[0][:40]!r} has no timing, expected an SRT or WebVTT file")


def _plain(words: list[str]) -> str:
    return " ".join(html.unescape(_TAG.sub("", " ".join(words))).split())


def between(
    subtitles: Sequence[Subtitle], times: Sequence[float], span: tuple[float, float] | None = None
) -> list[list[Subtitle]]:
    """Assign subtitles to frames: one list per frame, each subtitle in one of them, in time order.

    A subtitle goes to the first frame at which it is on the screen; one that no frame catches, to the
    frame before it, at whose time the interval begins in which it is shown; one that is over before the first
    frame, to the first.

    times: seconds of the frames, ascending; span: the seconds that were sampled, the others' subtitles are
      left out.
    """
    assigned: list[list[Subtitle]] = [[] for _ in times]
    begin, over = (-np.inf, np.inf) if span is None else span
    for subtitle in sorted(subtitles, key=lambda each: each.start):
        if not assigned or subtitle.end <= begin or subtitle.start >= over:
            continue
        frame = int(np.searchsorted(times, subtitle.start))  # the first that could show it
        if frame == len(assigned) or subtitle.start < times[frame] >= subtitle.end:
            frame -= 1
        assigned[max(frame, 0)].append(subtitle)
    return assigned


def interleave(
    assigned: Sequence[Sequence[Subtitle]], encode: Callable[[str], list[int]], room: int
) -> tuple[list[int], list[int], int]:
    """The subtitles of frames as text tokens, at most `room` of them.

    Those of a frame are one text, joined by spaces. When all are too many tokens some are left out whole,
    evenly over time.

    assigned: the subtitles of each frame, as `between` gives them; encode: text to ids.

    Returns:
      the tokens; the frame of each; how many subtitles they are.
    """
    flat = [(frame, each.text) for frame, some in enumerate(assigned) for each in some]
    count = len(flat)
    while True:
        texts: dict[int, list[str]] = {}
        for frame, text in (flat[i] for i in sample_indices(len(flat), count)):
            texts.setdefault(frame, []).append(text)
        tokens, frames = [], []
        for frame, some in texts.items():
            ids = encode(" ".join(some))
            tokens += ids
            frames += [frame] * len(ids)
        if len(tokens) <= room:
            return tokens, frames, count
        count = min(count - 1, count * room // len(tokens))


def _decode(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _times(timing: re.Match) -> tuple[float, float]:
    hours, minutes, seconds, parts, *rest = timing.groups()

    def time(hours: str | None, minutes: str, seconds: str, parts: str) -> float:
        whole = 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds)
        return (1000 * whole + int(parts.ljust(3, "0"))) / 1000

    return time(hours, minutes, seconds, parts), time(*rest)
