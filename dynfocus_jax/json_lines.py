"""JSON lines files, whose last line may be incomplete after a process was killed."""

import json
import os
from pathlib import Path


def read_json_lines(path: Path) -> list[dict]:
    """Return all entries, none if there is no file; remove an incomplete last line from the file."""
    if not path.exists():
        return []
    whole, _, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        os.truncate(path, len(whole) + 1 if whole else 0)
    return [json.loads(line) for line in whole.splitlines()]


def append_json_line(path: Path, entry: dict) -> None:
    """Append an entry."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def write_json_lines(path: Path, entries: list[dict]) -> None:
    """Replace all entries atomically: a process that is killed leaves the old entries or the new ones."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    os.replace(draft, path)
