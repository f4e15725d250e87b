"""Features of the frozen vision tower on disk, read in place of pixels.

A media item is a file, or a span of it, read as an image or as a video. A folder of features holds:

- `description.json`: the vision tower, the dtype, and the settings by which frames are chosen and prepared;
- `features-NUMBER.array_record`, a shard: for each media item a header record, then a record per frame;
- `features-NUMBER.jsonl`, the index of the shard, written once the shard is complete: its size, then a line
  per media item with its position, number of frames and checksum. A shard without an index is unfinished;
- `skipped.jsonl`: media that could not be read, with the reason.

The number of frames of a bucket is called a limit. For each limit that a stage asks for, a media item has the
frames that reading the file with this limit returns; a frame that occurs more than once is stored once. A
sample therefore has the same frames as without stored features.
"""

import json
import threading
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cachetools
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from ml_collections import ConfigDict

from dynfocus_jax.errors import MediaError, UserError
from dynfocus_jax.media.subtitles import Subtitle
from dynfocus_jax.media.video import Clip, MediaInfo
from dynfocus_jax.records.records import Record
from dynfocus_jax.sections import differences, to_dict

DESCRIPTION = "description.json"
_FORMAT = 1  # of the folder; to be raised when the same settings give other features
_SPEED_FIELDS = ("remat", "attention")  # fields of the vision tower that affect speed and memory only
_OPEN_SHARDS = 64
_READER_OPTIONS = {
    "options": "readahead_buffer_size:0,max_parallelism:0",
    "file_reader_buffer_size": 2**15,  # bytes
}


# ---- Settings -------------------------------------------------------------------------------------------


def check_storable(config: ConfigDict) -> None:
    """Check that a configuration determines the frames of each media item before training.

    Raises:
      UserError: if frames are drawn at random, or their number depends on the length of the text.
    """
    sampling = config.data.sampling
    if sampling.kind == "segments" and sampling.pick == "random":
        raise UserError(
            "config.data.sampling.pick is 'random', so the frames change every epoch, but stored "
            "features are fixed; set it to 'middle'."
        )
    for index, stage in enumerate(config.stages):
        if stage.on_overflow == "fewer_frames":
            raise UserError(
                f"config.stages[{index}].on_overflow is 'fewer_frames', so the frames of a sample depend on "
                "its text, but features are stored for whole buckets; set it to 'drop_turns' or 'error'."
            )


def feature_dtype(config: ConfigDict) -> np.dtype:
    """Return the dtype of stored features: that of the vision tower's output, bfloat16 by default."""
    return np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(config.model.dtype, config.model.dtype))


