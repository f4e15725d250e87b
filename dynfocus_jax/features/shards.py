"""Writing features into shards, each complete once it has its name, so that a killed run can be continued."""

import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.features.store import (
    DESCRIPTION,
    FrameSelection,
    IndexEntry,
    MediaKey,
    description_differences,
    encode_header,
    index_line,
    read_description,
)
from dynfocus_jax.media.subtitles import Subtitle
from dynfocus_jax.media.video import MediaInfo

_WRITER_OPTIONS = "group_size:1,uncompressed"  # frames can be read one by one; features hardly compress


def prepare_folder(folder: Path, description: dict[str, Any]) -> None:
    """Create a folder of features, or prepare one with the same description for more features.

    Deletes the unfinished files of a killed run, and the lists of skipped media, as extraction tries these
    again. No other process may be writing into the folder.

    Args:
      folder: the folder.
      description: `describe_features`, with "weights" (digest of the vision tower's parameters, or None if no
        tower is used) and "code" (version of the code).

    Raises:
      UserError: if the folder has features of another description, or cannot be written.
    """
    before = read_description(folder)
    if before is not None:
        settings = {key: value for key, value in description.items() if key not in ("weights", "code")}
        changed = description_differences(before, settings)
        there, here = before["weights"], description["weights"]
        if there is not None and here is not None and there != here:
            changed.append(f"weights: stored {there}, now {here}")
        if changed:
            raise UserError(
                f"--output {str(folder)!r} has features of another vision tower or of other frames "
                f"({'; '.join(changed[:5])}); restore these settings, or use another folder."
            )
        if there is not None:
            description = before
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"{DESCRIPTION}.tmp"
        draft.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        os.replace(draft, folder / DESCRIPTION)
        _delete_unfinished(folder)
    except OSError as error:
        raise UserError(
            f"--output {str(folder)!r} cannot be written ({error.strerror or error}); check its permissions, "
            "or use another folder."
        ) from None


def _delete_unfinished(folder: Path) -> None:
    complete = {path.stem for path in folder.glob("features-*.jsonl")}
    for path in folder.glob("features-*"):
        if path.suffix == ".tmp" or (path.suffix == ".array_record" and path.stem not in complete):
            path.unlink()
    for path in folder.glob("skipped*.jsonl"):
        path.unlink()


def next_shard_number(folder: Path) -> int:
    """Return the number after the highest one of the complete shards in a folder."""
    return 1 + max(
        (int(path.stem.rpartition("-")[2]) for path in folder.glob("features-*.jsonl")), default=-1
    )


@dataclass
class _OpenShard:
    """A shard that is being written, under a temporary name."""

    draft: Path
    writer: ArrayRecordWriter
    begun: float  # `time.monotonic()`, seconds
    num_bytes: int = 0
    num_records: int = 0
    index_lines: list[str] = field(default_factory=list)


class ShardWriter:
    """Writes features into one shard after the other."""

    def __init__(self, folder: Path, numbers: Iterator[int], *, max_bytes: int, max_seconds: float):
        """Prepare to write; the first shard is opened by the first call of `add`.

        Args:
          folder: the folder of features, see `prepare_folder`.
          numbers: numbers of the shards, which no other shard or process uses.
          max_bytes: a shard of this size is finished.
          max_seconds: a shard that has been open this long is finished, as a killed run loses its open shard.
        """
        self._folder, self._numbers = folder, numbers
        self._max_bytes, self._max_seconds = max_bytes, max_seconds
        self._shard: _OpenShard | None = None

    def add(
        self,
        key: MediaKey,
        info: MediaInfo,
        selections: Mapping[int, FrameSelection],
        frames: np.ndarray,
        subtitles: Sequence[Subtitle] = (),
    ) -> None:
        """Write a media item.

        Args:
          key: the media item.
          info: header of its file.
          selections: its frames by limit; their `rows` are positions in `frames`.
          frames: features [n, (1 +) N, C].
          subtitles: subtitles to store with the features.

        Raises:
          RunError: if a file cannot be written.
        """
        if self._shard is None:
            self._shard = self._open_shard()
        shard = self._shard
        payloads = [frame.tobytes() for frame in frames]
        header = encode_header(key, selections, list(map(zlib.crc32, payloads)), subtitles)
        with _write_errors(shard.draft):
            for payload in (header, *payloads):
                shard.writer.write(payload)
        limits = tuple(sorted(selections))
        entry = IndexEntry("", shard.num_records, len(frames), limits, zlib.crc32(header), info)
        shard.index_lines.append(index_line(key, entry))
        shard.num_records += 1 + len(frames)
        shard.num_bytes += len(header) + sum(map(len, payloads))
        if shard.num_bytes >= self._max_bytes or time.monotonic() - shard.begun > self._max_seconds:
            self.finish()

    def finish(self) -> None:
        """Complete the open shard, if there is one.

        Raises:
          RunError: if a file cannot be written.
        """
        shard = self._shard
        if shard is None:
            return
        path = shard.draft.with_suffix("")
        index = path.with_suffix(".jsonl")
        index_draft = index.with_name(index.name + ".tmp")
        with _write_errors(shard.draft):
            shard.writer.close()
            _check_written(shard)
            head = {"shard": path.name, "bytes": shard.draft.stat().st_size}
            _flush_to_disk(shard.draft)
            os.replace(shard.draft, path)
            index_draft.write_text(json.dumps(head) + "\n" + "".join(shard.index_lines), encoding="utf-8")
            _flush_to_disk(index_draft)
            os.replace(index_draft, index)
        self._shard = None

    def _open_shard(self) -> _OpenShard:
        draft = self._folder / f"features-{next(self._numbers):06d}.array_record.tmp"
        with _write_errors(draft):
            return _OpenShard(draft, ArrayRecordWriter(str(draft), _WRITER_OPTIONS), time.monotonic())


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Raise RunError, with the name of the file, where writing it fails in the block."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: from ArrayRecord
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise RunError(
            f"{path} cannot be written ({reason}); check free space and permissions, then rerun the same "
            "command. Finished shards are kept."
        ) from None


def _check_written(shard: _OpenShard) -> None:
    """Check that a closed shard holds all its records; raise OSError otherwise."""
    reader = ArrayRecordReader(str(shard.draft))
    if not reader.ok() or reader.num_records() != shard.num_records:
        raise OSError("the file is incomplete")
    reader.close()


def _flush_to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk, so that a renamed file is complete even after a crash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
