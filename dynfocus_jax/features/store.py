"""Features of the frozen vision tower on disk, read in place of pixels.

A folder of features has

- `description.json`: of which tower, in which dtype, of frames chosen and prepared how;
- `features-NUMBER.array_record`, shards: of each medium a header and behind it its frames, a record each;
- `features-NUMBER.jsonl`, the shard's index, written when the shard is whole: its size, then a line for each
  medium with its place, its frames and a checksum. A shard without it is unfinished;
- `skipped.jsonl`: media that could not be read, with the reason.

The frames of a medium are those that reading it gives for every limit that was asked for (the numbers of
frames of the stages' buckets), each different one once. So a sample has the frames that it would have had.
"""

import json
import threading
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
_FORMAT = 1  # of the folder; another one whenever the same settings give other features
_SPEED = ("remat", "attention")  # fields of the tower that only concern speed and memory
_OPEN_SHARDS = 64
_READER = {"options": "readahead_buffer_size:0,max_parallelism:0", "file_reader_buffer_size": 2**15}


# ---- Which features -------------------------------------------------------------------------------------


def check_storable(config: ConfigDict) -> None:
    """Check that the frames of a configuration are known before training; raise UserError otherwise.

    Raises:
      UserError: they are drawn at random, or as many as the text leaves room for.
    """
    sampling = config.data.sampling
    if sampling.kind == "segments" and sampling.pick == "random":
        raise UserError(
            "config.data.sampling.pick is 'random', so the frames change every epoch and features "
            "cannot be stored; set it to 'middle'."
        )
    for index, stage in enumerate(config.stages):
        if stage.on_overflow == "fewer_frames":
            raise UserError(
                f"config.stages[{index}].on_overflow is 'fewer_frames', so the frames of a sample depend on "
                "its text, but features are stored for whole buckets; choose 'drop_turns' or 'error'."
            )


def feature_dtype(config: ConfigDict) -> np.dtype:
    """Return the dtype of stored features: that of the vision tower's output, bfloat16 by default."""
    return np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(config.model.dtype, config.model.dtype))


def feature_shape(config: ConfigDict) -> tuple[int, int]:
    """Return the shape of a frame's features: tokens (the class token first, if there is one) and width."""
    vision = config.model.vision
    return (vision.image_size // vision.patch_size) ** 2 + vision.cls_token, vision.width


def blank_frame(config: ConfigDict) -> np.ndarray | None:
    """A frame without content as `padding_sample` takes it; None where frames are pixels."""
    return None if config.data.features is None else np.zeros(feature_shape(config), feature_dtype(config))


def describe(config: ConfigDict) -> dict:
    """Return the settings that features depend on, apart from the tower's weights, as JSON-able values."""
    vision = to_dict(config.model.vision)
    return {
        "format": _FORMAT,
        "dtype": config.model.dtype,
        "vision": {key: value for key, value in vision.items() if key not in _SPEED},
        "sampling": to_dict(config.data.sampling),
        "image_layout": config.data.image_layout,
    }


def read_description(folder: Path) -> dict | None:
    """Return the description in a folder, with "weights" and "code"; None if there is no such folder."""
    try:
        return json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{folder / DESCRIPTION} is damaged ({error}); restore it, or extract into another folder."
        ) from None


def unlike(described: Mapping, wanted: Mapping) -> list[str]:
    """List the fields in which a description differs from `wanted`."""
    return differences({key: described.get(key) for key in wanted}, dict(wanted), ("there", "here"))


# ---- Where they are -------------------------------------------------------------------------------------


class Key(NamedTuple):
    """Identity of a medium whose features are stored."""

    media: str  # path, relative to the data's root where it lies below it
    modality: str  # "image" | "video": a GIF can be read as either
    span: tuple[float, float] | None  # seconds of the file; None is all


class Entry(NamedTuple):
    """Location of a medium's features."""

    shard: str  # name of the file
    record: int  # of the header; the frames come behind it
    frames: int
    limits: tuple[int, ...]  # numbers of frames for which it is known which ones they are
    checksum: int  # CRC-32 of the header
    info: MediaInfo


