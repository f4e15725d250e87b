"""Fields of annotation entries, checked: each function raises `Invalid` for a value that cannot be used."""

import re
from collections.abc import Iterable
from pathlib import Path

from dynfocus_jax.errors import quoted
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import MAX_TEXT, Invalid

ASSUMED_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")  # tried for a video that is named without one
_MAX_ID = 1024  # characters
_MAX_SECONDS = 1e7  # four months
_SURROGATE = re.compile("[\ud800-\udfff]")


def ensure(condition: bool, reason: str, fault: str = "form") -> None:
    """Raise Invalid unless `condition`."""
    if not condition:
        raise Invalid(reason, fault)


def kind_of(value: object) -> str:
    """A value of a wrong type, for a message."""
    names = {dict: "an object", list: "a list", type(None): "null"}
    return names.get(type(value)) or quoted(value)


def text_of(value: object, field: str, *, empty: bool = False) -> str:
    """A text field, stripped; `empty`: it may be."""
    if not isinstance(value, str):
        raise Invalid(f'field "{field}" is missing or not a string')
    if len(value) > MAX_TEXT:
        raise Invalid(f'field "{field}" has more than {MAX_TEXT} characters', "size")
    if not value.isascii() and _SURROGATE.search(value):
        raise Invalid(f'field "{field}" is not Unicode text (broken UTF-8, or half a surrogate pair)', "text")
    value = value.strip()
    if not (value or empty):
        raise Invalid(f'field "{field}" has no text', "text")
    return value


def check_size(texts: Iterable[str]) -> None:
    """Check that a record's texts together are short enough; raise Invalid otherwise."""
    if sum(map(len, texts)) > MAX_TEXT:
        raise Invalid(f"has more than {MAX_TEXT} characters of text", "size")


def id_of(value: object) -> str:
    """An id: a string or whole number."""
    ensure(type(value) in (str, int), 'field "id" is missing or not a string')
    name = text_of(str(value), "id")
    ensure(len(name) <= _MAX_ID, 'field "id" is too long', "size")
    ensure(name.isprintable(), 'field "id" has unprintable characters', "text")
    return name


def media_of(entry: dict, folder: MediaFolder) -> tuple[Path | None, str]:
    """The file that an entry names in its field "image" or "video", and its modality."""
    present = [key for key in ("image", "video") if entry.get(key) is not None]
    ensure(len(present) < 2, 'has both "image" and "video", expected one')
    if not present:
        return None, "text"
    return path_of(entry[present[0]], present[0], folder), present[0]


def path_of(value: object, field: str, folder: MediaFolder) -> Path:
    """A path field, inside the media folder."""
    if not (isinstance(value, str) and value):
        raise Invalid(f'field "{field}" is not a path')
    if not value.isascii() and _SURROGATE.search(value):
        raise Invalid(f'field "{field}" is not Unicode text', "text")
    try:
        return folder.file(value)
    except ValueError as error:
        raise Invalid(f'field "{field}": {error}', "path") from None


def span_of(entry: dict) -> tuple[float, float] | None:
    """The seconds from "start" to "end", None for an entry with neither."""
    start, end = entry.get("start"), entry.get("end")
    if start is None and end is None:
        return None
    if not {type(start), type(end)} <= {int, float} or not 0 <= start < end <= _MAX_SECONDS:
        raise Invalid(
            f'fields "start" and "end" are {kind_of(start)} and {kind_of(end)}, expected seconds, start < end'
        )
    return float(start), float(end)
