"""The section of the configuration that describes one source of a mixture."""

import re
from collections.abc import Sequence
from typing import Any

from ml_collections.config_dict import ConfigDict

from dynfocus_jax.records.formats import FORMATS
from dynfocus_jax.sections import Field, Section, check_section, fill_section, require

SOURCE: Section = {
    "name": Field(str, "name of the source in logs and lists"),
    "annotations": Field(str, "annotation file, relative to data.root or absolute"),
    "format": Field("llava", "format of the file", choices=tuple(FORMATS)),
    "media": Field(str, "folder of its media; None: data.root"),
    "modality": Field(
        "auto",
        "modality of its records; auto: as each record says",
        choices=("auto", "image", "video", "text"),
    ),
    "select": Field("all", 'records that are used: "all", "first:N", "first:N%", "random:N" or "random:N%"'),
    "repeat": Field(1, "times a record is used in an epoch", at_least=1),
    "weight": Field(
        float,
        "fraction of an epoch, relative to the weights of other sources; None: as many samples as records",
        above=0,
    ),
}


def source(**fields: Any) -> ConfigDict:
    """Return one source of a stage's mixture; `name` and `annotations` have to be given."""
    return fill_section(SOURCE, fields, "source(...)")


def check_sources(sources: Sequence[ConfigDict], where: str) -> None:
    """Check the sources of a mixture; raise UserError if one is wrong or they do not fit together."""
    for number, one in enumerate(sources):
        place = f"{where}[{number}]"
        require(isinstance(one, ConfigDict), f"{place} is not a source(...).")
        check_section(one, SOURCE, place)
        for name in ("name", "annotations"):
            require(bool(one[name]), f"{place}.{name} is not set; it has no default.")
        require(
            re.fullmatch(r"all|(first|random):\d+%?", one.select) is not None,
            f"{place}.select is {one.select!r}, expected 'all', 'first:N', 'first:N%', 'random:N' or "
            f"'random:N%'.",
        )
    names = [one.name for one in sources]
    require(len(set(names)) == len(names), f"{where} has two sources of one name: {', '.join(names)}.")
    weighted = [one.name for one in sources if one.weight is not None]
    require(
        len(weighted) in (0, len(sources)),
        f"{where} has weights for {', '.join(weighted)} only; give all sources a weight, or none.",
    )
