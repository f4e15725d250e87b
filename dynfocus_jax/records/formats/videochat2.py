"""Reader of VideoChat2-IT's annotations."""

from dynfocus_jax.records import prompts
from dynfocus_jax.records.entries import JsonValue, json_list_entries
from dynfocus_jax.records.fields import ensure, id_of, list_of, media_of, object_of, span_of, text_of
from dynfocus_jax.records.format_reader import SourceFiles, make_record, parse_source
from dynfocus_jax.records.records import ParsedEntries, Record


def read_videochat2(files: SourceFiles) -> ParsedEntries:
    """Read VideoChat2-IT.

    The instruction "i" (may be missing or empty) precedes the question; of consecutive questions with one
    instruction, only the first. An empty question, as for captions, becomes a request for a caption. "start"
    and "end" are seconds of the file.
    """

    def parse(value: JsonValue) -> Record:
        entry = object_of(value)
        media, modality = media_of(entry, files.folder)
        ensure(media is not None, 'has neither "image" nor "video"')
        name = id_of(entry[modality] if entry.get("id") is None else entry["id"])
        turns: list[tuple[str, str]] = []
        last_instruction = ""
        for i, item in enumerate(list_of(entry.get("QA"), "QA", "turns")):
            turn = object_of(item, f"QA[{i}]")
            instruction = text_of(turn.get("i", ""), f"QA[{i}].i", empty=True)
            question = text_of(turn.get("q", ""), f"QA[{i}].q", empty=True)
            if not question:
                question = prompts.caption_request(modality, f"{name} {i}")
            if instruction and instruction != last_instruction:
                question, last_instruction = f"{instruction}\n{question}", instruction
            turns.append((question, text_of(turn.get("a"), f"QA[{i}].a")))
        return make_record(files, name, media, turns, modality=modality, span=span_of(entry))

    return parse_source(files, json_list_entries(files.annotations), parse)


FORMAT = read_videochat2
