"""Entries of annotation files of any size: JSON lists, JSON lines and CSV.

A file is read once and never held in memory as a whole. In place of an invalid entry there is an
`InvalidEntry`, and the entries after it are still read.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO, TypeAlias

from dynfocus_jax.errors import UserError, quoted

JsonValue: TypeAlias = dict[str, "JsonValue"] | list["JsonValue"] | str | int | float | bool | None

MAX_TEXT = 2**19  # characters of text in one record

_MAX_LINE = 2**22  # characters of a line of JSON or CSV
_CHUNK = 2**20  # characters read at a time
_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER_NUMBER = " \t\n\r,]"
_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+("?)|[\[\]{},]', re.DOTALL)
_DECODER = json.JSONDecoder()


class InvalidEntry(Exception):
    """An entry that is not a usable record. The message is a sentence without its subject, the entry.

    fault: class of the problem, see `records.RefusedEntry`.
    """

    def __init__(self, reason: str, fault: str = "form"):
        super().__init__(reason)
        self.fault = fault


def json_list_entries(path: Path) -> Iterator[tuple[int, JsonValue | InvalidEntry]]:
    """Yield the values of a JSON list, numbered from 0; an `InvalidEntry` for a value that is not JSON.

    Incremental parsers such as ijson are not used because they stop at the first error: one broken record
    would cost all that follow it. ijson's C backend (yajl) further rejects NaN and integers beyond 64 bits,
    changes lone surrogates, and needs memory quadratic in the depth of nesting. It is no faster than this
    reader, which finds the end of each value and leaves parsing to the json module.

    Raises:
      UserError: if the file cannot be read, is not a list, or ends too early.
    """
    with _open(path) as file:
        buffer = _Buffer(file)
        first = buffer.skip_space()
        if first != "[":
            found = f"starts with {first!r}" if first else "is empty"
            raise UserError(
                f"annotation file {path} {found}, expected a JSON list '[...]'; a file with one record per "
                "line needs the suffix .jsonl."
            )
        number, buffer.position = 0, buffer.position + 1
        while (character := buffer.skip_space()) != "]":
            if number > 0:
                if not character:
                    raise _ends_early(path, number - 1)
                if character != ",":
                    raise UserError(
                        f"annotation file {path}: {character!r} follows record {number - 1}, expected ','; "
                        "correct the file, or download it again."
                    )
                buffer.position += 1
                buffer.skip_space()
            yield number, _read_value(buffer, path, number)
            number += 1
        buffer.position += 1
        if buffer.skip_space():
            raise UserError(f"annotation file {path}: there is text after the list of records; remove it.")


def json_line_entries(path: Path) -> Iterator[tuple[int, JsonValue | InvalidEntry]]:
    """Yield the values of a file with one JSON value per line, numbered from 0; blank lines do not count.

    A line that is not JSON yields an `InvalidEntry`.

    Raises:
      UserError: if the file cannot be read.
    """
    with _open(path, newline="\n") as file:
        lines = (line for line in _read_lines(file) if not line.isspace())
        for number, line in enumerate(lines):
            yield number, _parse_line(line)


def _parse_line(line: str) -> JsonValue | InvalidEntry:
    if len(line) > _MAX_LINE:
        return InvalidEntry(f"is a line of more than {_MAX_LINE} characters", "size")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return _not_json(error)


def csv_entries(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str] | InvalidEntry]]:
    """Yield the rows of a CSV file as {column: text}, numbered from 0; an `InvalidEntry` for an invalid row.

    An invalid row ends at the line at which the error shows, even within quotes. The lines after it count as
    rows of their own.

    Args:
      path: the file; its first row is the header.
      columns: required columns.

    Raises:
      UserError: if the file cannot be read, or its header lacks one of the columns.
    """
    with _open(path, newline="") as file:
        reader = csv.reader(_read_lines(file), strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise UserError(
                f"annotation file {path}: not CSV ({error}), expected a header; check that it is the "
                "right file."
            ) from None
        missing = [column for column in columns if column not in header]
        if missing:
            raise UserError(
                f"annotation file {path}: the header {quoted(', '.join(header))} has no column "
                f"{missing[0]!r}, expected {', '.join(columns)}; check that it is the right file."
            )
        number = 0
        while True:
            first_line = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, InvalidEntry(f"is not CSV in lines {first_line} to {reader.line_num} ({error})")
            else:
                if not row:
                    continue  # a blank line
                if len(row) == len(header):
                    yield number, dict(zip(header, row, strict=True))
                else:
                    yield (
                        number,
                        InvalidEntry(f"has {len(row)} columns, expected {len(header)} as in the header"),
                    )
            number += 1


def read_json(path: Path) -> JsonValue:
    """Read a whole JSON file.

    Raises:
      UserError: if the file cannot be read or is not JSON.
    """
    with _open(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"annotation file {path}: not JSON ({_first_line(error)}); correct it, or download it again."
            ) from None


def _open(path: Path, newline: str | None = None) -> TextIO:
    """Open a file as UTF-8. Invalid bytes become lone surrogates, for which the record is refused later."""
    try:
        return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    except OSError as error:
        raise UserError(
            f"annotation file {path}: cannot be read ({error.strerror}); check the path."
        ) from None


def _read_lines(file: TextIO) -> Iterator[str]:
    """Yield lines of at most one character more than the limit; the rest of a longer line is skipped."""
    while line := file.readline(_MAX_LINE + 1):
        yield line
        while len(line) > _MAX_LINE and line[-1] not in "\r\n":
            line = file.readline(_MAX_LINE + 1)


class _Buffer:
    """The text of a file that has been read and not yet been consumed; it begins at `position`."""

    def __init__(self, file: TextIO):
        self.text, self.position = "", 0
        self._file = file

    def grow(self) -> bool:
        """Read more text; return False at the end of the file.

        Doubles the text that is waiting, so that the time to scan a long value stays linear in its length.
        """
        rest = self.text[self.position :]
        more = self._file.read(max(_CHUNK, len(rest)))
        self.text, self.position = rest + more, 0
        return bool(more)

    def skip_space(self) -> str:
        """Move to the next character that is not white space and return it; "" at the end of the file."""
        while True:
            space = _SPACE.match(self.text, self.position)
            assert space is not None  # the pattern matches the empty string
            self.position = space.end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.grow():
                return ""


def _read_value(buffer: _Buffer, path: Path, number: int) -> JsonValue | InvalidEntry:
    """Read the value at the buffer's position and move behind it."""
    while True:
        value: JsonValue | InvalidEntry
        end: int | None
        try:
            value, end = _DECODER.raw_decode(buffer.text, buffer.position)
        except (ValueError, RecursionError) as error:
            value, end = _not_json(error), _find_end(buffer.text, buffer.position)
        after = buffer.text[end : end + 1] if end is not None else ""
        # A number is complete only before a separator: "0" and "0." may be the beginning of "0.5".
        if end is not None and after and (type(value) not in (int, float) or after in _AFTER_NUMBER):
            buffer.position = end
            return value
        if not buffer.grow():
            raise _ends_early(path, number)


def _find_end(text: str, start: int) -> int | None:
    """Return the end of a value, from its brackets and strings alone; None if it is not in `text`."""
    depth = 0
    for match in _TOKEN.finditer(text, start):
        token = match[0]
        if token[0] == '"':
            if not match[1]:
                return None  # the string has no end yet
        elif token in "[{":
            depth += 1
        elif token == "," or depth == 0:
            if depth == 0:
                return match.start()
        else:
            depth -= 1
    return None


def _not_json(error: Exception) -> InvalidEntry:
    if isinstance(error, RecursionError):
        return InvalidEntry("is nested too deeply")
    return InvalidEntry(f"is not JSON ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return str(error).split(": line")[0].split(";")[0][:100]


def _ends_early(path: Path, number: int) -> UserError:
    return UserError(
        f"annotation file {path}: the file ends within the list, at record {number}; check that the file is "
        "complete and that the record is JSON."
    )
