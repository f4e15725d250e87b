"""Parsers of answers: a letter, yes or no, a span of time; None if an answer cannot be understood.

No answer is ever guessed: what names several options, or none, is not understood, and counts as wrong.
"""

import re
from collections.abc import Sequence

from dynfocus_jax.records.prompts import LETTERS

_LEAD = (
    r"^\W*(?:the\s+)?(?:best\s+|correct\s+|right\s+|final\s+)?(?:answer|option|choice)(?:\s+is)?\s*[:\-]?\s*"
)
_TIME = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)|(\d+(?:\.\d+)?)")


def letter(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer chooses.

    In this order: a letter alone or set off at the start ("B", "(B) red", "B: red", after "The answer is"
    too); the one letter in brackets; the words of one option; the one capital letter that stands alone (an
    "A" before a word may be an article, and does not count).
    """
    last = LETTERS[len(options) - 1]
    body = re.sub(_LEAD, "", text.strip(), count=1, flags=re.IGNORECASE).strip()
    alone = re.fullmatch(rf"\W*(?:option\s+)?([A-{last}a-{last.lower()}])\W*", body)
    if alone:
        return alone[1].upper()
    another = rf"(?![\s,/]*(?:(?:and|or)\s+)?\(?[A-{last}](?:\W|$))"  # "A, B" and "(A) or (B)" are no choice
    article = r"(?!A\s+(?!or\b|and\b)\w)"
    if len(body) < len(text.strip()):  # "The answer is B because ..."
        said = re.match(rf"{article}([A-{last}])(?!\w){another}", body)
        if said:
            return said[1]
    first = re.match(rf"[\s\"'*]*(?:\(([A-{last}])\)|\(?([A-{last}])[).:,*\"'\n]){another}", body)
    if first:
        return first[1] or first[2]
    bracketed = set(re.findall(rf"\(([A-{last}])\)", body))
    if bracketed:
        return bracketed.pop() if len(bracketed) == 1 else None
    named = _named(body, options)
    if named:
        return LETTERS[named[0]] if len(named) == 1 else None
    standing = set(re.findall(rf"(?<![\w']){article}([A-{last}])(?![\w'])", body))
    return standing.pop() if len(standing) == 1 else None


def _named(text: str, options: Sequence[str]) -> list[int]:
    """The options whose words occur: of "red" and "dark red", "dark red" names the longer one alone."""
    said = f" {_words(text)} "
    padded = [f" {_words(option)} " for option in options]
    exact = [i for i, words in enumerate(padded) if words == said]
    found = exact or [i for i, words in enumerate(padded) if words.strip() and words in said]
    return [i for i in found if not any(i != k and padded[i] in padded[k] for k in found)]


def yes_or_no(text: str) -> str | None:
    """The first word where that is yes or no, else the one of both that occurs; "yes and no" is neither."""
    words = _words(re.sub(_LEAD, "", text.strip(), count=1, flags=re.IGNORECASE)).split()
    found = {word for word in words if word in ("yes", "no")}
    if words and words[0] in found and not {"and", "or"} & set(words[1:2]):
        return words[0]
    return found.pop() if len(found) == 1 else None


def span(text: str) -> tuple[float, float] | None:
    """From when to when, in seconds: two numbers, or two times like 1:05."""
    times = []
    for hours, minutes, seconds, plain in _TIME.findall(text):
        times.append(float(plain) if plain else 3600 * int(hours or 0) + 60 * int(minutes) + float(seconds))
    if len(times) != 2 or times[0] > times[1]:
        return None
    return times[0], times[1]


def _words(text: str) -> str:
    """Lower case, without punctuation, single spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))
