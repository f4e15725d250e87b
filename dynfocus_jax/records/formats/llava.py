"""Reader of LLaVA's format, which is also the format for your own data."""

from dynfocus_jax.errors import quoted
from dynfocus_jax.records.entries import InvalidEntry, JsonValue, json_line_entries, json_list_entries
from dynfocus_jax.records.fields import (
    check_size,
    ensure,
    id_of,
    kind_of,
    list_of,
    media_of,
    object_of,
    path_of,
    span_of,
    text_of,
)
from dynfocus_jax.records.format_reader import SourceFiles, parse_source
from dynfocus_jax.records.records import ParsedEntries, Record

_MARKERS = ("<image>", "<video>")  # place of the visual tokens in the first human message
_ROLES = ("human", "gpt")


def read_llava(files: SourceFiles) -> ParsedEntries:
    """Read a JSON list, or with the suffix .jsonl one entry per line, in the format of LLaVA.

    An entry is {"id", "image" or "video", "conversations": [{"from", "value"}, ...]}. Its messages are of
    "human" and "gpt" in turn. If it has a file, the first message begins or ends with the marker <image> (for
    a video as well), and no other message contains one. Text-only entries may mention the marker.

    Optional fields of our own: "type" (of the question), "needle_frames" (a list of frame numbers for each
    turn), "start" and "end" (seconds of the video), and "subtitles" (a path, like that of the video).
    """

    def parse(value: JsonValue) -> Record:
        entry = object_of(value)
        messages = _llava_messages(entry.get("conversations"))
        media, modality = media_of(entry, files.folder)
        first, has_marker, at_end = _split_marker(messages[0], media is not None)
        if has_marker and media is None:
            raise InvalidEntry(
                'field "conversations" has <image> in its first message, but there is no field "image" or '
                '"video"'
            )
        if media is not None and not has_marker:
            raise InvalidEntry('field "image" or "video" is given, but the first message has no <image>')
        texts = [first, *messages[1:]]
        for i, text in enumerate(texts):
            if not text:
                raise InvalidEntry(f'field "conversations[{i}].value" has no text', "text")
            if media is not None and any(marker in text for marker in _MARKERS):
                raise InvalidEntry(
                    f'field "conversations[{i}].value" contains <image>, expected only in the first message'
                )
        turns = tuple(zip(texts[::2], texts[1::2], strict=True))
        subtitles = entry.get("subtitles")
        return Record(
            id_of(entry.get("id")),
            media,
            turns,
            at_end,
            kind=text_of(entry.get("type", ""), "type", empty=True),
            needle_frames=_needle_frames(entry.get("needle_frames", []), len(turns)),
            source=files.name,
            modality=modality,
            span=span_of(entry),
            subtitles=path_of(subtitles, "subtitles", files.folder) if subtitles else None,
        )

    is_lines = files.annotations.suffix == ".jsonl"
    entries = json_line_entries if is_lines else json_list_entries
    return parse_source(files, entries(files.annotations), parse)


def _llava_messages(conversations: JsonValue) -> list[str]:
    """Return the texts of the messages, of human and gpt in turn."""
    texts: list[str] = []
    for i, value in enumerate(list_of(conversations, "conversations", "messages")):
        message = object_of(value, f"conversations[{i}]")
        role = _ROLES[i % 2]
        if message.get("from") != role:
            found = kind_of(message.get("from"))
            raise InvalidEntry(f'field "conversations[{i}].from" is {found}, expected {role!r}', "turns")
        texts.append(text_of(message.get("value"), f"conversations[{i}].value", empty=True))
    ensure(
        len(texts) % 2 == 0,
        f'field "conversations" is a list of {len(texts)}, expected an answer to each question',
        "turns",
    )
    check_size(texts)
    return texts


def _split_marker(text: str, has_media: bool) -> tuple[str, bool, bool]:
    """Return the first message without its marker, whether it had one, and whether that was at its end."""
    for marker in _MARKERS:
        if text.startswith(marker):
            return text.removeprefix(marker).strip(), True, False
        if text.endswith(marker):
            return text.removesuffix(marker).strip(), True, True
        if has_media and marker in text:
            raise InvalidEntry(
                f'field "conversations[0].value" contains {marker} within the text, expected first or last'
            )
    return text, False, False


def _needle_frames(value: JsonValue, num_turns: int) -> tuple[tuple[int, ...], ...]:
    """Return the frame numbers of each turn, or () for an empty list."""
    if isinstance(value, list) and len(value) in (0, num_turns):
        frames = [_frame_numbers(each) for each in value]
        if None not in frames:
            return tuple(each for each in frames if each is not None)
    raise InvalidEntry(
        f'field "needle_frames" is {quoted(value)}, expected a list of frame numbers for each turn'
    )


def _frame_numbers(value: JsonValue) -> tuple[int, ...] | None:
    """Return a list of frame numbers as a tuple, None for anything else."""
    if not isinstance(value, list):
        return None
    numbers = tuple(each for each in value if type(each) is int and each >= 0)
    return numbers if len(numbers) == len(value) else None


FORMAT = read_llava
