"""Parsers of answers: a letter, yes or no, a span of time.

A parser returns None for an answer that names several options, or none. It never guesses; such an answer
counts as wrong.
"""

import re
from collections.abc import Sequence

from dynfocus_jax.records.prompts import LETTERS

_LEAD = (
    r"^\W*(?:the\s+)?(?:best\s+|correct\s+|right\s+|final\s+)?(?:answer|option|choice)(?:\s+is)?\s*[:\-]?\s*"
)
_TIME = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)|(\d+(?:\.\d+)?)")


def parse_letter(text: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that an answer chooses.

    Tried in this order: a letter alone or set off at the start ("B", "(B) red", "B: red", also after "The
    answer is"); the only letter in brackets; the words of one option; the only capital letter that stands
    alone. An "A" before a word may be an article and does not count.
    """
    last = LETTERS[len(options) - 1]
    body = re.sub(_LEAD, "", text.strip(), count=1, flags=re.IGNORECASE).strip()
    only = re.fullmatch(rf"\W*(?:option\s+)?([A-{last}a-{last.lower()}])\W*", body)
    if only:
        return only[1].upper()
    another = rf"(?![\s,/]*(?:(?:and|or)\s+)?\(?[A-{last}](?:\W|$))"  # "A, B" and "(A) or (B)" choose none
    article = r"(?!A\s+(?!or\b|and\b)\w)"
    if len(body) < len(text.strip()):  # "The answer is B because ..."
        announced = re.match(rf"{article}([A-{last}])(?!\w){another}", body)
        if announced:
            return announced[1]
    first = re.match(rf"[\s\"'*]*(?:\(([A-{last}])\)|\(?([A-{last}])[).:,*\"'\n]){another}", body)
    if first:
        return first[1] or first[2]
    bracketed = set(re.findall(rf"\(([A-{last}])\)", body))
    if bracketed:
        return bracketed.pop() if len(bracketed) == 1 else None
    named = _named_options(body, options)
    if named:
        return LETTERS[named[0]] if len(named) == 1 else None
    separate = set(re.findall(rf"(?<![\w']){article}([A-{last}])(?![\w'])", body))
    return separate.pop() if len(separate) == 1 else None


def _named_options(text: str, options: Sequence[str]) -> list[int]:
    """Return the indices of the options whose words occur in a text.

    Of the options "red" and "dark red", the text "dark red" names only the longer one.
    """
    padded_text = f" {_words(text)} "
    padded = [f" {_words(option)} " for option in options]
    exact = [i for i, words in enumerate(padded) if words == padded_text]
    found = exact or [i for i, words in enumerate(padded) if words.strip() and words in padded_text]
    return [i for i in found if not any(i != k and padded[i] in padded[k] for k in found)]


def parse_yes_no(text: str) -> str | None:
    """Return "yes" or "no": the first word, or else the only one of the two that occurs.

    "Yes and no" is neither.
    """
    words = _words(re.sub(_LEAD, "", text.strip(), count=1, flags=re.IGNORECASE)).split()
    found = {word for word in words if word in ("yes", "no")}
    if words and words[0] in found and not {"and", "or"} & set(words[1:2]):
        return words[0]
    return found.pop() if len(found) == 1 else None


def parse_span(text: str) -> tuple[float, float] | None:
    """Return start and end in seconds, written as two numbers or as two times like 1:05."""
    times = []
    for hours, minutes, seconds, plain in _TIME.findall(text):
        times.append(float(plain) if plain else 3600 * int(hours or 0) + 60 * int(minutes) + float(seconds))
    if len(times) != 2 or times[0] > times[1]:
        return None
    return times[0], times[1]


def _words(text: str) -> str:
    """Return the words of a text in lower case, without punctuation, separated by single spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))
