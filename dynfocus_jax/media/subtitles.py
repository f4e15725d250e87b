"""Subtitles of a video: reading SubRip (.srt) and WebVTT (.vtt), assignment to frames, tokenization."""

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dynfocus_jax.errors import MediaError
from dynfocus_jax.media.frame_sampling import middle_indices
from dynfocus_jax.media.images import check_exists

_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})"
_TIMING = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?$")
_LIKE_TIMING = re.compile(r"-->|\d\s*->\s*\d")
_TAG = re.compile(r"</?[a-zA-Z0-9][^<>]*>|\{\\[^{}]*\}")  # <i>, <c.yellow>, <00:01.000>; {\an8}
_HIDDEN = ("WEBVTT", "NOTE", "STYLE", "REGION")  # first words of blocks that are not shown


class Subtitle(NamedTuple):
    """A text and the time at which it is shown."""

    start: float  # seconds since the beginning of the video
    end: float
    text: str  # one line, without formatting


def read_subtitles(path: str | Path) -> list[Subtitle]:
    """Read an SRT or WebVTT file, recognised by its content.

    Text is UTF-8, UTF-16 with a byte order mark, or else Windows-1252. Formatting and positions are dropped,
    and the lines of a subtitle are joined by spaces. The line before a timing is taken for the subtitle's
    number or name, not for text, if it is a number or follows an empty line.

    Returns:
      The subtitles that have text, in order of their start.

    Raises:
      MediaError: if the file is missing, has text before the first timing, or has an invalid timing.
    """
    check_exists(path)
    try:
        lines = ["", *_decode(Path(path).read_bytes()).splitlines()]
    except OSError as error:
        raise MediaError(
            f"{path}: cannot be read ({error.strerror}); check the path and permissions."
        ) from error
    cues: list[tuple[float, float, list[str]]] = []
    texts: list[str] = []  # lines of the last cue, or before the first timing
    hidden = False
    for number, line in enumerate(lines):
        follows_gap = not lines[number - 1].strip()
        if timing := _TIMING.match(line):
            if texts and not follows_gap and (texts[-1].isdigit() or not lines[number - 2].strip()):
                texts.pop()
            if not cues:
                _check_no_text(texts, path)
            texts, hidden = [], False
            cues.append((*_parse_times(timing), texts))
        elif _LIKE_TIMING.search(line):
            raise MediaError(
                f"{path}, line {number}: invalid timing, expected one such as 00:01:02,500 --> 00:01:04,000."
            )
        elif follows_gap and line.split()[:1] and line.split()[0] in _HIDDEN:
            hidden = True
        elif not line.strip():
            hidden = False
        elif not hidden:
            texts.append(line.strip())
    if not cues:
        _check_no_text(texts, path)
    subtitles = (Subtitle(start, max(start, end), _plain_text(texts)) for start, end, texts in cues)
    return sorted((each for each in subtitles if each.text), key=lambda each: each.start)


def _check_no_text(texts: Sequence[str], path: str | Path) -> None:
    """Check that no text precedes the first timing; raise MediaError if any does."""
    if texts:
        raise MediaError(f"{path}: text {texts[0][:40]!r} has no timing, expected an SRT or WebVTT file.")


def _plain_text(lines: Sequence[str]) -> str:
    """Join the lines of a subtitle, without tags and with HTML entities decoded."""
    return " ".join(html.unescape(_TAG.sub("", " ".join(lines))).split())


def assign_subtitles(
    subtitles: Sequence[Subtitle], times: Sequence[float], span: tuple[float, float] | None = None
) -> list[list[Subtitle]]:
    """Assign each subtitle to one frame.

    A subtitle belongs to the first frame at which it is on the screen. One that is on the screen at no frame
    belongs to the last frame before it, and one that ends before the first frame to the first.

    Args:
      subtitles: in any order.
      times: times of the frames in seconds, ascending.
      span: start and end of the part of the video that was sampled, in seconds. Subtitles outside it are
        dropped. None means all of the video.

    Returns:
      One list per frame, in order of time.
    """
    assigned: list[list[Subtitle]] = [[] for _ in times]
    span_start, span_end = (-np.inf, np.inf) if span is None else span
    for subtitle in sorted(subtitles, key=lambda each: each.start):
        if not assigned or subtitle.end <= span_start or subtitle.start >= span_end:
            continue
        frame = int(np.searchsorted(times, subtitle.start))  # the first that could show it
        if frame == len(assigned) or subtitle.start < times[frame] >= subtitle.end:
            frame -= 1
        assigned[max(frame, 0)].append(subtitle)
    return assigned


def tokenize_subtitles(
    assigned: Sequence[Sequence[Subtitle]], encode: Callable[[str], list[int]], max_tokens: int
) -> tuple[list[int], list[int], int]:
    """Tokenize the subtitles of frames, as many as fit.

    The subtitles of a frame are one text, joined by spaces. If all of them have too many tokens, whole
    subtitles are dropped, evenly over time.

    Args:
      assigned: subtitles of each frame, see `assign_subtitles`.
      encode: maps a text to token ids.
      max_tokens: largest number of tokens.

    Returns:
      The token ids, the frame of each token, and the number of subtitles kept.
    """
    texts = [(frame, subtitle.text) for frame, subtitles in enumerate(assigned) for subtitle in subtitles]
    kept = len(texts)
    while True:
        texts_of_frame: dict[int, list[str]] = {}
        for index in middle_indices(len(texts), kept):
            frame, text = texts[index]
            texts_of_frame.setdefault(frame, []).append(text)
        tokens: list[int] = []
        frames: list[int] = []
        for frame, of_frame in texts_of_frame.items():
            ids = encode(" ".join(of_frame))
            tokens += ids
            frames += [frame] * len(ids)
        if len(tokens) <= max_tokens:
            return tokens, frames, kept
        kept = min(kept - 1, kept * max_tokens // len(tokens))


def _decode(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _parse_times(timing: re.Match[str]) -> tuple[float, float]:
    """Return start and end of a timing, in seconds."""
    hours, minutes, seconds, fraction, *end = timing.groups()
    return _to_seconds(hours, minutes, seconds, fraction), _to_seconds(*end)


def _to_seconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> float:
    whole = 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds)
    return (1000 * whole + int(fraction.ljust(3, "0"))) / 1000
