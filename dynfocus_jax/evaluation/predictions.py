"""Predictions: a line of JSON a question, appended as they come, by one or several processes.

The files are predictions.jsonl of process 0, predictions.3.jsonl of process 3, in one folder. A run that was
killed leaves at most an unfinished last line; a later run, of any number of processes, reads all files and
asks only what has no answer yet. What could not be answered (a video that was missing) is asked again.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.json_lines import append_json_line, read_json_lines

NAME = "predictions.jsonl"


class Predictions:
    """The predictions in a folder, of which this process adds to one file.

    name: that file, of this process alone.
    """

    def __init__(self, folder: Path, name: str = NAME):
        self._folder, self._own = folder, folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {str(folder)!r} cannot be made ({error.strerror}).") from None
        _checked(self._own, lambda: read_json_lines(self._own))  # cuts off what a kill left unfinished
        self._entries = self.all()

    def all(self) -> dict[str, dict]:
        """{question id: its entry} of all processes, as the files are now.

        Of several entries an answered one counts before one that is not, then the last.
        """
        entries: dict[str, dict] = {}
        for path in sorted(self._folder.glob("predictions*.jsonl")):
            for entry in _checked(path, lambda path=path: _whole_lines(path)):
                known = entries.get(entry["id"])
                if known is None or entry["prediction"] is not None or known["prediction"] is None:
                    entries[entry["id"]] = entry
        return entries

    def answered(self, question_id: str) -> bool:
        """Whether there is an answer, of whatever process, as of the start or of this process since."""
        entry = self._entries.get(question_id)
        return entry is not None and entry["prediction"] is not None

    def add(self, entry: Mapping) -> None:
        """Append an entry; it has at least "id" and "prediction", None where there is no answer.

        Raises:
          RunError: it cannot be written.
        """
        try:
            append_json_line(self._own, dict(entry))
        except OSError as error:
            raise RunError(
                f"{self._own} cannot be written ({error.strerror}); free disk space and start again. "
                "Existing predictions are kept."
            ) from None
        self._entries[entry["id"]] = dict(entry)


def _whole_lines(path: Path) -> Iterable[dict]:
    """The finished lines; another process may be writing the next one."""
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def _checked(path: Path, read):
    try:
        entries = read()
        if all(isinstance(entry, dict) and {"id", "prediction"} <= entry.keys() for entry in entries):
            return entries
    except ValueError:
        pass
    raise UserError(f"{path} is not a predictions file; remove it, or choose another --output.")