class Part(NamedTuple):
    """The frames of a medium for one limit."""

    rows: list[int]  # of the kept frames
    times: list[float]  # and `indices` as in `Clip`
    indices: list[int]


def key_of(record: Record, root: Path) -> Key:
    """The key of a record's medium; root: of the data."""
    path, root = str(record.media), str(Path(root).absolute()).rstrip("/") + "/"
    return Key(path.removeprefix(root), record.modality, record.span)


def limit_of(record: Record, limit: int) -> int:
    """An image has its one frame whatever the limit."""
    return 1 if record.modality == "image" else limit


def read_index(folder: Path) -> dict[Key, Entry]:
    """All media of the finished shards; of what was extracted twice, the later one.

    Raises:
      UserError: an index is damaged, or its shard is missing or cut.
    """
    entries = {}
    for path in sorted(folder.glob("features-*.jsonl")):
        try:
            shard, *media = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            for line in media:
                span = line["span"] and tuple(line["span"])
                key = Key(line["media"], line["modality"], span)
                entries[key] = Entry(
                    shard["shard"],
                    line["record"],
                    line["frames"],
                    tuple(line["limits"]),
                    line["checksum"],
                    MediaInfo(*line["info"]),
                )
            size = shard["bytes"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({error!r}); delete it and extract again what it lists."
            ) from None
        file = path.with_suffix(".array_record")
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise UserError(
                f"{file} {'is missing' if found is None else f'has {found} bytes'}, expected {size} bytes; "
                f"copy it again, or delete {path.name} and extract again what it lists."
            )
    return entries


def as_line(key: Key, entry: Entry) -> str:
    """A line of a shard's index."""
    fields = {"media": key.media, "modality": key.modality, "span": key.span}
    rest = {name: value for name, value in entry._asdict().items() if name != "shard"}
    return json.dumps(fields | rest) + "\n"


def as_header(
    key: Key, parts: Mapping[int, Part], checksums: Sequence[int], subtitles: Sequence[Subtitle]
) -> bytes:
    """The record before the frames of a medium."""
    clips = {str(limit): part._asdict() for limit, part in parts.items()}
    fields = {"key": key, "clips": clips, "checksums": checksums, "subtitles": subtitles}
    return json.dumps(fields).encode()


# ---- Reading --------------------------------------------------------------------------------------------


