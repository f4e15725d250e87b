"""Lists of samples that were skipped or shortened, each record once."""

import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from dynfocus_jax.errors import UserError
from dynfocus_jax.json_lines import append_json_line, read_json_lines
from dynfocus_jax.records.records import Record, RefusedEntry


class Listing:
    """Entries about records, each record's first one: in `records`, and with `path` as lines of that file.

    Records that the file lists already are not listed again. Each process needs a file of its own.
    """

    def __init__(self, path: str | Path | None = None):
        self._path = Path(path) if path else None
        self.records: list[dict] = read_json_lines(self._path) if self._path else []
        self._listed = set(map(self._key, self.records))

    def add(self, entry: dict) -> None:
        """List `entry` ("id", "source" and more) unless one of that record is listed."""
        if self._key(entry) in self._listed:
            return
        self._listed.add(self._key(entry))
        self.records.append(entry)
        if self._path:
            append_json_line(self._path, entry)

    @staticmethod
    def _key(entry: dict) -> tuple:
        return entry.get("source"), entry["id"], entry.get("number")


class Skipped:
    """Samples that could not be used: each listed once, all counted, too many of them an error.

    `note` raises UserError as soon as more than `max_share` of the samples seen (of the first `grace` samples
    at least, so that one bad file among the first does not stop a run) were skipped. Safe to use from several
    threads; `path` as in `Listing`.
    """

    def __init__(self, path: str | Path | None = None, *, max_share: float = 0.01, grace: int = 100):
        if not 0 <= max_share < 1:
            raise UserError(
                f"the largest share of skipped samples is {max_share}, expected at least 0 and below 1"
            )
        self.count = 0  # samples skipped since the start, repetitions in later epochs included
        self.seen = 0
        self._max_share, self._grace = max_share, grace
        self._listing = Listing(path)
        self._lock = threading.Lock()

    @property
    def records(self) -> list[dict]:
        """The listed entries."""
        return self._listing.records

    def note(self, record: Record, reason: str | None) -> None:
        """Count one sample; `reason` says why it was skipped, None that it was used."""
        with self._lock:
            self.seen += 1
            if reason is None:
                return
            self.count += 1
            media = str(record.media) if record.media else None
            self._listing.add({**_name(record), "media": media, "reason": reason})
            if self.count > self._max_share * max(self.seen, self._grace):
                raise UserError(
                    f"{self.count} of {self.seen} samples could not be used, more than the allowed share of "
                    f"{self._max_share}; the last: record {record.id}: {reason}"
                )

    def refuse(self, refused: Iterable[tuple[str, RefusedEntry]], entries: int) -> None:
        """List the entries of annotation files, of `entries` in all, that are no records.

        Raises:
          UserError: they are too many.
        """
        refused = list(refused)
        for source, entry in refused:
            about = {"number": entry.number, "media": None, "reason": entry.reason}
            self._listing.add({"id": entry.id, "source": source, **about})
        if len(refused) > self._max_share * max(entries, self._grace):
            source, entry = refused[-1]
            raise UserError(
                f"{len(refused)} of {entries} records of the annotation files cannot be used, more than the "
                f"allowed share of {self._max_share}; the last: record {entry.id} of {source}: {entry.reason}"
            )


class Shortened:
    """Samples that were too long and lost something: each record listed once, all counted by what it was."""

    def __init__(self, path: str | Path | None = None):
        self.counts: Counter[str] = Counter()  # what -> samples, repetitions in later epochs included
        self._listing = Listing(path)
        self._lock = threading.Lock()

    @property
    def records(self) -> list[dict]:
        """The listed entries."""
        return self._listing.records

    def note(self, record: Record, changes: Iterable[tuple[str, str]]) -> None:
        """Count one sample; changes: "turns", "frames" or "subtitles", and a few words with numbers."""
        with self._lock:
            self.counts.update(what for what, _ in changes)
            self._listing.add({**_name(record), "action": ", ".join(action for _, action in changes)})


def _name(record: Record) -> dict:
    return {"id": record.id, "source": record.source}
