"""Annotation files, entry by entry: JSON lists, JSON lines and csv of any size.

A file is gone through once and never held as a whole, and an entry that is wrong costs that entry alone.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from dynfocus_jax.errors import UserError, quoted

MAX_TEXT = 2**19  # characters of text in one record; longer ones are refused

_MAX_LINE = 2**22  # characters of a line of JSON or csv
_CHUNK = 2**20  # characters read at a time
_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER_NUMBER = " \t\n\r,]"
_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+("?)|[\[\]{},]', re.DOTALL)
_DECODER = json.JSONDecoder()


class Invalid(Exception):
    """An unusable entry: one sentence without its subject; `fault` names the class of the problem."""

    def __init__(self, reason: str, fault: str = "form"):
        super().__init__(reason)
        self.fault = fault


def list_entries(path: Path) -> Iterator[tuple[int, object]]:
    """(number, value) of each value of a JSON list; `Invalid` stands for one that is not JSON.

    Raises UserError when the file cannot be read, is no list, or ends too early.
    """
    with _open(path) as file:
        text = _Window(file)
        first = text.peek()
        if first != "[":
            found = f"starts with {first!r}" if first else "is empty"
            raise UserError(
                f"annotation file {path} {found}: expected a JSON list, '[...]', or with the suffix .jsonl a "
                "record a line"
            )
        number, text.at = 0, text.at + 1
        while (character := text.peek()) != "]":
            if number > 0:
                if not character:
                    raise _ended(path, number - 1)
                if character != ",":
                    raise UserError(
                        f"annotation file {path} is not JSON: {character!r} follows record {number - 1}, "
                        "expected ','"
                    )
                text.at += 1
                text.peek()
            yield number, _next_value(text, path, number)
            number += 1
        text.at += 1
        if text.peek():
            raise UserError(f"annotation file {path} is not JSON: something follows the list of records")


def line_entries(path: Path) -> Iterator[tuple[int, object]]:
    """(number, value) of each line of JSON; blank lines do not count. `Invalid` stands for a bad one."""
    with _open(path, newline="\n") as file:
        number = 0
        for line in _lines(file):
            if line.isspace():
                continue
            value: object
            try:
                if len(line) > _MAX_LINE:
                    raise Invalid(f"is a line of more than {_MAX_LINE} characters", "size")
                value = json.loads(line)
            except Invalid as error:
                value = error
            except (ValueError, RecursionError) as error:
                value = _not_json(error)
            yield number, value
            number += 1


def csv_entries(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, object]]:
    """(number, {column: text}) of each row below the header; `Invalid` stands for a bad one.

    A row that cannot be read ends with the line in which that shows, also within quotes: lines of it that are
    left count as rows of their own.

    Raises UserError when the file cannot be read or its header lacks one of `columns`.
    """
    with _open(path, newline="") as file:
        reader = csv.reader(_lines(file), strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise UserError(f"annotation file {path} is not csv ({error}): expected a header") from None
        missing = [column for column in columns if column not in header]
        if missing:
            raise UserError(
                f"annotation file {path} has no column {missing[0]!r}, only {quoted(', '.join(header))}: "
                f"expected {', '.join(columns)}"
            )
        number = 0
        while True:
            first = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                value: object = Invalid(f"is not csv in lines {first} to {reader.line_num} ({error})")
            else:
                if not row:
                    continue  # a blank line
                value = dict(zip(header, row, strict=False))
                if len(row) != len(header):
                    value = Invalid(f"has {len(row)} columns, expected {len(header)} as in the header")
            yield number, value
            number += 1


def read_json(path: Path) -> object:
    """A whole JSON file; raises UserError."""
    with _open(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise UserError(f"annotation file {path} is not JSON ({_first_line(error)})") from None


def _open(path: Path, newline: str | None = None) -> TextIO:
    """Bytes that are not UTF-8 become lone surrogates, which records with them are refused for."""
    try:
        file = path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read ({error.strerror}): check the path") from None
    return file


def _lines(file: TextIO) -> Iterator[str]:
    """Lines, each at most one character longer than the limit: the rest of a longer one is passed over."""
    while line := file.readline(_MAX_LINE + 1):
        yield line
        while len(line) > _MAX_LINE and line[-1] not in "\r\n":
            line = file.readline(_MAX_LINE + 1)


class _Window:
    """The part of a file that has been read and not yet used up."""

    def __init__(self, file: TextIO):
        self.text, self.at = "", 0
        self._file = file

    def grow(self) -> bool:
        """Read on; at least as much as is waiting, so that long values are not gone through too often."""
        rest = self.text[self.at :]
        more = self._file.read(max(_CHUNK, len(rest)))
        self.text, self.at = rest + more, 0
        return bool(more)

    def peek(self) -> str:
        """The next character that is no white space, where `at` is then; "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""


def _next_value(text: _Window, path: Path, number: int) -> object:
    while True:
        try:
            value, end = _DECODER.raw_decode(text.text, text.at)
        except (ValueError, RecursionError) as error:
            value, end = _not_json(error), _end_of_value(text.text, text.at)
        after = text.text[end : end + 1] if end is not None else ""
        # "0" may be what has been read of "0.5", and so may "0.".
        if after and (type(value) not in (int, float) or after in _AFTER_NUMBER):
            text.at = end
            return value
        if not text.grow():
            raise _ended(path, number)


def _end_of_value(text: str, start: int) -> int | None:
    """Return the end of a value by its brackets alone; None if it is not in `text`."""
    depth = 0
    for match in _TOKEN.finditer(text, start):
        token = match[0]
        if token[0] == '"':
            if not match[1]:
                return None  # the string goes on
        elif token in "[{":
            depth += 1
        elif token == "," or depth == 0:
            if depth == 0:
                return match.start()
        else:
            depth -= 1
    return None


def _not_json(error: Exception) -> Invalid:
    if isinstance(error, RecursionError):
        return Invalid("is nested too deeply")
    return Invalid(f"is not JSON ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return str(error).split(": line")[0].split(";")[0][:100]


def _ended(path: Path, number: int) -> UserError:
    return UserError(
        f"annotation file {path} ends at record {number}, inside of the list: check that the file is "
        "complete and that record is JSON."
    )
