"""Check the data of a configuration before training.

    python -m dynfocus_jax.data_check --config configs/instruct_7b.py --config.data.root=DIR
    python -m dynfocus_jax.data_check --config configs/toy.py --samples 100 --json check.json

The command reads all records of all stages, looks for their files, counts their text tokens, and decodes some
files of each source (--samples). It prints the numbers of records and samples, the distributions of their
lengths, and the records that cannot be used. --json FILE writes all figures, and the reason for each record
that cannot be used. The number of unreadable files is estimated from the decoded ones. The exit code is 1 if
more records of a stage cannot be used than config.data.max_skip_share allows.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from dynfocus_jax.command import CONFIG_FLAG, run_command
from dynfocus_jax.data.prepare import make_media_reader, make_tokenizer, prepare_data_root
from dynfocus_jax.data.survey import SourceSurvey, Surveyor, distribution
from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.records.mixture import Mixture
from dynfocus_jax.records.records import MODALITIES
from dynfocus_jax.text.tokenizers import Tokenizer
from dynfocus_jax.training.stage_data import make_loader, stage_budget, stage_seed
from dynfocus_jax.validation import validate

_SAMPLES = flags.DEFINE_integer("samples", 20, "Number of files of each source to decode.", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "File to write all figures and reasons to.")


def main() -> None:
    config = CONFIG_FLAG.require("configs/toy.py").copy_and_resolve_references()
    config.initial = None  # the check needs no weights
    validate(config)
    data_root = prepare_data_root(config.data)
    tokenizer = _make_tokenizer(config, data_root)

    surveys = {}
    for index, stage in enumerate(config.stages):
        mixture = Mixture(stage, data_root, stage_seed(config, index))
        loader = None
        if tokenizer is not None:
            loader = make_loader(config, index, mixture.records, tokenizer, data_root)
        surveyor = Surveyor(
            mixture,
            stage_budget(config, index),
            make_media_reader(config, data_root),
            loader,
            samples=_SAMPLES.value,
            seed=config.seed,
            threads=config.data.threads,
        )
        surveys[stage.name] = list(surveyor.survey_sources())
        print(format_stage(stage, surveys[stage.name]), flush=True)

    if _JSON.value is not None:
        content = {name: [to_json(source) for source in sources] for name, sources in surveys.items()}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        Path(_JSON.value).expanduser().write_text(text + "\n", encoding="utf-8")
    allowed = config.data.max_skip_share
    for name, sources in surveys.items():
        if unusable_share(sources) > allowed:
            raise RunError(
                f"{unusable_share(sources):.2%} of the records of stage {name!r} cannot be used, more than "
                f"config.data.max_skip_share = {allowed} allows; correct the data, or raise max_skip_share."
            )


def _make_tokenizer(config: ConfigDict, data_root: Path) -> Tokenizer | None:
    """Return the tokenizer of a configuration; None, after printing a note, if it cannot be read."""
    try:
        return make_tokenizer(config, data_root / config.data.vocabulary)
    except UserError as error:
        print(f"note: text tokens are not counted, because the tokenizer cannot be read: {error}", flush=True)
        return None


def unusable_share(sources: Sequence[SourceSurvey]) -> float:
    """Return the share of a stage's records that cannot be used."""
    total = sum(source.refused + source.records for source in sources)
    return sum(source.unusable for source in sources) / total


def to_json(source: SourceSurvey) -> dict[str, Any]:
    """Return the survey of a source as JSON values."""
    return {
        "name": source.name,
        "entries": source.entries,
        "records": source.records,
        "samples_per_epoch": source.epoch,
        "modalities": {modality: source.modalities[modality] for modality in MODALITIES},
        "text_tokens": distribution(source.tokens),
        "frames": distribution(source.frames),
        "shortened": source.shortened,
        "unusable": source.unusable,
        "faults": dict(source.faults),
        "problems": [problem._asdict() for problem in source.problems],
    }


# ---- Tables ---------------------------------------------------------------------------------------------


def format_stage(stage: ConfigDict, sources: Sequence[SourceSurvey]) -> str:
    """Return the survey of a stage's sources as tables."""
    total = sum(source.epoch for source in sources)
    parts = [
        f"stage {stage.name}: {total} samples per epoch",
        _count_table(sources),
        _fault_table(sources),
        _length_table("text tokens of a conversation", [(source.name, source.tokens) for source in sources]),
        _length_table("frames of a decoded file", [(source.name, source.frames) for source in sources]),
        _problem_lines(sources),
        f"cannot be used: {unusable_share(sources):.2%} of the records",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _count_table(sources: Sequence[SourceSurvey]) -> str:
    rows: list[list[str | int]] = [
        ["source", "entries", "refused", "records", *MODALITIES, "samples per epoch"]
    ]
    for source in sources:
        kinds = [source.modalities[modality] for modality in MODALITIES]
        rows.append([source.name, source.entries, source.refused, source.records, *kinds, source.epoch])
    return _table(rows)


def _fault_table(sources: Sequence[SourceSurvey]) -> str:
    rows: list[list[str | int]] = [
        ["source", "wrong turns", "missing", "too long", "shortened", "files decoded", "unreadable"]
    ]
    for source in sources:
        found = source.faults
        row = [source.name, found["turns"], found["missing"], found["too long"], source.shortened]
        rows.append([*row, len(source.frames) + found["unreadable"], found["unreadable"]])
    return _table(rows)


def _length_table(title: str, lengths: Sequence[tuple[str, Sequence[int]]]) -> str:
    """Return a table of quantiles and histograms of lengths, by powers of two; "" if there are none."""
    known = [(name, found) for name, values in lengths if (found := distribution(values)) is not None]
    if not known:
        return ""
    powers = sorted({power for _, found in known for power in found["up_to"]})
    while all(not found["up_to"].get(powers[0]) for _, found in known):
        powers = powers[1:]
    head = [title, "median", "99 %", "most", *(f"to {power}" for power in powers)]
    rows = [
        [name, found["median"], found["99%"], found["most"], *(found["up_to"].get(p, 0) for p in powers)]
        for name, found in known
    ]
    return _table([head, *rows])


def _problem_lines(sources: Sequence[SourceSurvey]) -> str:
    """Return a line per source and fault: the number of problems, and the first of them."""
    lines = []
    for source in sources:
        first = {problem.fault: problem for problem in reversed(source.problems)}
        for fault, count in source.faults.most_common():
            lines.append(
                f"{source.name}: {fault} ({count}), first record {first[fault].id}: {first[fault].reason}"
            )
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str | int]]) -> str:
    """Return rows as aligned columns, the first aligned left and the others right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells
    )


if __name__ == "__main__":
    run_command(main)
