"""Reads the frames of records, with a second attempt, a timeout and a cache."""

import copy
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import cachetools
import numpy as np

from dynfocus_jax.errors import MediaError, MediaTimeout
from dynfocus_jax.features.store import FeatureStore
from dynfocus_jax.media.frame_sampling import UNIFORM, Sampling, count_frames
from dynfocus_jax.media.subtitles import Subtitle, read_subtitles
from dynfocus_jax.media.timeouts import CallTimeout, call_with_timeout, timeout_error
from dynfocus_jax.media.video import Clip, MediaInfo, probe, read_media
from dynfocus_jax.records.records import Record

_Result = TypeVar("_Result")
_ClipKey = tuple[Path, str, tuple[float, float] | None, int]  # file, modality, span, limit


class MediaReader:
    """Reads the files of records as frames of one size. Safe to use from several threads.

    Attributes:
      size: height and width of the frames, in pixels.
      features: the stored features that are read in place of pixels, if any.
      blank: an empty frame of stored features, if these are read.
    """

    def __init__(
        self,
        size: int,
        *,
        sampling: Sampling = UNIFORM,
        layout: str = "crop",
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        timeout: float = 60.0,
        cache_bytes: int = 0,
        features: FeatureStore | None = None,
        blank: np.ndarray | None = None,
    ):
        """Create a reader.

        Args:
          size: see the attributes.
          sampling: the rule that chooses the frames of a video.
          layout, mean: conversion of other pictures to squares, see `read_media`.
          timeout: seconds for reading one file. A decoder that takes longer is abandoned, and its file is not
            read again.
          cache_bytes: size of the cache of decoded frames, which drops the least recently used. Frames that
            are drawn at random are not cached.
          features, blank: see the attributes.
        """
        self.size, self._sampling = size, sampling
        self.blank, self.features = blank, features
        self._options: dict[str, Any] = {"sampling": sampling, "layout": layout, "mean": tuple(mean)}
        self._timeout, self._cache_bytes = timeout, cache_bytes
        self._init_cache()

    def _init_cache(self) -> None:
        self._cache: cachetools.LRUCache[_ClipKey, Clip] = cachetools.LRUCache(self._cache_bytes, _num_bytes)
        self._timed_out: set[Path] = set()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, which starts with an empty cache."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_cache", "_timed_out", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_cache()

    def read(self, record: Record, limit: int, rng: np.random.Generator) -> Clip:
        """Return at most `limit` frames of a record's file.

        Raises:
          MediaError: if the file cannot be read in two attempts, or takes longer than the timeout.
        """
        path = _media_path(record)
        key = (path, record.modality, record.span, limit)
        with self._lock:
            clip = self._cache.get(key)
        if clip is None:  # decoded outside the lock, so two threads may occasionally read the same file
            clip = self._attempt(path, lambda: self._decode(record, limit, rng))
            if clip.frames.nbytes <= self._cache.maxsize and self._sampling.pick != "random":
                with self._lock:
                    self._cache[key] = clip
        return clip

    def _decode(self, record: Record, limit: int, rng: np.random.Generator) -> Clip:
        if self.features is not None:
            return self.features.read(record, limit)
        # A copy of `rng`, so that a second attempt draws the same frames, and an abandoned thread shares
        # nothing.
        options = self._options | {"rng": copy.deepcopy(rng), "timeout": self._timeout}
        return read_media(
            _media_path(record), limit, self.size, span=record.span, modality=record.modality, **options
        )

    def subtitles(self, record: Record) -> list[Subtitle]:
        """Return the subtitles of the record's own file, or else those stored with its features, or none.

        Raises:
          MediaError: as `read`.
        """
        own, features = record.subtitles, self.features
        if own is not None:
            return self._attempt(own, lambda: read_subtitles(own))
        if features is not None:
            return self._attempt(_media_path(record), lambda: features.subtitles(record))
        return []

    def info(self, path: Path) -> MediaInfo:
        """Return the header of a file, without decoding its frames.

        Raises:
          MediaError: as `read`.
        """
        read_info = probe if self.features is None else self.features.info
        return self._attempt(path, lambda: read_info(path))

    def count_frames(self, info: MediaInfo, record: Record, limit: int) -> int:
        """Return the number of frames that `read` returns for a record whose file has the header `info`."""
        return count_frames(info, self._sampling, limit, span=record.span)

    def _attempt(self, path: Path, read: Callable[[], _Result]) -> _Result:
        """Call `read` within the timeout, and once more if it fails."""
        try:
            return self._call_in_time(path, read)
        except MediaTimeout:
            raise
        except MediaError:
            return self._call_in_time(path, read)  # errors of a network file system may be temporary

    def _call_in_time(self, path: Path, read: Callable[[], _Result]) -> _Result:
        if path in self._timed_out:
            raise MediaTimeout(
                f"{path}: skipped, because reading it took more than {self._timeout:g} s before"
            )
        try:
            return call_with_timeout(read, self._timeout)
        except CallTimeout:
            self._timed_out.add(path)
            raise timeout_error(path, self._timeout) from None


def _num_bytes(clip: Clip) -> int:
    return clip.frames.nbytes


def _media_path(record: Record) -> Path:
    if record.media is None:
        raise ValueError(f"record {record.id} has no media file")
    return record.media
