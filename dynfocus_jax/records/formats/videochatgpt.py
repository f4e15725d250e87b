"""Reader of VideoChatGPT-100K's annotations."""

from dynfocus_jax.records.entries import JsonValue, json_list_entries
from dynfocus_jax.records.fields import first_existing, id_of, object_of, text_of, with_suffixes
from dynfocus_jax.records.format_reader import SourceFiles, make_record, parse_source
from dynfocus_jax.records.records import ParsedEntries, Record


def read_videochatgpt(files: SourceFiles) -> ParsedEntries:
    """Read VideoChatGPT-100K: videos of ActivityNet, named without their suffix (mp4, mkv or webm)."""

    def parse(value: JsonValue) -> Record:
        entry = object_of(value)
        name = text_of(entry.get("video_id"), "video_id")
        turn = text_of(entry.get("q"), "q"), text_of(entry.get("a"), "a")
        media = first_existing(with_suffixes(name), "video_id", files.folder)
        return make_record(files, id_of(name), media, [turn])

    return parse_source(files, json_list_entries(files.annotations), parse)


FORMAT = read_videochatgpt
