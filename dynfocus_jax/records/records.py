"""Records, and the parsing of numbered entries into records with unique ids."""

from collections.abc import Callable, Container, Hashable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from dynfocus_jax.errors import quoted
from dynfocus_jax.records.entries import InvalidEntry

MODALITIES = ("text", "image", "video")
_NAMING_FIELDS = ("id", "video_id", "videoid", "video", "image", "video_filename")  # identify an entry

Turns = tuple[tuple[str, str], ...]
Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation about one file, or about none."""

    id: str
    media: Path | None  # None for text only
    turns: Turns  # (question, answer), without the media marker
    visual_at_end: bool = False  # the visual tokens follow the first question instead of preceding it
    kind: str = ""  # type of question, for accuracy by type
    needle_frames: tuple[tuple[int, ...], ...] = ()  # for each turn, frames of the file known to matter
    source: str = ""  # name of the source in its mixture
    modality: str = ""  # "text" | "image" | "video"; by default "video" with a file, "text" without
    span: tuple[float, float] | None = None  # part of the video, in seconds; None for all of it
    subtitles: Path | None = None  # SRT or WebVTT file of the video

    def __post_init__(self):
        if not self.modality:
            object.__setattr__(self, "modality", "text" if self.media is None else "video")


@dataclass(frozen=True, slots=True)
class RefusedEntry:
    """An entry of an annotation file that is not a usable record."""

    number: int  # position in the file, from 0
    id: str  # its id, or another name for it
    reason: str  # a sentence without its subject, the entry
    fault: str = "form"  # | "turns" (their order) | "text" | "path" | "size" | "duplicate" | "modality"


class ParsedEntries(NamedTuple):
    """The entries of an annotation file: each is in one of the lists, in the order of the file."""

    records: list[Record]
    refused: list[RefusedEntry]


def parse_entries(
    entries: Iterable[tuple[int, Entry | InvalidEntry]], parse: Callable[[Entry], Record]
) -> ParsedEntries:
    """Parse numbered entries into records with unique ids.

    Entries with the same id and content as an earlier one are refused as duplicates. Entries with the same id
    and other content are renamed: the second becomes "id#2", and so on. (LLaVA-665K has several conversations
    under the id of one COCO image.)

    Args:
      entries: (number, entry) pairs, see `entries`.
      parse: makes a record of an entry, or raises InvalidEntry.
    """
    records: list[Record] = []
    refused: list[RefusedEntry] = []
    first_of_id: dict[str, Record] = {}
    repeats: dict[str, _Repeats] = {}
    for number, entry in entries:
        try:
            if isinstance(entry, InvalidEntry):
                raise entry
            record = parse(entry)
            if record.id in first_of_id:
                first = first_of_id[record.id]
                record = repeats.setdefault(record.id, _Repeats({_content(first)})).rename(
                    record, first_of_id
                )
        except InvalidEntry as error:
            refused.append(RefusedEntry(number, _entry_name(entry, number), str(error), error.fault))
            continue
        first_of_id[record.id] = record
        records.append(record)
    return ParsedEntries(records, refused)


@dataclass
class _Repeats:
    """Contents of the records that have had one id."""

    contents: set[Hashable]
    last_number: int = 1

    def rename(self, record: Record, taken: Container[str]) -> Record:
        """Return the record under an id that is not taken; raise InvalidEntry if it is a duplicate."""
        content = _content(record)
        if content in self.contents:
            raise InvalidEntry(
                "duplicates an earlier record; to use records several times, set `repeat` of the source",
                "duplicate",
            )
        self.contents.add(content)
        while (name := f"{record.id}#{self.last_number + 1}") in taken:
            self.last_number += 1
        self.last_number += 1
        return replace(record, id=name)


def _content(record: Record) -> Hashable:
    return record.media, record.turns, record.visual_at_end, record.span


def _entry_name(entry: object, number: int) -> str:
    """Return a name for a refused entry: the first field that identifies it, or its number."""
    if isinstance(entry, dict):
        for field in _NAMING_FIELDS:
            if type(entry.get(field)) in (str, int) and entry[field] != "":
                return quoted(entry[field]).strip("'")
    return f"number {number}"