class FeatureStore:
    """Reads features as clips. Safe to use from several threads, and after a journey to another process.

    Args:
      folder: that `python -m dynfocus_jax.extract` wrote.
      data_root: folder of annotations and media, as it was named then or elsewhere.
      config: for which the features have to be right.

    Attributes:
      weights: digest of the tower's parameters; None where all features were given as such.
      code: version of the code that began the folder.

    Raises:
      UserError: there are none, they are of another tower or frames, or files are damaged or missing.
    """

    def __init__(self, folder: Path, data_root: Path, config: ConfigDict):
        self.folder, self._root = folder, Path(data_root).absolute()
        described = read_description(folder)
        if described is None:
            raise UserError(
                f"config.data.features is {str(folder)!r}, which holds no {DESCRIPTION}; make it with python "
                "-m dynfocus_jax.extract --config=FILE --output=DIR."
            )
        changed = unlike(described, describe(config))
        if changed:
            raise UserError(
                f"config.data.features is {str(folder)!r}, whose features differ from this configuration's "
                f"({'; '.join(changed[:5])}); restore these settings, or extract into another "
                "folder."
            )
        self.weights, self.code = described["weights"], described["code"]
        self._shape, self._dtype = feature_shape(config), feature_dtype(config)
        self._entries = read_index(folder)
        self._infos = {key.media: entry.info for key, entry in self._entries.items()}
        self._start_empty()

    def _start_empty(self) -> None:
        self._readers = cachetools.LRUCache(_OPEN_SHARDS)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start_empty()

    def read(self, record: Record, limit: int) -> Clip:
        """The clip that `read_media` gives for the limit, with features in place of pixels.

        Raises:
          MediaError: they were not extracted, or what is in the file is not what was written.
        """
        entry = self._entry(record)
        header = self._header(entry)
        part = header["clips"].get(str(limit_of(record, limit)))
        if part is None:
            raise MediaError(f"{record.media}: {self._lacks(entry, limit)}")
        rows = part["rows"]
        frames = self._records(entry.shard, [entry.record + 1 + row for row in rows])
        for row, frame in zip(rows, frames, strict=True):
            if zlib.crc32(frame) != header["checksums"][row]:
                raise self._damaged(entry.shard, f"frame {row} of {record.media} has another checksum")
        pictures = np.stack([np.frombuffer(frame, self._dtype).reshape(self._shape) for frame in frames])
        return Clip(pictures, np.asarray(part["times"], np.float64), np.asarray(part["indices"], np.int32))

    def subtitles(self, record: Record) -> list[Subtitle]:
        """Return the subtitles stored with the features.

        Raises:
          MediaError: as `read`.
        """
        return [Subtitle(*each) for each in self._header(self._entry(record))["subtitles"]]

    def info(self, path: Path) -> MediaInfo:
        """Return the stored header of a file; raise MediaError if it was not extracted."""
        info = self._infos.get(key_of(Record("", path, ()), self._root).media)
        if info is None:
            raise MediaError(self._nothing(path))
        return info

    def missing(self, record: Record, limits: Iterable[int]) -> str | None:
        """Return the reason why a record cannot be read with all limits; None if it can."""
        try:
            entry = self._entry(record)
        except MediaError as error:
            return str(error)
        lacking = [limit for limit in limits if limit_of(record, limit) not in entry.limits]
        return f"{record.media}: {self._lacks(entry, lacking[0])}" if lacking else None

    def require(self, records: Iterable[Record], limits: Collection[int], max_share: float) -> None:
        """Check that all but a few records can be read with all limits; raise UserError otherwise.

        Raises:
          UserError: more than `max_share` of them cannot.
        """
        wanted = [record for record in records if record.media is not None]
        reasons = [reason for record in wanted if (reason := self.missing(record, limits))]
        if len(reasons) > max_share * len(wanted):
            raise UserError(
                f"{len(reasons)} of {len(wanted)} records have no features, more than the allowed share of "
                f"{max_share}; the first: {reasons[0]}"
            )

    def _entry(self, record: Record) -> Entry:
        entry = self._entries.get(key_of(record, self._root))
        if entry is None:
            raise MediaError(self._nothing(record.media))
        return entry

    def _nothing(self, path: Path) -> str:
        return (
            f"{path}: {self.folder} has no features of it, see its skipped.jsonl, or run extract again with "
            "this configuration"
        )

    def _lacks(self, entry: Entry, limit: int) -> str:
        kept = ", ".join(map(str, entry.limits))
        return (
            f"{self.folder} has its features for {kept} frames, not for {limit}; run extract again with this "
            "configuration"
        )

    def _header(self, entry: Entry) -> dict:
        (header,) = self._records(entry.shard, [entry.record])
        if zlib.crc32(header) != entry.checksum:
            raise self._damaged(entry.shard, f"record {entry.record} has another checksum")
        return json.loads(header)

    def _records(self, shard: str, numbers: list[int]) -> list[bytes]:
        try:
            return self._reader(shard).read(numbers)
        except (IndexError, RuntimeError) as error:
            raise self._damaged(shard, " ".join(str(error).split())) from None

    def _reader(self, shard: str) -> ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                reader = ArrayRecordReader(str(self.folder / shard), **_READER)
                if not reader.ok():  # a missing file raises nothing
                    raise self._damaged(shard, "it cannot be opened")
                self._readers[shard] = reader
            return self._readers[shard]

    def _damaged(self, shard: str, what: str) -> MediaError:
        index = Path(shard).with_suffix(".jsonl")
        return MediaError(
            f"{self.folder / shard}: {what}; copy it again, or delete {index} and extract again what it lists"
        )


def open_features(config: ConfigDict, data_root: Path) -> FeatureStore | None:
    """The features that a configuration reads in place of pixels; None where it reads pixels.

    Raises:
      UserError: see `FeatureStore`.
    """
    if config.data.features is None:
        return None
    return FeatureStore(Path(config.data.features).expanduser(), data_root, config)
