"""List of the media that a configuration reads, and of the frames to extract from each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dynfocus_jax.data.budget import stage_buckets
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.errors import MediaError, UserError
from dynfocus_jax.features.movie_features import SUFFIX, Movie, read_movie
from dynfocus_jax.features.store import Entry, Key, Part, feature_dtype, feature_shape, key_of, limit_of
from dynfocus_jax.media.frame_sampling import Sampling, choose_frames
from dynfocus_jax.media.subtitles import Subtitle
from dynfocus_jax.media.video import MediaInfo
from dynfocus_jax.records.mixture import Mixture
from dynfocus_jax.records.records import Record, read_records
from dynfocus_jax.training.stage_data import stage_seed

HELD_OUT = "evaluation"  # what `--stage` calls the held-out questions
_PROBED = 64  # media that an estimate looks at


class Wanted(NamedTuple):
    """A medium, and the limits for which its frames are wanted."""

    record: Record  # one of those that it belongs to
    limits: tuple[int, ...]


class Looked(NamedTuple):
    """Frames of a medium that are to be stored."""

    info: MediaInfo
    parts: dict[int, Part]  # by limit
    frames: np.ndarray  # each different frame once: uint8 [n, H, W, 3], or features [n, (1 +) N, C]
    subtitles: Sequence[Subtitle] = ()

    @property
    def is_done(self) -> bool:
        """Whether the frames are features already."""
        return self.frames.ndim == 3


# ---- Which media ----------------------------------------------------------------------------------------


def frame_limits(config: ConfigDict, name: str | None = None) -> dict[str, set[int]]:
    """{stage: numbers of frames of its buckets}, the evaluation among the stages; `name` chooses one.

    Raises:
      UserError: there is no stage of that name.
    """
    limits = {stage.name: {frames for frames, _ in stage_buckets(stage)} for stage in config.stages}
    if config.evaluation.annotations is not None:
        limits[HELD_OUT] = {config.evaluation.media_frames}
    if name is None:
        return limits
    if name not in limits:
        raise UserError(f"--stage is {name!r}, expected one of {', '.join(limits)}.")
    return {name: limits[name]}


def wanted_media(config: ConfigDict, data_root: Path, name: str | None = None) -> dict[Key, Wanted]:
    """Every medium of the stages' records and of the evaluation's, or of what `name` chooses of them.

    Raises:
      UserError: annotations cannot be read.
    """
    limits = frame_limits(config, name)
    wanted: dict[Key, Wanted] = {}
    for index, stage in enumerate(config.stages):
        if stage.name in limits:
            records = Mixture(stage, data_root, stage_seed(config, index)).records
            _add(wanted, records, limits[stage.name], data_root)
    if HELD_OUT in limits:
        records = read_records(data_root / config.evaluation.annotations, data_root)
        _add(wanted, records, limits[HELD_OUT], data_root)
    return wanted


def movies_of(
    folder: Path, config: ConfigDict, data_root: Path, name: str | None = None
) -> dict[Key, Wanted]:
    """Every file of movie features in a folder, as a medium of all the stages.

    Raises:
      UserError: it is no folder, or there are none.
    """
    paths = sorted(path for path in folder.absolute().rglob(f"*{SUFFIX}") if path.is_file())
    if not paths:
        raise UserError(f"--movie_features is {str(folder)!r}, which is no folder with {SUFFIX} files in it.")
    wanted: dict[Key, Wanted] = {}
    for limits in frame_limits(config, name).values():
        _add(wanted, [Record(path.name, path, ()) for path in paths], limits, data_root)
    return wanted


def _add(wanted: dict[Key, Wanted], records: Sequence[Record], limits: set[int], data_root: Path) -> None:
    for record in records:
        if record.media is not None:
            key = key_of(record, data_root)
            first, before = wanted.get(key, Wanted(record, ()))
            wanted[key] = Wanted(first, _union(before, (limit_of(record, limit) for limit in limits)))


def remaining(wanted: Mapping[Key, Wanted], index: Mapping[Key, Entry]) -> list[tuple[Key, Wanted]]:
    """Return the media that the index lacks; one with only some of its limits comes back with all of them."""
    rest = []
    for key, (record, limits) in wanted.items():
        there = index[key].limits if key in index else ()
        if not set(limits) <= set(there):
            rest.append((key, Wanted(record, _union(there, limits))))
    return rest


def _union(some, others) -> tuple[int, ...]:
    return tuple(sorted({*some, *others}))


# ---- Which frames ---------------------------------------------------------------------------------------


class Looker:
    """Reads what is to be stored of media. Safe to use from several threads.

    media: reads pixels as training without features would; config: of that training.
    """

    def __init__(self, media: MediaReader, config: ConfigDict):
        self._media = media
        self._sampling = Sampling.from_config(config.data.sampling)
        self._shape, self._dtype = feature_shape(config), feature_dtype(config)

    def look(self, wanted: Wanted) -> Looked:
        """The frames of a medium for its limits.

        Raises:
          MediaError: it cannot be read.
        """
        record, limits = wanted
        if record.media.suffix == SUFFIX:
            return self._look_at_movie(read_movie(record.media), wanted)
        distinct: dict[bytes, int] = {}
        parts = {}
        for limit in limits:
            clip = self._media.read(record, limit, np.random.default_rng(0))
            rows = [distinct.setdefault(frame.tobytes(), len(distinct)) for frame in clip.frames]
            parts[limit] = Part(rows, clip.times.tolist(), clip.indices.tolist())
        frames = np.frombuffer(b"".join(distinct), np.uint8).reshape(-1, *clip.frames.shape[1:])
        return Looked(self._media.info(record.media), parts, frames)

    def _look_at_movie(self, movie: Movie, wanted: Wanted) -> Looked:
        """The same sampling, of the seconds that the record is about."""
        record, limits = wanted
        if movie.features.shape[1:] != self._shape:
            raise MediaError(
                f"{record.media}: its features have the shape {movie.features.shape[1:]}, but those of "
                f"config.model.vision {self._shape}; use it with the tower that it was made by"
            )
        begin, end = record.span or (0.0, float(len(movie.times)))
        first, last = np.searchsorted(movie.times, [np.floor(begin), end])
        if first >= last:
            raise MediaError(
                f"{record.media}: it lasts {len(movie.times)} s and the record wants {begin:g} to {end:g} s, "
                "correct the record"
            )
        times, sampling = movie.times[first:last], self._sampling
        chosen = {limit: first + choose_frames(times, times[-1] + 1, sampling, limit) for limit in limits}
        kept = np.unique(np.concatenate(list(chosen.values())))
        features = movie.features[kept].astype(np.float32)
        if not np.isfinite(features).all():
            raise MediaError(f"{record.media}: its features contain NaN or Inf, replace or remove it")
        parts = {
            limit: Part(np.searchsorted(kept, rows).tolist(), movie.times[rows].tolist(), rows.tolist())
            for limit, rows in chosen.items()
        }
        return Looked(_movie_info(movie), parts, features.astype(self._dtype), movie.subtitles)

    def frames(self, wanted: Wanted) -> int:
        """Return the largest number of frames that `look` may return; 0 for an unreadable medium."""
        record, limits = wanted
        try:
            if record.media.suffix == SUFFIX:
                info = _movie_info(read_movie(record.media))
            else:
                info = self._media.info(record.media)
        except MediaError:
            return 0
        each = (self._media.count(info, record, limit) for limit in limits)
        return min(sum(each), max(info.frames, 1))

    def estimate(self, work: Sequence[tuple[Key, Wanted]]) -> int:
        """Estimate the number of frames of all media from the headers of some."""
        chosen = np.random.default_rng(0).permutation(len(work))[:_PROBED]
        return round(sum(self.frames(work[i][1]) for i in chosen) * len(work) / max(1, len(chosen)))


def _movie_info(movie: Movie) -> MediaInfo:
    frames = len(movie.times)
    return MediaInfo("video", float(frames), frames, 1.0, 0, 0)
