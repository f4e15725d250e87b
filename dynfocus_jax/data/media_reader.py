"""The frames of a record: read once more when that fails, given up when it takes too long, kept in memory."""

import copy
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cachetools
import numpy as np

from dynfocus_jax.errors import MediaError, MediaTimeout
from dynfocus_jax.features.store import FeatureStore
from dynfocus_jax.media.frame_sampling import UNIFORM, Sampling, count_frames
from dynfocus_jax.media.subtitles import Subtitle, read_subtitles
from dynfocus_jax.media.timeouts import CallTimeout, call_with_timeout, timeout_error
from dynfocus_jax.media.video import Clip, MediaInfo, probe, read_media
from dynfocus_jax.records.records import Record


class MediaReader:
    """Reads the files of records as frames of one size.

    size: H = W of the frames; sampling: which frames of a video; layout, mean: how an image that is no square
      becomes one, see `read_media`.
    timeout: seconds for one file; a decoder that hangs longer is left alone, and its file is not tried again.
    cache_bytes: decoded frames kept in memory, the least recently used dropped first. Of a sampling with
      random frames none are kept.
    features: where the vision tower's features are read from in place of pixels; blank: a frame without
      content then.

    Safe to use from several threads.
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
        self.size, self._sampling = size, sampling
        self.blank, self.features = blank, features
        self._options = {"sampling": sampling, "layout": layout, "mean": tuple(mean)}
        self._timeout, self._cache_bytes = timeout, cache_bytes
        self._start_empty()

    def _start_empty(self) -> None:
        self._cache = cachetools.LRUCache(self._cache_bytes, getsizeof=lambda clip: clip.frames.nbytes)
        self._hung: set[Path] = set()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        """For another process: what is kept in memory stays here."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_cache", "_hung", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start_empty()

    def read(self, record: Record, limit: int, rng: np.random.Generator) -> Clip:
        """At most `limit` frames of a record that has a file.

        Raises:
          MediaError: the file cannot be read, for the second time, or not in time.
        """
        key = (record.media, record.modality, record.span, limit)
        with self._lock:
            clip = self._cache.get(key)
        if clip is None:  # decoded outside the lock: two threads may, rarely, read one file twice

            def read() -> Clip:
                if self.features is not None:
                    return self.features.read(record, limit)
                # A copy of `rng`, for the same frames the second time, and as a thread may be left with it.
                options = self._options | {"rng": copy.deepcopy(rng), "timeout": self._timeout}
                about = {"span": record.span, "modality": record.modality}
                return read_media(record.media, limit, self.size, **about, **options)

            clip = self._attempt(record.media, read)
            if clip.frames.nbytes <= self._cache.maxsize and self._sampling.pick != "random":
                with self._lock:
                    self._cache[key] = clip
        return clip

    def subtitles(self, record: Record) -> list[Subtitle]:
        """Return the subtitles of the record's own file, or those stored with its features, or none.

        Raises:
          MediaError: as `read`.
        """
        if record.subtitles is not None:
            return self._attempt(record.subtitles, lambda: read_subtitles(record.subtitles))
        if self.features is not None:
            return self._attempt(record.media, lambda: self.features.subtitles(record))
        return []

    def info(self, path: Path) -> MediaInfo:
        """Return the header of a file, without decoding it.

        Raises:
          MediaError: as `read`.
        """
        look = probe if self.features is None else self.features.info
        return self._attempt(path, lambda: look(path))

    def count(self, info: MediaInfo, record: Record, limit: int) -> int:
        """Return the number of frames that `read` returns for a record whose file has the header `info`."""
        return count_frames(info, self._sampling, limit, span=record.span)

    def _attempt(self, path: Path, read: Callable[[], Any]) -> Any:
        try:
            return self._in_time(path, read)
        except MediaTimeout:
            raise
        except MediaError:
            return self._in_time(path, read)  # a network file system may have had a bad moment

    def _in_time(self, path: Path, read: Callable[[], Any]) -> Any:
        if path in self._hung:
            raise MediaTimeout(f"{path}: not tried again after it took more than {self._timeout:g} s")
        try:
            return call_with_timeout(read, self._timeout)
        except CallTimeout:
            self._hung.add(path)
            raise timeout_error(path, self._timeout) from None