def feature_shape(config: ConfigDict) -> tuple[int, int]:
    """Return the shape of a frame's features: tokens (the class token first, if there is one) and width."""
    vision = config.model.vision
    return (vision.image_size // vision.patch_size) ** 2 + vision.cls_token, vision.width


def blank_frame(config: ConfigDict) -> np.ndarray | None:
    """Return the features of an empty frame, for `padding_sample`; None if frames are pixels."""
    return None if config.data.features is None else np.zeros(feature_shape(config), feature_dtype(config))


def describe_features(config: ConfigDict) -> dict[str, Any]:
    """Return the settings that features depend on, apart from the tower's weights, as JSON values."""
    vision = to_dict(config.model.vision)
    return {
        "format": _FORMAT,
        "dtype": config.model.dtype,
        "vision": {key: value for key, value in vision.items() if key not in _SPEED_FIELDS},
        "sampling": to_dict(config.data.sampling),
        "image_layout": config.data.image_layout,
    }


def read_description(folder: Path) -> dict[str, Any] | None:
    """Return the description of a folder, with "weights" and "code"; None if the folder has none.

    Raises:
      UserError: if the file is damaged.
    """
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        problem = None if isinstance(description, dict) else "it is not a JSON object"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        problem = str(error)
    if problem is None and not {"weights", "code"} <= description.keys():
        problem = "it lacks 'weights' or 'code'"
    if problem is not None:
        raise UserError(f"{path} is damaged ({problem}); restore it, or extract into another folder.")
    return description


def description_differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """List the fields of `expected` that have another value in the description of a folder."""
    return differences({key: found.get(key) for key in expected}, dict(expected), ("stored", "now"))


# ---- Index ----------------------------------------------------------------------------------------------


class MediaKey(NamedTuple):
    """Identity of a media item."""

    media: str  # path of the file, relative to the data root if it is inside
    modality: str  # "image" | "video": a GIF can be read as either
    span: tuple[float, float] | None  # seconds of the file; None is all of it


class IndexEntry(NamedTuple):
    """Location of the features of a media item."""

    shard: str  # name of the file
    record: int  # position of the header in the shard; the frames follow it
    frames: int  # number of stored frames
    limits: tuple[int, ...]  # limits whose frames are stored
    checksum: int  # CRC-32 of the header
    info: MediaInfo


class FrameSelection(NamedTuple):
    """Frames of a media item for one limit."""

    rows: list[int]  # positions among the stored frames
    times: list[float]  # seconds, as in `Clip`
    indices: list[int]  # positions in the file, as in `Clip`


def media_key(record: Record, data_root: Path) -> MediaKey:
    """Return the key of a record's media item."""
    prefix = str(Path(data_root).absolute()).rstrip("/") + "/"
    return MediaKey(str(record.media).removeprefix(prefix), record.modality, record.span)


def effective_limit(record: Record, limit: int) -> int:
    """Return the limit under which the frames of a record are stored: 1 for an image, which has one frame."""
    return 1 if record.modality == "image" else limit


def read_index(folder: Path) -> dict[MediaKey, IndexEntry]:
    """Return the media of all complete shards; for one that was extracted twice, the later entry.

    Raises:
      UserError: if an index is damaged, or its shard is missing or incomplete.
    """
    entries = {}
    for path in sorted(folder.glob("features-*.jsonl")):
        try:
            head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            for line in lines:
                span = line["span"] and tuple(line["span"])
                entries[MediaKey(line["media"], line["modality"], span)] = IndexEntry(
                    head["shard"],
                    line["record"],
                    line["frames"],
                    tuple(line["limits"]),
                    line["checksum"],
                    MediaInfo(*line["info"]),
                )
            expected = head["bytes"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({error!r}); remove it, and rerun extract for its media."
            ) from None
        shard = path.with_suffix(".array_record")
        found = shard.stat().st_size if shard.is_file() else None
        if found != expected:
            raise UserError(
                f"{shard} {'is missing' if found is None else f'has {found} bytes'}, expected {expected} "
                f"bytes; copy it again, or remove {path.name} and rerun extract for its media."
            )
    return entries


def index_line(key: MediaKey, entry: IndexEntry) -> str:
    """Return the line of a media item in the index of its shard."""
    fields = {"media": key.media, "modality": key.modality, "span": key.span}
    rest = {name: value for name, value in entry._asdict().items() if name != "shard"}
    return json.dumps(fields | rest) + "\n"


def encode_header(
    key: MediaKey,
    selections: Mapping[int, FrameSelection],
    checksums: Sequence[int],
    subtitles: Sequence[Subtitle],
) -> bytes:
    """Return the record that precedes the frames of a media item.

    Args:
      key: the media item.
      selections: its frames by limit.
      checksums: CRC-32 of each stored frame.
      subtitles: the subtitles that came with the features.
    """
    clips = {str(limit): selection._asdict() for limit, selection in selections.items()}
    fields = {"key": key, "clips": clips, "checksums": checksums, "subtitles": subtitles}
    return json.dumps(fields).encode()


# ---- Reading --------------------------------------------------------------------------------------------


class FeatureStore:
    """Reads stored features as clips. Safe to use from several threads, and can be sent to another process.

    Attributes:
      folder: the folder of features.
      weights_digest: digest of the vision tower's parameters; None if no tower computed the features.
      code: version of the code that wrote the folder's description.
    """

    def __init__(self, folder: Path, data_root: Path, config: ConfigDict):
        """Open a folder of features.

        Args:
          folder: the folder, written by `python -m dynfocus_jax.extract`.
          data_root: the folder of annotations and media, which may have moved since the extraction.
          config: the configuration that the features are for.

        Raises:
          UserError: if there are no features, if they are of another vision tower or other frames, or if
            files are damaged or missing.
        """
        self.folder, self._root = folder, Path(data_root).absolute()
        description = read_description(folder)
        if description is None:
            raise UserError(
                f"config.data.features is {str(folder)!r}, which has no {DESCRIPTION}; check the path, or "
                "extract the features with python -m dynfocus_jax.extract --config=FILE --output=DIR."
            )
        changed = description_differences(description, describe_features(config))
        if changed:
            raise UserError(
                f"config.data.features is {str(folder)!r}, whose features differ from this configuration's "
                f"({'; '.join(changed[:5])}); restore these settings, or extract into another folder."
            )
        self.weights_digest, self.code = description["weights"], description["code"]
        self._shape, self._dtype = feature_shape(config), feature_dtype(config)
        self._entries = read_index(folder)
        self._infos = {key.media: entry.info for key, entry in self._entries.items()}
        self._init_readers()

    def _init_readers(self) -> None:
        self._readers: cachetools.LRUCache[str, ArrayRecordReader] = cachetools.LRUCache(_OPEN_SHARDS)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_readers()

    def read(self, record: Record, limit: int) -> Clip:
        """Return the clip that `read_media` returns for a limit, with features in place of pixels.

        Raises:
          MediaError: if the frames were not extracted, or the stored data is damaged.
        """
        entry = self._entry(record)
        header = self._header(entry)
        selection = header["clips"].get(str(effective_limit(record, limit)))
        if selection is None:
            raise MediaError(f"{record.media}: {self._limit_missing(entry, limit)}")
        rows = selection["rows"]
        frames = self._read_records(entry.shard, [entry.record + 1 + row for row in rows])
        for row, frame in zip(rows, frames, strict=True):
            if zlib.crc32(frame) != header["checksums"][row]:
                raise self._damaged(entry.shard, f"frame {row} of {record.media} has another checksum")
        features = np.stack([np.frombuffer(frame, self._dtype).reshape(self._shape) for frame in frames])
        times, indices = selection["times"], selection["indices"]
        return Clip(features, np.asarray(times, np.float64), np.asarray(indices, np.int32))

    def subtitles(self, record: Record) -> list[Subtitle]:
        """Return the subtitles stored with the features of a record's media item.

        Raises:
          MediaError: if the features were not extracted, or the stored data is damaged.
        """
        return [Subtitle(*each) for each in self._header(self._entry(record))["subtitles"]]

    def info(self, path: Path) -> MediaInfo:
        """Return the stored media header of a file.

        Raises:
          MediaError: if no features of the file were extracted.
        """
        info = self._infos.get(media_key(Record("", path, ()), self._root).media)
        if info is None:
            raise self._not_extracted(path)
        return info

    def missing_reason(self, record: Record, limits: Iterable[int]) -> str | None:
        """Return the reason why a record cannot be read with all limits; None if it can."""
        try:
            entry = self._entry(record)
        except MediaError as error:
            return str(error)
        missing = [limit for limit in limits if effective_limit(record, limit) not in entry.limits]
        return f"{record.media}: {self._limit_missing(entry, missing[0])}" if missing else None

    def check_coverage(self, records: Iterable[Record], limits: Collection[int], max_share: float) -> None:
        """Check that records can be read with all limits.

        Args:
          records: the records; those without media are ignored.
          limits: numbers of frames.
          max_share: share of the records that may lack features.

        Raises:
          UserError: if more of them do.
        """
        with_media = [record for record in records if record.media is not None]
        reasons = [reason for record in with_media if (reason := self.missing_reason(record, limits))]
        if len(reasons) > max_share * len(with_media):
            raise UserError(
                f"{len(reasons)} of {len(with_media)} records have no features, more than "
                f"config.data.max_skip_share = {max_share} allows. The first is {reasons[0]}"
            )

    def _entry(self, record: Record) -> IndexEntry:
        entry = self._entries.get(media_key(record, self._root))
        if entry is None:
            raise self._not_extracted(record.media)
        return entry

    def _not_extracted(self, path: Path | None) -> MediaError:
        return MediaError(
            f"{path}: {self.folder} has no features of it; check its skipped.jsonl for the reason, or rerun "
            "extract with this configuration."
        )

    def _limit_missing(self, entry: IndexEntry, limit: int) -> str:
        stored = ", ".join(map(str, entry.limits))
        return (
            f"{self.folder} has its features for {stored} frames, not for {limit}; rerun extract with this "
            "configuration."
        )

    def _header(self, entry: IndexEntry) -> dict[str, Any]:
        (header,) = self._read_records(entry.shard, [entry.record])
        if zlib.crc32(header) != entry.checksum:
            raise self._damaged(entry.shard, f"record {entry.record} has another checksum")
        return json.loads(header)

    def _read_records(self, shard: str, numbers: list[int]) -> list[bytes]:
        try:
            return self._reader(shard).read(numbers)
        except (IndexError, RuntimeError) as error:
            raise self._damaged(shard, " ".join(str(error).split())) from None

    def _reader(self, shard: str) -> ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                reader = ArrayRecordReader(str(self.folder / shard), **_READER_OPTIONS)
                if not reader.ok():  # the constructor raises nothing for a missing file
                    raise self._damaged(shard, "it cannot be opened")
                self._readers[shard] = reader
            return self._readers[shard]

    def _damaged(self, shard: str, problem: str) -> MediaError:
        index = Path(shard).with_suffix(".jsonl")
        return MediaError(
            f"{self.folder / shard}: {problem}; copy it again, or remove {index} and rerun extract for its "
            "media."
        )


def open_features(config: ConfigDict, data_root: Path) -> FeatureStore | None:
    """Return the features that a configuration reads in place of pixels; None if it reads pixels.

    Raises:
      UserError: if the features cannot be used, see `FeatureStore`.
    """
    if config.data.features is None:
        return None
    return FeatureStore(Path(config.data.features).expanduser(), data_root, config)
