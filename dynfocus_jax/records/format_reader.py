"""The interface of format readers, and what all of them share."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records import prompts
from dynfocus_jax.records.entries import InvalidEntry
from dynfocus_jax.records.fields import check_size, ensure
from dynfocus_jax.records.records import Entry, ParsedEntries, Record, parse_entries


class SourceFiles(NamedTuple):
    """The files of a source, and what its records must be.

    annotations: the annotation file.
    folder: the folder of the media files.
    name: name of the source, which becomes that of its records.
    modality: modality of every record; "auto" allows all.
    """

    annotations: Path
    folder: MediaFolder
    name: str = ""
    modality: str = "auto"


FormatReader = Callable[[SourceFiles], ParsedEntries]  # raises UserError if a file cannot be read


def parse_source(
    files: SourceFiles, entries: Iterator[tuple[int, Entry | InvalidEntry]], parse: Callable[[Entry], Record]
) -> ParsedEntries:
    """Parse the entries of a source; refuse records of another modality than the source's."""

    def parse_checked(entry: Entry) -> Record:
        record = parse(entry)
        ensure(
            files.modality in ("auto", record.modality),
            f"has modality {record.modality!r}, but its source has modality {files.modality!r}",
            "modality",
        )
        return record

    return parse_entries(entries, parse_checked)


def make_record(
    files: SourceFiles,
    name: str,
    media: Path | None,
    turns: Sequence[tuple[str, str]],
    *,
    modality: str = "video",
    kind: str = "",
    span: tuple[float, float] | None = None,
) -> Record:
    """Return a record of a format that has no place for the visual tokens."""
    check_size(text for turn in turns for text in turn)
    return Record(
        name,
        media,
        tuple(turns),
        visual_at_end=media is not None and prompts.visual_at_end(f"{name} {turns[0][0]}"),
        kind=kind,
        source=files.name,
        modality=modality,
        span=span,
    )
