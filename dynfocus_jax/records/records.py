"""Records, and the LLaVA files that hold them."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dynfocus_jax.errors import UserError, quoted
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.entries import Invalid, line_entries, list_entries
from dynfocus_jax.records.fields import (
    check_size,
    ensure,
    id_of,
    kind_of,
    media_of,
    path_of,
    span_of,
    text_of,
)

MARKERS = ("<image>", "<video>")  # where the visual tokens stand in the first human turn
MODALITIES = ("text", "image", "video")
_ROLES = ("human", "gpt")
_NAMING = ("id", "video_id", "videoid", "video", "image", "video_filename")  # fields that tell entries apart

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation about one file, or about none."""

    id: str
    media: Path | None  # None: text only
    turns: Turns  # (question, answer), without the media marker
    visual_at_end: bool = False  # the visual tokens come after the first question, not before it
    kind: str = ""  # type of question, for accuracy by type
    needle_frames: tuple[tuple[int, ...], ...] = ()  # of each turn, frames of the file known to matter
    source: str = ""  # name of the source in its mixture
    modality: str = ""  # "text" | "image" | "video"; left out: "video" with a file, "text" without
    span: tuple[float, float] | None = None  # seconds of the file that the record is about; None: all
    subtitles: Path | None = None  # SRT or WebVTT file of the video

    def __post_init__(self):
        if not self.modality:
            object.__setattr__(self, "modality", "text" if self.media is None else "video")


@dataclass(frozen=True, slots=True)
class Refused:
    """An entry of an annotation file that is no usable record."""

    number: int  # position in the file, from 0
    id: str  # as far as it has one
    reason: str  # what is wrong with it
    fault: str = "form"  # | "turns" (their order) | "text" | "path" | "size" | "duplicate" | "modality"


ParseRecord = Callable[[object], Record]  # raises Invalid


def read_records(annotations: str | Path, media_root: str | Path) -> list[Record]:
    """Read a LLaVA json or jsonl file all of whose records must be right (see `read_llava`).

    Media paths are taken relative to `media_root`; whether the files exist shows when they are read. Raises
    UserError that names file, record and field.
    """
    records, refused = collect(llava_entries(Path(annotations)), llava_parser(MediaFolder(media_root)))
    if refused:
        first = refused[0]
        raise UserError(f"annotation file {annotations}, record {first.id}: {first.reason}")
    return records


def collect(entries: Iterable[tuple[int, object]], parse: ParseRecord) -> tuple[list[Record], list[Refused]]:
    """The records that `parse` makes of numbered entries, and those that it refuses.

    Ids become unique: of entries that say the same under the same id all but the first are refused as
    duplicates; one that says something else is kept, the second as "id#2", and so on. (LLaVA-665K has several
    conversations under the id of one COCO image.)
    """
    records, refused = [], []
    known: dict[str, int] = {}  # position in `records` of the first of an id
    repeats: dict[str, _Repeats] = {}
    for number, entry in entries:
        try:
            if isinstance(entry, Invalid):
                raise entry
            record = parse(entry)
            if record.id in known:
                first = records[known[record.id]]
                same = repeats.setdefault(record.id, _Repeats({_content(first)}))
                record = same.renamed(record, known)
        except Invalid as error:
            refused.append(Refused(number, _name(entry, number), str(error), error.fault))
            continue
        known[record.id] = len(records)
        records.append(record)
    return records, refused


@dataclass
class _Repeats:
    """The records under one id so far."""

    contents: set[Hashable]
    last: int = 1

    def renamed(self, record: Record, known: dict[str, int]) -> Record:
        content = _content(record)
        if content in self.contents:
            raise Invalid(
                "duplicates an earlier record; to use it more often, set repeat of its source", "duplicate"
            )
        self.contents.add(content)
        while (name := f"{record.id}#{self.last + 1}") in known:
            self.last += 1
        self.last += 1
        return replace(record, id=name)


def _content(record: Record) -> Hashable:
    return record.media, record.turns, record.visual_at_end, record.span


def _name(entry: object, number: int) -> str:
    """Return a name for a refused entry."""
    for key in _NAMING if isinstance(entry, dict) else ():
        if type(entry.get(key)) in (str, int) and entry[key] != "":
            return quoted(entry[key]).strip("'")
    return f"number {number}"


