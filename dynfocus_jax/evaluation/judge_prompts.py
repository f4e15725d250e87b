"""Prompts for a judge of open answers, and parsers of its replies."""

import hashlib
import re
import tomllib
from functools import cache
from pathlib import Path
from string import Template
from typing import NamedTuple

from dynfocus_jax.errors import UserError, suggest


class Marks(NamedTuple):
    """Parsed reply of a judge. correct: None if the rubric has no yes or no; scores: by key."""

    correct: bool | None
    scores: dict[str, float]


class Rubric(NamedTuple):
    """One published way to mark an answer: the two messages and the keys and range of the scores."""

    name: str
    source: str  # where its words are from
    system: Template
    user: Template
    keys: tuple[str, ...]
    yes_no: bool
    lowest: float
    highest: float

    @property
    def version(self) -> str:
        """The name with a digest of the words: two results with the same version were asked the same."""
        words = "\0".join((self.system.template, self.user.template))
        return f"{self.name}@{hashlib.sha256(words.encode()).hexdigest()[:8]}"

    @property
    def fields(self) -> frozenset[str]:
        """Fields of a question that the prompt needs."""
        return frozenset(self.user.get_identifiers())

    def messages(self, fields: dict[str, str]) -> list[dict[str, str]]:
        """The chat that is sent; `fields` are inserted as they are and never read as a template."""
        return [
            {"role": "system", "content": self.system.substitute()},
            {"role": "user", "content": self.user.substitute(fields)},
        ]

    def read(self, reply: str) -> Marks | None:
        """Parse the reply's last {...} with all keys; return None without one or if a value is out of range.

        The braces hold a Python or JSON dictionary, or what judges write for one (doubled quotes, sums).
        """
        wanted = (*(("pred",) if self.yes_no else ()), *self.keys)
        said = _last_values(reply, wanted)
        if said is None:
            return None
        correct = None
        if self.yes_no:
            word = said["pred"].lower()
            if word not in ("yes", "no"):
                return None
            correct = word == "yes"
        scores = {key: _number(said[key]) for key in self.keys}
        if any(score is None or not self.lowest <= score <= self.highest for score in scores.values()):
            return None
        return Marks(correct, scores)


@cache
def rubrics() -> dict[str, Rubric]:
    """All rubrics by name."""
    published = tomllib.loads((Path(__file__).parent / "judge_prompts.toml").read_text(encoding="utf-8"))
    return {
        name: Rubric(
            name,
            entry["source"],
            Template(entry["system"]),
            Template(entry["user"]),
            tuple(entry["scores"]),
            entry["yes_no"],
            entry["lowest"],
            entry["highest"],
        )
        for name, entry in published.items()
    }


def rubric_named(name: str) -> Rubric:
    """Raise UserError if there is none of that name."""
    if name not in rubrics():
        raise UserError(f"there is no rubric {name!r} for the judge{suggest(name, rubrics())}.")
    return rubrics()[name]


def _last_values(reply: str, keys: tuple[str, ...]) -> dict[str, str] | None:
    """The value of each key, bare, in the last innermost {...} that names each of them exactly once."""
    found = None
    for group in re.findall(r"\{[^{}]*\}", reply):
        values = {key: re.findall(rf"""(?<!\w){key}['"]*\s*:\s*['"]*([^,'"{{}}]*)""", group) for key in keys}
        if all(len(value) == 1 for value in values.values()):
            found = {key: value[0].strip() for key, value in values.items()}
    return found


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"-?\d+(\.\d+)?", text, re.ASCII) else None
