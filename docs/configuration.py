"""Write docs/configuration.md: every field of a configuration, from its declaration in the package.

Run it with `python -m docs.configuration`.
"""

from pathlib import Path

from dynfocus_jax.command import training_sections
from dynfocus_jax.connectors.registry import connector_fields, connector_kinds
from dynfocus_jax.evaluation.configuration import evaluate_sections
from dynfocus_jax.sections import Section, iterate_fields

PAGE = Path(__file__).with_suffix(".md")
INTRODUCTION = """# Configuration

A config file defines `get_config()`, which starts from `dynfocus_jax.config.default_config()` and changes
fields. Commands set a single field with `--config.FIELD=VALUE`, such as `--config.stages[2].steps=100`, and
list the fields with `--fields=PREFIX`. The defaults are those of the paper's 7B model.

`python -m docs.configuration` generates this page from the declarations of the fields.
"""
EVALUATE = """# Configuration of `evaluate`

`configs/benchmarks.py` sets these fields; set one with `--config.videomme.num_frames=128`.
"""


def page() -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION]
    for where, section in training_sections().items():
        if where == "config.model.connector":
            for kind in connector_kinds():
                parts.append(_table(f"`{where}`, kind `{kind}`", connector_fields(kind), where))
        else:
            parts.append(_table(f"`{where}`", section, where))
    parts.append(EVALUATE)
    for where, section in evaluate_sections().items():
        parts.append(_table(f"`{where}` of `evaluate`", section, where))
    return "\n".join(parts)


def _table(title: str, section: Section, where: str) -> str:
    """Return a heading and a table with a row per field of a section."""
    rows = [
        (f"`{name.removeprefix(f'{where}.')}`", f"`{field.default_text}`", field.accepted, field.about)
        for name, field in iterate_fields(section, where)
    ]
    lines = [f"## {title}", "", "| field | default | accepted | meaning |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
