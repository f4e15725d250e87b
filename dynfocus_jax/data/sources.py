"""Annotation files: LLaVA json into validated records."""

import json
from dataclasses import dataclass
from pathlib import Path

from dynfocus_jax.config import UserError

MARKERS = ("<image>", "<video>")  # where the visual tokens stand in the first human turn
_ROLES = ("human", "gpt")


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation about one file, or about none."""

    id: str
    media: Path | None  # None: text only
    turns: tuple[tuple[str, str], ...]  # (question, answer), without the media marker
    visual_at_end: bool = False  # the visual tokens come after the first question, not before it
    kind: str = ""  # type of question, for accuracy by type
    needle_frames: tuple[tuple[int, ...], ...] = ()  # of each turn, frames of the file known to matter


def read_records(annotations: str | Path, media_root: str | Path) -> list[Record]:
    """Reads a LLaVA json file: a list of {"id", "image" or "video", "conversations", ...}.

    Media paths are taken relative to `media_root`; whether the files exist shows when they are read.
    "type" and "needle_frames" (a list a turn) are kept when present. Raises UserError that names file, record
    and field.
    """
    try:
        content = json.loads(Path(annotations).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"annotation file {annotations} cannot be read ({error.strerror}): check the path"
        ) from None
    except ValueError as error:
        raise UserError(
            f"annotation file {annotations} is not JSON ({error}): expected a LLaVA list"
        ) from None
    if not isinstance(content, list):
        raise UserError(
            f"annotation file {annotations} holds {_kind(content)}: expected a list of LLaVA records"
        )
    records = []
    for number, entry in enumerate(content):
        try:
            records.append(_parse(entry, Path(media_root)))
        except _Invalid as error:
            name = entry.get("id", f"number {number}") if isinstance(entry, dict) else f"number {number}"
            raise UserError(f"annotation file {annotations}, record {name}: {error}") from None
    return records


class _Invalid(Exception):
    """What is wrong with one record."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _Invalid(message)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), f"the value {value!r}")


def _parse(entry: object, media_root: Path) -> Record:
    _require(isinstance(entry, dict), f"is {_kind(entry)}, expected an object")
    _require(isinstance(entry.get("id"), str | int), 'field "id" is missing or not a string')
    messages = _messages(entry.get("conversations"))
    media = _media(entry, media_root)
    first, visual, at_end = _split_marker(messages[0])
    _require(
        visual == (media is not None),
        'field "conversations" has <image> in its first turn but there is no field "image" or "video"'
        if visual
        else 'field "image" or "video" is given but the first human turn has no <image>',
    )
    texts = [first, *messages[1:]]
    for i, text in enumerate(texts):
        _require(bool(text), f'field "conversations[{i}].value" has no text')
        _require(
            not any(marker in text for marker in MARKERS),
            f'field "conversations[{i}].value" has a stray <image>',
        )
    kind, frames = entry.get("type", ""), entry.get("needle_frames", [])
    _require(isinstance(kind, str), f'field "type" is {_kind(kind)}, expected a string')
    turns = tuple(zip(texts[::2], texts[1::2], strict=True))
    _require(
        isinstance(frames, list)
        and len(frames) in (0, len(turns))
        and all(isinstance(each, list) and all(type(f) is int and f >= 0 for f in each) for each in frames),
        f'field "needle_frames" is {frames!r}, expected a list of frame numbers for each turn',
    )
    return Record(str(entry["id"]), media, turns, at_end, kind, tuple(map(tuple, frames)))


def _messages(conversations: object) -> list[str]:
    """The texts of the messages, human and gpt in turn."""
    _require(
        isinstance(conversations, list) and len(conversations) >= 2 and len(conversations) % 2 == 0,
        'field "conversations" must be a list of pairs of a human and a gpt message',
    )
    texts = []
    for i, message in enumerate(conversations):
        role, field = _ROLES[i % 2], f'field "conversations[{i}]'
        _require(isinstance(message, dict), f'{field}" is {_kind(message)}, expected an object')
        _require(message.get("from") == role, f'{field}.from" is {message.get("from")!r}, expected {role!r}')
        _require(isinstance(message.get("value"), str), f'{field}.value" is missing or not a string')
        texts.append(message["value"].strip())
    return texts


def _media(entry: dict, media_root: Path) -> Path | None:
    present = [key for key in ("image", "video") if key in entry]
    _require(len(present) < 2, 'has both "image" and "video", expected one')
    if not present:
        return None
    path = entry[present[0]]
    _require(isinstance(path, str) and bool(path), f'field "{present[0]}" is not a path')
    return media_root / path


def _split_marker(text: str) -> tuple[str, bool, bool]:
    """The first human message as (text without marker, a marker was there, it stood at the end)."""
    for marker in MARKERS:
        if text.startswith(marker):
            return text.removeprefix(marker).strip(), True, False
        if text.endswith(marker):
            return text.removesuffix(marker).strip(), True, True
        _require(
            marker not in text, f'field "conversations[0].value" has {marker} inside: put it first or last'
        )
    return text, False, False
