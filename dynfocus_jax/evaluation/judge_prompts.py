"""Prompts for a judge of open answers, and the parser of its replies."""

import hashlib
import re
import tomllib
from functools import cache
from pathlib import Path
from string import Template
from typing import NamedTuple

from dynfocus_jax.errors import UserError, suggest


class Marks(NamedTuple):
    """The marks in a judge's reply. correct: None if the rubric has no yes or no. scores: by key."""

    correct: bool | None
    scores: dict[str, float]


class Rubric(NamedTuple):
    """A published way to mark an answer: the prompt, and the keys and range of the scores."""

    name: str
    source: str  # of the prompt
    system: Template
    user: Template
    keys: tuple[str, ...]
    yes_no: bool  # whether the reply also says if the answer is correct
    lowest: float
    highest: float

    @property
    def version(self) -> str:
        """The name with a digest of the prompt: results with the same version had the same prompt."""
        words = "\0".join((self.system.template, self.user.template))
        return f"{self.name}@{hashlib.sha256(words.encode()).hexdigest()[:8]}"

    @property
    def fields(self) -> frozenset[str]:
        """Names of the prompt's fields."""
        return frozenset(self.user.get_identifiers())

    def messages(self, fields: dict[str, str]) -> list[dict[str, str]]:
        """Return the chat to send. The fields' values are inserted verbatim, and not parsed as templates."""
        return [
            {"role": "system", "content": self.system.substitute()},
            {"role": "user", "content": self.user.substitute(fields)},
        ]

    def read(self, reply: str) -> Marks | None:
        """Parse the last {...} of a reply that has all keys; return None if there is none or it is invalid.

        The braces hold a Python or JSON dictionary, or what judges write for one (doubled quotes, sums). A
        score out of range is invalid.
        """
        values = _last_values(reply, ("pred", *self.keys) if self.yes_no else self.keys)
        if values is None:
            return None
        correct = None
        if self.yes_no:
            word = values["pred"].lower()
            if word not in ("yes", "no"):
                return None
            correct = word == "yes"
        scores = {}
        for key in self.keys:
            score = _parse_number(values[key])
            if score is None or not self.lowest <= score <= self.highest:
                return None
            scores[key] = score
        return Marks(correct, scores)


@cache
def rubrics() -> dict[str, Rubric]:
    """Return all rubrics by name."""
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
    """Return a rubric by name; raise UserError if there is none of that name."""
    if name not in rubrics():
        raise UserError(f"the judge has no rubric {name!r}{suggest(name, rubrics())}.")
    return rubrics()[name]


def _last_values(reply: str, keys: tuple[str, ...]) -> dict[str, str] | None:
    """Return the value of each key, unquoted, in the last innermost {...} that has each key exactly once."""
    found = None
    for group in re.findall(r"\{[^{}]*\}", reply):
        values = {key: re.findall(rf"""(?<!\w){key}['"]*\s*:\s*['"]*([^,'"{{}}]*)""", group) for key in keys}
        if all(len(value) == 1 for value in values.values()):
            found = {key: value[0].strip() for key, value in values.items()}
    return found


def _parse_number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"-?\d+(\.\d+)?", text, re.ASCII) else None
