"""Writing features: shards that appear when they are whole, so that a run which is killed can go on."""

import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.features.store import (
    DESCRIPTION,
    Entry,
    Key,
    Part,
    as_header,
    as_line,
    read_description,
    unlike,
)
from dynfocus_jax.media.subtitles import Subtitle
from dynfocus_jax.media.video import MediaInfo

_OPTIONS = "group_size:1,uncompressed"  # a frame can be read on its own; features hardly compress


def begin_folder(folder: Path, description: dict) -> None:
    """Make the folder, or goes on in one whose description is the same; nothing else may be writing there.

    What a killed run has left, and lists of what could not be read, are deleted: all of it is tried again.

    description: `describe`, with "weights" (None: of the features that are written the tower is not known)
      and "code".

    Raises:
      UserError: the folder has features of another description.
    """
    before = read_description(folder)
    fixed = {key: value for key, value in description.items() if key not in ("weights", "code")}
    if before is not None:
        changed = unlike(before, fixed)
        weights = before["weights"], description["weights"]
        if None not in weights and weights[0] != weights[1]:
            changed.append(f"weights: there {weights[0]}, here {weights[1]}")
        if changed:
            raise UserError(
                f"--output {str(folder)!r} has features of another tower or of other frames "
                f"({'; '.join(changed[:5])}); restore these settings, or choose another folder."
            )
        if weights[0] is not None:
            description = before
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{DESCRIPTION}.tmp"
    draft.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, folder / DESCRIPTION)
    whole = {path.stem for path in folder.glob("features-*.jsonl")}
    for path in folder.glob("features-*"):
        if path.suffix == ".tmp" or (path.suffix == ".array_record" and path.stem not in whole):
            path.unlink()
    for path in folder.glob("skipped*.jsonl"):
        path.unlink()


def first_free_number(folder: Path) -> int:
    """The number from which on no shard has one."""
    return 1 + max(
        (int(path.stem.rpartition("-")[2]) for path in folder.glob("features-*.jsonl")), default=-1
    )


class ShardWriter:
    """Writes features into one shard after the other.

    numbers: of the shards, never used before nor by another process.
    max_bytes, max_seconds: a shard is finished when it is so large, or was begun so long ago: what a run
      loses when it is killed.
    """

    def __init__(self, folder: Path, numbers: Iterator[int], *, max_bytes: int, max_seconds: float):
        self._folder, self._numbers = folder, numbers
        self._max_bytes, self._max_seconds = max_bytes, max_seconds
        self._writer: ArrayRecordWriter | None = None

    def add(
        self,
        key: Key,
        info: MediaInfo,
        parts: Mapping[int, Part],
        frames: np.ndarray,
        subtitles: Sequence[Subtitle] = (),
    ) -> None:
        """Write a medium: `frames` [n, (1 +) N, C] that the rows of `parts` count.

        Raises:
          RunError: it cannot be written.
        """
        if self._writer is None:
            self._begin()
        payloads = [frame.tobytes() for frame in frames]
        header = as_header(key, parts, list(map(zlib.crc32, payloads)), subtitles)
        for payload in (header, *payloads):
            self._checked(self._writer.write, payload)
        entry = Entry("", self._records, len(frames), tuple(sorted(parts)), zlib.crc32(header), info)
        self._lines.append(as_line(key, entry))
        self._records += 1 + len(frames)
        self._bytes += len(header) + sum(map(len, payloads))
        if self._bytes >= self._max_bytes or time.monotonic() - self._begun > self._max_seconds:
            self.finish()

    def finish(self) -> None:
        """Finish the shard that is being written, if there is one.

        Raises:
          RunError: it cannot be written.
        """
        if self._writer is None:
            return
        self._checked(self._writer.close)
        written = ArrayRecordReader(str(self._draft))
        if not written.ok() or written.num_records() != self._records:
            raise self._failed("not all of it was written")
        written.close()
        shard = self._draft.with_suffix("")
        head = {"shard": shard.name, "bytes": self._draft.stat().st_size}
        index = shard.with_suffix(".jsonl")
        index_draft = index.with_name(index.name + ".tmp")
        try:
            _to_disk(self._draft)
            os.replace(self._draft, shard)
            index_draft.write_text(json.dumps(head) + "\n" + "".join(self._lines), encoding="utf-8")
            _to_disk(index_draft)
            os.replace(index_draft, index)
        except OSError as error:
            raise self._failed(error.strerror) from None
        self._writer = None

    def _begin(self) -> None:
        self._draft = self._folder / f"features-{next(self._numbers):06d}.array_record.tmp"
        self._writer = self._checked(ArrayRecordWriter, str(self._draft), _OPTIONS)
        self._begun, self._bytes, self._records, self._lines = time.monotonic(), 0, 0, []

    def _checked(self, action, *arguments):
        try:
            return action(*arguments)
        except RuntimeError as error:
            raise self._failed(" ".join(str(error).split())) from None

    def _failed(self, reason: str) -> RunError:
        return RunError(
            f"{self._draft} cannot be written ({reason}); check free space and permissions, then start "
            "again. Finished shards are kept."
        )


def _to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk, before it is renamed to what counts as finished."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
