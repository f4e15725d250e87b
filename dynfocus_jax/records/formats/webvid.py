"""Reader of WebVid's annotations."""

from dynfocus_jax.records import prompts
from dynfocus_jax.records.entries import csv_entries
from dynfocus_jax.records.fields import first_existing, id_of, text_of
from dynfocus_jax.records.format_reader import SourceFiles, make_record, parse_source
from dynfocus_jax.records.records import ParsedEntries, Record


def read_webvid(files: SourceFiles) -> ParsedEntries:
    """Read WebVid: captions ("name") of the videos page_dir/videoid.mp4, or videoid.mp4."""

    def parse(row: dict[str, str]) -> Record:
        name = id_of(row["videoid"])
        caption = text_of(row["name"], "name")
        pages = row["page_dir"].strip()
        places = [f"{pages}/{name}.mp4"] if pages else []
        media = first_existing([*places, f"{name}.mp4"], "videoid", files.folder)
        return make_record(files, name, media, [(prompts.caption_request("video", name), caption)])

    return parse_source(files, csv_entries(files.annotations, ("videoid", "name", "page_dir")), parse)


FORMAT = read_webvid
