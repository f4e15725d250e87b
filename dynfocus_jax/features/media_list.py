"""List of the media that a configuration reads, and of the frames to store from each."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dynfocus_jax.data.budget import stage_buckets
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.errors import MediaError, UserError
from dynfocus_jax.features.movie_features import SUFFIX, MovieFeatures, read_movie_features
from dynfocus_jax.features.store import (
    FrameSelection,
    IndexEntry,
    MediaKey,
    effective_limit,
    feature_dtype,
    feature_shape,
    media_key,
)
from dynfocus_jax.media.frame_sampling import Sampling, choose_frames
from dynfocus_jax.media.subtitles import Subtitle
from dynfocus_jax.media.video import MediaInfo
from dynfocus_jax.records.mixture import Mixture
from dynfocus_jax.records.records import Record
from dynfocus_jax.records.sources import read_records
from dynfocus_jax.training.stage_data import stage_seed

EVALUATION = "evaluation"  # name of the held-out questions for `--stage`
_PROBED_MEDIA = 64  # headers that an estimate reads


class MediaRequest(NamedTuple):
    """A media item, and the limits whose frames are to be stored."""

    record: Record  # one of the records of the media item
    path: Path  # its file
    limits: tuple[int, ...]  # ascending


class MediaFrames(NamedTuple):
    """The frames of a media item that are to be stored."""

    info: MediaInfo
    selections: dict[int, FrameSelection]  # by limit
    frames: np.ndarray  # distinct frames: uint8 [n, H, W, 3], or features [n, (1 +) N, C]
    subtitles: Sequence[Subtitle] = ()

    @property
    def are_features(self) -> bool:
        """Whether the frames are features already, not pixels."""
        return self.frames.ndim == 3


# ---- Media ----------------------------------------------------------------------------------------------


def frame_limits(config: ConfigDict, name: str | None = None) -> dict[str, set[int]]:
    """Return the limits (numbers of frames of the buckets) by stage, `EVALUATION` being one of the stages.

    Args:
      config: the configuration.
      name: the only stage to return; None is all.

    Raises:
      UserError: if there is no stage of that name.
    """
    limits = {stage.name: {frames for frames, _ in stage_buckets(stage)} for stage in config.stages}
    if config.evaluation.annotations is not None:
        limits[EVALUATION] = {config.evaluation.media_frames}
    if name is None:
        return limits
    if name not in limits:
        raise UserError(f"--stage is {name!r}, expected one of {', '.join(limits)}.")
    return {name: limits[name]}


def stage_requests(
    config: ConfigDict, data_root: Path, name: str | None = None
) -> dict[MediaKey, MediaRequest]:
    """Return the media of the records of the stages and the evaluation; `name` as in `frame_limits`.

    Raises:
      UserError: if annotations cannot be read.
    """
    limits = frame_limits(config, name)
    requests: dict[MediaKey, MediaRequest] = {}
    for index, stage in enumerate(config.stages):
        if stage.name in limits:
            records = Mixture(stage, data_root, stage_seed(config, index)).records
            _add_requests(requests, records, limits[stage.name], data_root)
    if EVALUATION in limits:
        records = read_records(data_root / config.evaluation.annotations, data_root)
        _add_requests(requests, records, limits[EVALUATION], data_root)
    return requests


def movie_requests(
    folder: Path, config: ConfigDict, data_root: Path, name: str | None = None
) -> dict[MediaKey, MediaRequest]:
    """Return the files of movie features in a folder, each requested for the limits of all stages.

    `name` as in `frame_limits`.

    Raises:
      UserError: if the folder does not exist or holds no such files.
    """
    paths = sorted(path for path in folder.absolute().rglob(f"*{SUFFIX}") if path.is_file())
    if not paths:
        raise UserError(f"--movie_features is {str(folder)!r}, expected a folder with {SUFFIX} files.")
    requests: dict[MediaKey, MediaRequest] = {}
    for limits in frame_limits(config, name).values():
        _add_requests(requests, [Record(path.name, path, ()) for path in paths], limits, data_root)
    return requests


def _add_requests(
    requests: dict[MediaKey, MediaRequest], records: Sequence[Record], limits: set[int], data_root: Path
) -> None:
    """Request the media of records; one that is requested already is requested for more limits."""
    for record in records:
        if record.media is not None:
            key = media_key(record, data_root)
            request = requests.get(key, MediaRequest(record, record.media, ()))
            more = (effective_limit(record, limit) for limit in limits)
            requests[key] = request._replace(limits=_union(request.limits, more))


def missing_requests(
    requests: Mapping[MediaKey, MediaRequest], index: Mapping[MediaKey, IndexEntry]
) -> list[tuple[MediaKey, MediaRequest]]:
    """Return the requests that an index does not satisfy.

    A media item that lacks one of its limits is requested for all of them, including the limits that the
    index has, as its new entry replaces the old one.
    """
    missing = []
    for key, request in requests.items():
        stored = index[key].limits if key in index else ()
        if not set(request.limits) <= set(stored):
            missing.append((key, request._replace(limits=_union(stored, request.limits))))
    return missing


def _union(limits: Iterable[int], others: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({*limits, *others}))


# ---- Frames ---------------------------------------------------------------------------------------------


class FrameReader:
    """Reads the frames of media that are to be stored. Safe to use from several threads."""

    def __init__(self, media: MediaReader, config: ConfigDict):
        """Create a reader.

        Args:
          media: reads pixels, as training without stored features does.
          config: the configuration of that training.
        """
        self._media = media
        self._sampling = Sampling.from_config(config.data.sampling)
        self._shape, self._dtype = feature_shape(config), feature_dtype(config)

    def read(self, request: MediaRequest) -> MediaFrames:
        """Return the distinct frames of a media item for its limits.

        Raises:
          MediaError: if the file cannot be read.
        """
        if request.path.suffix == SUFFIX:
            return self._select_movie_frames(read_movie_features(request.path), request)
        distinct: dict[bytes, int] = {}  # pixels -> position
        shape: tuple[int, ...] = ()
        selections = {}
        for limit in request.limits:
            clip = self._media.read(request.record, limit, np.random.default_rng(0))
            rows = [distinct.setdefault(frame.tobytes(), len(distinct)) for frame in clip.frames]
            selections[limit] = FrameSelection(rows, clip.times.tolist(), clip.indices.tolist())
            shape = clip.frames.shape[1:]
        frames = np.frombuffer(b"".join(distinct), np.uint8).reshape(-1, *shape)
        return MediaFrames(self._media.info(request.path), selections, frames)

    def _select_movie_frames(self, movie: MovieFeatures, request: MediaRequest) -> MediaFrames:
        """Sample the frames of movie features as those of a video, within the record's span."""
        if movie.features.shape[1:] != self._shape:
            raise MediaError(
                f"{request.path}: its features have shape {movie.features.shape[1:]}, expected {self._shape} "
                "as in config.model.vision; set config.model.vision to the tower that computed them."
            )
        begin, end = request.record.span or (0.0, float(len(movie.times)))
        first, last = np.searchsorted(movie.times, [np.floor(begin), end])
        if first >= last:
            raise MediaError(
                f"{request.path}: the record's span is {begin:g} to {end:g} s, but the movie lasts "
                f"{len(movie.times)} s; correct the record."
            )
        times, sampling = movie.times[first:last], self._sampling
        chosen = {
            limit: first + choose_frames(times, times[-1] + 1, sampling, limit) for limit in request.limits
        }
        stored = np.unique(np.concatenate(list(chosen.values())))
        features = movie.features[stored].astype(np.float32)
        if not np.isfinite(features).all():
            raise MediaError(f"{request.path}: its features contain NaN or Inf; replace or remove it.")
        selections = {
            limit: FrameSelection(
                np.searchsorted(stored, rows).tolist(), movie.times[rows].tolist(), rows.tolist()
            )
            for limit, rows in chosen.items()
        }
        return MediaFrames(_movie_info(movie), selections, features.astype(self._dtype), movie.subtitles)

    def max_frames(self, request: MediaRequest) -> int:
        """Return the largest number of frames that `read` may return; 0 for an unreadable file."""
        try:
            if request.path.suffix == SUFFIX:
                info = _movie_info(read_movie_features(request.path))
            else:
                info = self._media.info(request.path)
        except MediaError:
            return 0
        counts = (self._media.count_frames(info, request.record, limit) for limit in request.limits)
        return min(sum(counts), max(info.frames, 1))

    def estimate_frames(self, work: Sequence[tuple[MediaKey, MediaRequest]]) -> int:
        """Estimate the number of frames of all media from the headers of some, chosen at random."""
        chosen = np.random.default_rng(0).permutation(len(work))[:_PROBED_MEDIA]
        probed = sum(self.max_frames(work[i][1]) for i in chosen)
        return round(probed * len(work) / max(1, len(chosen)))


def _movie_info(movie: MovieFeatures) -> MediaInfo:
    """Return the media header of movie features, which have one frame per second."""
    frames = len(movie.times)
    return MediaInfo("video", float(frames), frames, 1.0, 0, 0)