# ---- LLaVA ----------------------------------------------------------------------------------------------


def llava_entries(path: Path) -> Iterator[tuple[int, object]]:
    """The entries of a LLaVA file: a json list, or with the suffix .jsonl a record a line."""
    return line_entries(path) if path.suffix == ".jsonl" else list_entries(path)


def llava_parser(folder: MediaFolder, source: str = "") -> ParseRecord:
    """Records of LLaVA entries: {"id", "image" or "video", "conversations": [{"from", "value"}, ...]}.

    The messages are of "human" and "gpt" in turn; the first has the marker <image> (also for a video) at its
    start or end if there is a file, and no other message has one. Text-only records may mention it. As
    extensions "type" (of the question), "needle_frames" (a list a turn), "start" and "end" (seconds of the
    video) and "subtitles" (a path like the video's) are kept. Everything else is ignored.
    """

    def parse(entry: object) -> Record:
        if not isinstance(entry, dict):
            raise Invalid(f"is {kind_of(entry)}, expected an object")
        messages = _messages(entry.get("conversations"))
        media, modality = media_of(entry, folder)
        first, visual, at_end = _split_marker(messages[0], media is not None)
        if visual and media is None:
            raise Invalid(
                'field "conversations" has <image> in its first turn but there is no field "image" or "video"'
            )
        if media is not None and not visual:
            raise Invalid('field "image" or "video" is given but the first human turn has no <image>')
        texts = [first, *messages[1:]]
        for i, value in enumerate(texts):
            if not value:
                raise Invalid(f'field "conversations[{i}].value" has no text', "text")
            if media is not None and any(marker in value for marker in MARKERS):
                raise Invalid(f'field "conversations[{i}].value" has a stray <image>')
        turns = tuple(zip(texts[::2], texts[1::2], strict=True))
        return Record(
            id_of(entry.get("id")),
            media,
            turns,
            at_end,
            kind=text_of(entry.get("type", ""), "type", empty=True),
            needle_frames=_needle_frames(entry.get("needle_frames", []), len(turns)),
            source=source,
            modality=modality,
            span=span_of(entry),
            subtitles=path_of(entry["subtitles"], "subtitles", folder) if entry.get("subtitles") else None,
        )

    return parse


def _messages(conversations: object) -> list[str]:
    """The texts of the messages, human and gpt in turn."""
    ensure(
        isinstance(conversations, list) and len(conversations) > 0,
        'field "conversations" must be a list of pairs of a human and a gpt message',
    )
    texts = []
    for i, message in enumerate(conversations):
        role = _ROLES[i % 2]
        if not isinstance(message, dict):
            raise Invalid(f'field "conversations[{i}]" is {kind_of(message)}, expected an object')
        if message.get("from") != role:
            found = kind_of(message.get("from"))
            raise Invalid(f'field "conversations[{i}].from" is {found}, expected {role!r}', "turns")
        texts.append(text_of(message.get("value"), f"conversations[{i}].value", empty=True))
    ensure(
        len(texts) % 2 == 0,
        'field "conversations" must be a list of pairs of a human and a gpt message; the last has no answer',
        "turns",
    )
    check_size(texts)
    return texts


def _split_marker(text: str, has_media: bool) -> tuple[str, bool, bool]:
    """The first human message as (text without marker, a marker was there, it stood at the end)."""
    for marker in MARKERS:
        if text.startswith(marker):
            return text.removeprefix(marker).strip(), True, False
        if text.endswith(marker):
            return text.removesuffix(marker).strip(), True, True
        if has_media and marker in text:
            raise Invalid(f'field "conversations[0].value" has {marker} inside: put it first or last')
    return text, False, False


def _needle_frames(frames: object, turns: int) -> tuple[tuple[int, ...], ...]:
    if (
        not isinstance(frames, list)
        or len(frames) not in (0, turns)
        or not all(isinstance(each, list) and all(type(f) is int and f >= 0 for f in each) for each in frames)
    ):
        raise Invalid(
            f'field "needle_frames" is {quoted(frames)}, expected a list of frame numbers for each turn'
        )
    return tuple(map(tuple, frames))
