"""The extraction loop: it reads media, runs the vision tower and writes shards at the same time."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from dynfocus_jax.data.skipped import SkippedSamples
from dynfocus_jax.errors import MediaError
from dynfocus_jax.features.media_list import MediaFrames, MediaRequest
from dynfocus_jax.features.shards import ShardWriter
from dynfocus_jax.features.store import MediaKey
from dynfocus_jax.features.vision_tower import VisionTower


class ExtractionCounts(NamedTuple):
    """Numbers of media and frames stored, and of media skipped."""

    media: int = 0
    frames: int = 0
    skipped: int = 0


class _ReadResult(NamedTuple):
    """A requested media item and its frames, or the reason why it cannot be read."""

    key: MediaKey
    request: MediaRequest
    frames: MediaFrames | str


def run_extraction(
    work: Sequence[tuple[MediaKey, MediaRequest]],
    read: Callable[[MediaRequest], MediaFrames],
    tower: VisionTower | None,
    shards: ShardWriter,
    skipped: SkippedSamples,
    *,
    threads: int,
    progress: Callable[[ExtractionCounts], None],
) -> ExtractionCounts:
    """Store the features of the media of this process.

    Frames of several media share a call of the tower. All processes call the tower together, until none has a
    frame left.

    Args:
      work: the media of this process.
      read: reads the frames of a media item; raises MediaError if it cannot be read.
      tower: the vision tower, or None if `read` returns features for all media.
      shards: receives the features.
      skipped: counts the media, and lists those that cannot be read.
      threads: number of threads that read ahead.
      progress: called with the counts after each media item.

    Returns:
      The counts of this process.

    Raises:
      UserError: if too many media cannot be read.
      RunError: if features cannot be written.
    """
    extraction = _Extraction(shards, skipped, progress)
    with ThreadPoolExecutor(threads) as pool:
        results = _read_in_order(pool, read, work, 2 * threads)
        if tower is None:
            for result in results:
                extraction.add(result)
        else:
            _encode_frames(extraction, results, tower)
    shards.finish()
    return extraction.counts


class _Extraction:
    """The media whose features are not complete yet, and the counts.

    Attributes:
      counts: media and frames stored so far, and media skipped.
      frames: frames that wait for the tower, of the media that wait for features, in order.
    """

    def __init__(
        self, shards: ShardWriter, skipped: SkippedSamples, progress: Callable[[ExtractionCounts], None]
    ):
        self._shards, self._skipped, self._progress = shards, skipped, progress
        self._waiting: deque[tuple[MediaKey, MediaFrames, list[np.ndarray]]] = deque()
        self.frames: deque[np.ndarray] = deque()
        self.counts = ExtractionCounts()

    def add(self, result: _ReadResult) -> None:
        """Store a media item that comes as features, queue the frames of another, or count it as skipped."""
        key, request, frames = result
        if isinstance(frames, str):
            self.counts = self.counts._replace(skipped=self.counts.skipped + 1)
            self._skipped.note(request.record, frames)
            self._progress(self.counts)
            return
        self._skipped.note(request.record, None)
        if frames.are_features:
            self._store(key, frames, frames.frames)
        else:
            self._waiting.append((key, frames, []))
            self.frames.extend(frames.frames)

    def add_features(self, rows: np.ndarray) -> None:
        """Add the features of the next frames, [n, (1 +) N, C]; store the media that are complete then."""
        for row in rows:
            key, frames, features = self._waiting[0]
            features.append(row)
            if len(features) == len(frames.frames):
                self._store(key, frames, np.stack(features))
                self._waiting.popleft()

    def _store(self, key: MediaKey, frames: MediaFrames, features: np.ndarray) -> None:
        self._shards.add(key, frames.info, frames.selections, features, frames.subtitles)
        media, count, skipped = self.counts
        self.counts = ExtractionCounts(media + 1, count + len(features), skipped)
        self._progress(self.counts)


def _encode_frames(extraction: _Extraction, results: Iterator[_ReadResult], tower: VisionTower) -> None:
    """Add all results and run their frames through the tower, one call ahead of the stored features."""
    running: tuple[jax.Array, int] | None = None  # the last call and its number of frames of this process
    while True:
        while len(extraction.frames) < tower.frames_per_call:
            result = next(results, None)
            if result is None:
                break
            extraction.add(result)
        if not _in_any_process(bool(extraction.frames)):
            break
        count = min(len(extraction.frames), tower.frames_per_call)
        call = tower.start([extraction.frames.popleft() for _ in range(count)])
        if running is not None:
            extraction.add_features(tower.fetch(*running))  # while the new call runs
        running = call, count
    if running is not None:
        extraction.add_features(tower.fetch(*running))


def _read_in_order(
    pool: ThreadPoolExecutor,
    read: Callable[[MediaRequest], MediaFrames],
    work: Sequence[tuple[MediaKey, MediaRequest]],
    ahead: int,
) -> Iterator[_ReadResult]:
    """Yield the results of `read` in the order of `work`; up to `ahead` media are read in advance."""

    def attempt(request: MediaRequest) -> MediaFrames | str:
        try:
            return read(request)
        except MediaError as error:
            return str(error)

    waiting: deque[tuple[MediaKey, MediaRequest, Future[MediaFrames | str]]] = deque()
    for key, request in work:
        waiting.append((key, request, pool.submit(attempt, request)))
        if len(waiting) > ahead:
            first_key, first_request, future = waiting.popleft()
            yield _ReadResult(first_key, first_request, future.result())
    for key, request, future in waiting:
        yield _ReadResult(key, request, future.result())


def _in_any_process(condition: bool) -> bool:
    """Whether a condition holds in at least one process."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.asarray(condition)).any())
