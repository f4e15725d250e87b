"""The work: media through the tower into shards, with reading, computing and writing at the same time."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from dynfocus_jax.data.skipped import Skipped
from dynfocus_jax.errors import MediaError
from dynfocus_jax.features.media_list import Looked, Wanted
from dynfocus_jax.features.shards import ShardWriter
from dynfocus_jax.features.store import Key
from dynfocus_jax.features.tower import Tower


class Done(NamedTuple):
    """Numbers of media processed by this process."""

    media: int = 0
    frames: int = 0
    skipped: int = 0


def extract(
    work: Sequence[tuple[Key, Wanted]],
    look: Callable[[Wanted], Looked],
    tower: Tower | None,
    shards: ShardWriter,
    skipped: Skipped,
    *,
    threads: int,
    progress: Callable[[Done], None],
) -> Done:
    """Store the features of this process's media.

    Frames of several media share a call of the tower, for which the processes wait for each other until none
    has a frame left; tower: None where all media are features already.
    `skipped` is told of each medium; `progress` after each, `threads` read ahead.

    Raises:
      UserError: too many media cannot be read.
      RunError: features cannot be written.
    """
    done = Done()
    opened: deque[tuple[Key, Looked, list[np.ndarray]]] = deque()  # media that wait for features, in order
    frames: deque[np.ndarray] = deque()  # of these, not computed yet
    running: list[tuple[jax.Array, int]] = []  # a call of the tower, and how many frames of ours it has

    def store(key: Key, looked: Looked, features: np.ndarray) -> None:
        nonlocal done
        shards.add(key, looked.info, looked.parts, features, looked.subtitles)
        done = Done(done.media + 1, done.frames + len(features), done.skipped)
        progress(done)

    def deliver() -> None:
        """Hand the features of the call before to the media that wait for them."""
        for call, count in running:
            for row in tower.finish(call, count):
                key, looked, features = opened[0]
                features.append(row)
                if len(features) == len(looked.frames):
                    store(key, looked, np.stack(features))
                    opened.popleft()
        running.clear()

    with ThreadPoolExecutor(threads) as pool:
        source = _in_order(pool, look, work, 2 * threads)
        while True:
            while tower is None or len(frames) < tower.rows:
                if (found := next(source, None)) is None:
                    break
                key, wanted, looked = found
                if isinstance(looked, str):
                    done = done._replace(skipped=done.skipped + 1)
                    skipped.note(wanted.record, looked)
                    progress(done)
                    continue
                skipped.note(wanted.record, None)
                if looked.is_done:
                    store(key, looked, looked.frames)
                else:
                    opened.append((key, looked, []))
                    frames.extend(looked.frames)
            if tower is None or not _anybody(bool(frames)):
                break
            some = [frames.popleft() for _ in range(min(len(frames), tower.rows))]
            call = tower.start(some)
            deliver()  # while this call runs
            running.append((call, len(some)))
        deliver()
    shards.finish()
    return done


def _in_order(
    pool: ThreadPoolExecutor, look: Callable, work: Sequence[tuple[Key, Wanted]], ahead: int
) -> Iterator[tuple[Key, Wanted, Looked | str]]:
    """Yield `look`'s result for each medium, or its error, in order, reading `ahead` media in advance."""

    def attempt(wanted: Wanted) -> Looked | str:
        try:
            return look(wanted)
        except MediaError as error:
            return str(error)

    waiting: deque = deque()
    for key, wanted in work:
        waiting.append((key, wanted, pool.submit(attempt, wanted)))
        if len(waiting) > ahead:
            key, wanted, future = waiting.popleft()
            yield key, wanted, future.result()
    for key, wanted, future in waiting:
        yield key, wanted, future.result()


def _anybody(here: bool) -> bool:
    """Whether it is true in any of the processes."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.asarray(here)).any())
