"""Checked fields of annotation entries. Each function raises `InvalidEntry` for a value it cannot use."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

from dynfocus_jax.errors import quoted
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import MAX_TEXT, InvalidEntry, JsonValue

ASSUMED_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")  # tried for a video named without a suffix
_MAX_ID = 1024  # characters
_MAX_SECONDS = 1e7  # four months
_SURROGATE = re.compile("[\ud800-\udfff]")


def ensure(condition: bool, reason: str, fault: str = "form") -> None:
    """Check a condition; raise InvalidEntry with the reason if it does not hold."""
    if not condition:
        raise InvalidEntry(reason, fault)


def kind_of(value: object) -> str:
    """Return a description of a value of a wrong type, for a message."""
    names = {dict: "an object", list: "a list", type(None): "null"}
    return names.get(type(value)) or quoted(value)


def object_of(value: object, field: str = "") -> dict[str, JsonValue]:
    """Return a JSON object: a field, or without `field` the entry itself."""
    if not isinstance(value, dict):
        subject = f'field "{field}" is' if field else "is"
        raise InvalidEntry(f"{subject} {kind_of(value)}, expected an object")
    return value


def list_of(value: object, field: str, items: str, *, at_least: int = 1) -> list[JsonValue]:
    """Return a list field.

    Args:
      value: the field's value.
      field: its name.
      items: what the list holds, in the plural, for the message.
      at_least: smallest length.
    """
    if not isinstance(value, list) or len(value) < at_least:
        found = f"a list of {len(value)}" if isinstance(value, list) else _describe(value)
        raise InvalidEntry(f'field "{field}" is {found}, expected a list of {at_least} or more {items}')
    return value


def text_of(value: object, field: str, *, empty: bool = False) -> str:
    """Return a text field, stripped; `empty` allows a text without characters."""
    if not isinstance(value, str):
        raise InvalidEntry(f'field "{field}" is {_describe(value)}, expected a string')
    if len(value) > MAX_TEXT:
        raise InvalidEntry(
            f'field "{field}" has {len(value)} characters, expected at most {MAX_TEXT}', "size"
        )
    _check_unicode(value, field, "text")
    value = value.strip()
    if not (value or empty):
        raise InvalidEntry(f'field "{field}" has no text', "text")
    return value


def check_size(texts: Iterable[str]) -> None:
    """Check the total length of a record's texts."""
    length = sum(map(len, texts))
    if length > MAX_TEXT:
        raise InvalidEntry(f"has {length} characters of text, expected at most {MAX_TEXT}", "size")


def id_of(value: object) -> str:
    """Return an id: a string or an integer."""
    if type(value) not in (str, int):
        raise InvalidEntry(f'field "id" is {_describe(value)}, expected a string or an integer')
    name = text_of(str(value), "id")
    ensure(len(name) <= _MAX_ID, f'field "id" has {len(name)} characters, expected at most {_MAX_ID}', "size")
    ensure(name.isprintable(), 'field "id" has unprintable characters', "text")
    return name


def media_of(entry: Mapping[str, JsonValue], folder: MediaFolder) -> tuple[Path | None, str]:
    """Return the file in the field "image" or "video", and the modality; (None, "text") if there is none."""
    present = [key for key in ("image", "video") if entry.get(key) is not None]
    ensure(len(present) < 2, 'has both "image" and "video", expected one of them')
    if not present:
        return None, "text"
    return path_of(entry[present[0]], present[0], folder), present[0]


def path_of(value: object, field: str, folder: MediaFolder) -> Path:
    """Return a path field as a path inside the media folder; the file need not exist."""
    if not (isinstance(value, str) and value):
        raise InvalidEntry(f'field "{field}" is {_describe(value)}, expected a path')
    _check_unicode(value, field, "form")
    try:
        return folder.file(value)
    except ValueError as error:
        raise InvalidEntry(f'field "{field}": {error}', "path") from None


def with_suffixes(name: str) -> list[str]:
    """Return the names that a video without a suffix may have."""
    return [f"{name}{suffix}" for suffix in ASSUMED_SUFFIXES]


def first_existing(names: Sequence[str], field: str, folder: MediaFolder) -> Path:
    """Return the first of several paths that exists in the folder, or the first one if none exists."""
    return path_of(next(filter(folder.has, names), names[0]), field, folder)


def span_of(entry: Mapping[str, JsonValue]) -> tuple[float, float] | None:
    """Return the fields "start" and "end" in seconds; None if the entry has neither."""
    start, end = entry.get("start"), entry.get("end")
    if start is None and end is None:
        return None
    if _is_number(start) and _is_number(end) and 0 <= start < end <= _MAX_SECONDS:
        return float(start), float(end)
    raise InvalidEntry(
        f'fields "start" and "end" are {kind_of(start)} and {kind_of(end)}, expected seconds, start < end'
    )


def _is_number(value: JsonValue) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def _describe(value: object) -> str:
    return "missing" if value is None else kind_of(value)


def _check_unicode(text: str, field: str, fault: str) -> None:
    """Check that a text has no surrogates, which stand for bytes that are not UTF-8."""
    if not text.isascii() and _SURROGATE.search(text):
        raise InvalidEntry(f'field "{field}" is not Unicode text (invalid UTF-8 or a lone surrogate)', fault)
