"""Predictions on disk: a JSON line per question, appended as they are made, by one or several processes.

The files are predictions.jsonl of process 0, predictions.3.jsonl of process 3, in one folder. A process that
is killed leaves at most an unfinished last line. A later run, with any number of processes, reads all files
and asks only the questions without an answer, including those whose video could not be read before.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.json_lines import append_json_line, read_json_lines

NAME = "predictions.jsonl"


class PredictionStore:
    """The predictions in a folder. Each process appends to a file of its own.

    name: this process's file.

    Raises:
      UserError: the folder cannot be created, or one of its files has no predictions.
    """

    def __init__(self, folder: Path, name: str = NAME):
        self._folder, self._file = folder, folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--output {str(folder)!r} cannot be created ({error.strerror}); use another folder."
            ) from None
        _read_checked(self._file, read_json_lines)  # removes an unfinished last line
        self._entries = self.read_all()

    def read_all(self) -> dict[str, dict[str, Any]]:
        """Return {question id: entry} of all processes, from the files as they are now.

        If a question has several entries, the last one counts; one with an answer precedes one without.
        """
        entries: dict[str, dict[str, Any]] = {}
        for path in sorted(self._folder.glob("predictions*.jsonl")):
            for entry in _read_checked(path, _read_finished_lines):
                known = entries.get(entry["id"])
                if known is None or entry["prediction"] is not None or known["prediction"] is None:
                    entries[entry["id"]] = entry
        return entries

    def is_answered(self, question_id: str) -> bool:
        """Whether any process had answered a question at the start, or this process has since."""
        entry = self._entries.get(question_id)
        return entry is not None and entry["prediction"] is not None

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append an entry, with at least "id" and "prediction"; the latter is None if there is no answer.

        Raises:
          RunError: the file cannot be written.
        """
        try:
            append_json_line(self._file, dict(entry))
        except OSError as error:
            raise RunError(
                f"{self._file} cannot be written ({error.strerror}); check free space and permissions, then "
                "rerun the same command. The predictions so far are kept."
            ) from None
        self._entries[entry["id"]] = dict(entry)


def _read_finished_lines(path: Path) -> Iterable[Any]:
    """Return all lines but an unfinished last one, which another process may be writing."""
    finished = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in finished.splitlines() if line.strip()]


def _read_checked(path: Path, read: Callable[[Path], Iterable[Any]]) -> list[dict[str, Any]]:
    try:
        entries = list(read(path))
        if all(isinstance(entry, dict) and {"id", "prediction"} <= entry.keys() for entry in entries):
            return entries
    except ValueError:
        pass
    raise UserError(f"{path} is not a file of predictions; remove it, or use another --output.")
