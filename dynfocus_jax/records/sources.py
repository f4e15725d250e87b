"""Sources of a mixture: their section of the configuration, and reading their records."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections.config_dict import ConfigDict

from dynfocus_jax.errors import UserError
from dynfocus_jax.media.folder import MediaFolder
from dynfocus_jax.records.format_reader import SourceFiles
from dynfocus_jax.records.formats import FORMATS
from dynfocus_jax.records.formats.llava import read_llava
from dynfocus_jax.records.records import ParsedEntries, Record
from dynfocus_jax.sections import Field, Section, check_section, fill_section, require

SOURCE: Section = {
    "name": Field(str, "name of the source in logs and lists"),
    "annotations": Field(str, "annotation file, relative to data.root or absolute"),
    "format": Field("llava", "format of the annotation file", choices=tuple(FORMATS)),
    "media": Field(str, "folder of the media files; None: data.root"),
    "modality": Field(
        "auto",
        "modality that every record must have; auto: any",
        choices=("auto", "image", "video", "text"),
    ),
    "select": Field("all", 'records to use: "all", "first:N", "first:N%", "random:N" or "random:N%"'),
    "repeat": Field(1, "number of times each record is used in an epoch", at_least=1),
    "weight": Field(
        float,
        "share of the samples of an epoch, relative to the weights of the other sources; None: each record "
        "is used `repeat` times",
        above=0,
    ),
}


def source(**fields: Any) -> ConfigDict:
    """Return the section of one source of a stage; `name` and `annotations` are required."""
    return fill_section(SOURCE, fields, "source(...)")


def check_sources(sources: Sequence[ConfigDict], where: str) -> None:
    """Check the sources of a mixture; raise UserError if one is invalid or they do not fit together."""
    for number, section in enumerate(sources):
        place = f"{where}[{number}]"
        require(isinstance(section, ConfigDict), f"{place} is {section!r}, expected a source(...).")
        check_section(section, SOURCE, place)
        for name in ("name", "annotations"):
            require(bool(section[name]), f"{place}.{name} is not set; set it, because it has no default.")
        require(
            re.fullmatch(r"all|(first|random):\d+%?", section.select) is not None,
            f"{place}.select is {section.select!r}, expected 'all', 'first:N', 'first:N%', 'random:N' or "
            f"'random:N%'.",
        )
    names = [section.name for section in sources]
    require(
        len(set(names)) == len(names),
        f"{where} has two sources with the same name: {', '.join(names)}; rename one of them.",
    )
    weighted = [section.name for section in sources if section.weight is not None]
    require(
        len(weighted) in (0, len(sources)),
        f"{where} has weights for {', '.join(weighted)} only; set the weight of all sources, or of none.",
    )


def read_source(section: ConfigDict, data_root: str | Path) -> ParsedEntries:
    """Read the annotation file of a source.

    Args:
      section: the source, see `source`.
      data_root: folder that its paths are relative to.

    Raises:
      UserError: if the annotation file or the folder of the media cannot be read.
    """
    media = Path(data_root) / Path(section.media or "").expanduser()
    if section.media and not media.is_dir():
        raise UserError(
            f"source {section.name!r}: media is {section.media!r}, but {media} is not a folder; set it "
            "to the folder of the media files."
        )
    annotations = Path(data_root) / Path(section.annotations).expanduser()
    files = SourceFiles(annotations, MediaFolder(media), section.name, section.modality)
    return FORMATS[section.format](files)


def read_records(annotations: str | Path, media_root: str | Path) -> list[Record]:
    """Read an annotation file in LLaVA's format, every entry of which must be valid.

    Args:
      annotations: a .json or .jsonl file, see `read_llava`.
      media_root: folder that its paths are relative to. The media files need not exist.

    Raises:
      UserError: if the file cannot be read or an entry is invalid; the message names the entry and its field.
    """
    records, refused = read_llava(SourceFiles(Path(annotations), MediaFolder(media_root)))
    if refused:
        first = refused[0]
        raise UserError(f"annotation file {annotations}, record {first.id}: {first.reason}.")
    return records
