"""Lists of the samples that were skipped or shortened, each record once."""

import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dynfocus_jax.errors import UserError
from dynfocus_jax.json_lines import append_json_line, read_json_lines
from dynfocus_jax.records.records import Record, RefusedEntry

_Entry = dict[str, Any]


class RecordLog:
    """A list of entries about records, the first one of each record, kept in a file.

    Attributes:
      entries: the entries, including those that the file held before.
    """

    def __init__(self, path: str | Path | None = None):
        """Read the entries of a JSON lines file, to which `add` appends; None keeps no file.

        Each process needs a file of its own.
        """
        self._path = Path(path) if path else None
        self.entries: list[_Entry] = read_json_lines(self._path) if self._path else []
        self._keys = set(map(self._key, self.entries))

    def add(self, entry: _Entry) -> None:
        """Add an entry with "id", "source" and more, unless there is one of the same record."""
        if self._key(entry) in self._keys:
            return
        self._keys.add(self._key(entry))
        self.entries.append(entry)
        if self._path:
            append_json_line(self._path, entry)

    @staticmethod
    def _key(entry: _Entry) -> tuple[Any, ...]:
        return entry.get("source"), entry["id"], entry.get("number")


class SkippedSamples:
    """The samples that could not be used. Safe to use from several threads.

    Attributes:
      count: number of skipped samples since the start, repetitions in later epochs included.
      seen: number of all samples since the start.
    """

    def __init__(self, path: str | Path | None = None, *, max_share: float = 0.01, grace: int = 100):
        """Create a list.

        Args:
          path: file of the list, see `RecordLog`.
          max_share: largest share of the samples that may be skipped.
          grace: number of samples that the share refers to at least, so that a single unreadable file at the
            start does not stop a run.

        Raises:
          UserError: if `max_share` is not at least 0 and below 1.
        """
        if not 0 <= max_share < 1:
            raise UserError(
                f"the largest share of skipped samples is {max_share}, expected at least 0 and less than 1."
            )
        self.count = 0
        self.seen = 0
        self._max_share, self._grace = max_share, grace
        self._log = RecordLog(path)
        self._lock = threading.Lock()

    @property
    def entries(self) -> list[_Entry]:
        """The list: an entry per record."""
        return self._log.entries

    def note(self, record: Record, reason: str | None) -> None:
        """Count a sample.

        Args:
          record: the record of the sample.
          reason: why the sample was skipped; None if it was used.

        Raises:
          UserError: if too many samples were skipped.
        """
        with self._lock:
            self.seen += 1
            if reason is None:
                return
            self.count += 1
            media = str(record.media) if record.media else None
            self._log.add({**_identity(record), "media": media, "reason": reason})
            if self.count > self._max_share * max(self.seen, self._grace):
                raise UserError(
                    f"{self.count} of {self.seen} samples could not be used, more than "
                    f"config.data.max_skip_share = {self._max_share} allows; correct the data, or raise "
                    f"max_skip_share. The last is record {record.id}: {reason}"
                )

    def note_refused(self, refused: Iterable[tuple[str, RefusedEntry]], num_entries: int) -> None:
        """List the entries of annotation files that are not usable records.

        Args:
          refused: (source, entry) pairs.
          num_entries: number of all entries of the files.

        Raises:
          UserError: if too many entries are refused.
        """
        refused = list(refused)
        for source, entry in refused:
            about = {"number": entry.number, "media": None, "reason": entry.reason}
            self._log.add({"id": entry.id, "source": source, **about})
        if len(refused) > self._max_share * max(num_entries, self._grace):
            source, entry = refused[-1]
            raise UserError(
                f"{len(refused)} of {num_entries} records of the annotation files cannot be used, more than "
                f"config.data.max_skip_share = {self._max_share} allows; correct the files, or raise "
                f"max_skip_share. The last is record {entry.id} of {source}: {entry.reason}"
            )


class ShortenedSamples:
    """The samples that were too long and lost a part. Safe to use from several threads.

    Attributes:
      counts: number of samples by the kind of the part, repetitions in later epochs included.
    """

    def __init__(self, path: str | Path | None = None):
        """Create a list. path: its file, see `RecordLog`."""
        self.counts: Counter[str] = Counter()
        self._log = RecordLog(path)
        self._lock = threading.Lock()

    @property
    def entries(self) -> list[_Entry]:
        """The list: an entry per record."""
        return self._log.entries

    def note(self, record: Record, omissions: Iterable[tuple[str, str]]) -> None:
        """Count a sample.

        Args:
          record: the record of the sample.
          omissions: the parts that it lost, see `samples.Omission`.
        """
        omissions = list(omissions)
        with self._lock:
            self.counts.update(part for part, _ in omissions)
            self._log.add({**_identity(record), "action": ", ".join(action for _, action in omissions)})


def _identity(record: Record) -> _Entry:
    return {"id": record.id, "source": record.source}
