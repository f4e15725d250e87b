"""Frame sampling: by frame number, or by time for files in which not all timestamps are known."""

import math
from typing import NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

TIME_TOLERANCE = 6e-4  # seconds; containers round timestamps to milliseconds


class Sampling(NamedTuple):
    """A rule that chooses frames.

    kind:
      "uniform": the middle frame of each of equal parts of the video.
      "segments": as "uniform", or with `pick` "random" a random frame of each part.
      "fps": the frames shown at the beginning and every 1 / `fps` seconds after it. If these are more than
        `cap`, only `above` of them are kept, evenly spaced (the published rule: 1 frame per second, or 200
        frames if there are more than 2000).
    """

    kind: str = "uniform"
    fps: float = 1.0
    cap: int = 2000
    above: int = 200
    pick: str = "middle"

    @classmethod
    def from_config(cls, section: ConfigDict) -> "Sampling":
        """Return the rule of the section `config.data.sampling`."""
        return cls(**{field: section[field] for field in cls._fields})


UNIFORM = Sampling()


class TimedMedia(Protocol):
    """The fields of `video.MediaInfo` that are needed to count frames."""

    @property
    def modality(self) -> str: ...

    @property
    def duration(self) -> float: ...  # seconds

    @property
    def frames(self) -> int: ...


def middle_indices(total: int, num_parts: int) -> np.ndarray:
    """Return the middle of each of `num_parts` equal parts of `total` items.

    Returns:
      int64 [min(total, num_parts)]: floor((i + 0.5) * total / parts).
    """
    parts = min(total, num_parts)
    return ((2 * np.arange(parts) + 1) * total) // (2 * parts)


def count_frames(
    info: TimedMedia, sampling: Sampling, limit: int, *, span: tuple[float, float] | None = None
) -> int:
    """Return the number of frames that will be read from a file; as accurate as its header.

    Args:
      info: the header of the file.
      sampling: the rule that chooses frames.
      limit: largest number of frames.
      span: start and end of the part of the video that is sampled, in seconds. None means all of it.
    """
    if info.modality == "image":
        return 1
    frames, duration = info.frames, info.duration
    if span is not None and duration > 0:
        overlap = max(0.0, min(span[1], duration) - max(span[0], 0.0))
        frames, duration = max(1, math.ceil(frames * overlap / duration - TIME_TOLERANCE)), overlap
    if sampling.kind == "fps":
        frames = min(frames, _num_steps(duration, sampling.fps))
        frames = sampling.above if frames > sampling.cap else frames
    return min(frames, limit)


def choose_frames(
    times: np.ndarray, end: float, sampling: Sampling, limit: int, draws: np.ndarray | None = None
) -> np.ndarray:
    """Choose frames of a video whose timestamps are all known.

    Args:
      times: float64 [T], seconds, ascending: when each frame is shown.
      end: when the last frame ends, in seconds.
      sampling: the rule.
      limit: largest number of frames.
      draws: float64 [limit] in [0, 1): position of the chosen frame within each segment, see
        `draw_positions`. None means the middle.

    Returns:
      Frame numbers, int64 [at most limit], ascending and distinct.
    """
    total = len(times)
    if sampling.kind == "fps":
        steps = np.arange(_num_steps(end - times[0], sampling.fps)) / sampling.fps
        return _thin_out(np.unique(frames_shown_at(times, times[0] + steps)), sampling, limit)
    if draws is None:
        return middle_indices(total, limit)
    parts = min(total, limit)
    edges = np.arange(parts + 1) * total // parts
    return edges[:-1] + (draws[:parts] * np.diff(edges)).astype(np.int64)


def choose_times(
    start: float, end: float, frames: int, sampling: Sampling, limit: int, draws: np.ndarray | None = None
) -> np.ndarray:
    """Choose times at which frames are read, for a file in which not all timestamps are known.

    The parts of the rule are equal parts of the time. If all frames have the same duration, these are equal
    parts of the frames as well.

    Args:
      start: beginning of the part that is sampled, in seconds.
      end: end of that part, in seconds.
      frames: number of its frames.
      sampling: the rule.
      limit: largest number of frames.
      draws: as in `choose_frames`.

    Returns:
      float64 [at most limit], seconds, ascending.
    """
    if sampling.kind == "fps":
        steps = np.arange(_num_steps(end - start, sampling.fps)) / sampling.fps
        return _thin_out(start + steps, sampling, limit)
    parts = min(frames, limit)
    position = 0.5 if draws is None else draws[:parts]
    return start + (np.arange(parts) + position) / parts * (end - start)


def frames_shown_at(times: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Return the number of the frame shown at each moment: the last one that began by then.

    Args:
      times: float64 [T], seconds, ascending: when each frame is shown.
      moments: float64 of any shape, seconds.

    Returns:
      int64 of the shape of `moments`.
    """
    return np.maximum(np.searchsorted(times, moments + TIME_TOLERANCE, side="right") - 1, 0)


def draw_positions(sampling: Sampling, limit: int, rng: np.random.Generator | None) -> np.ndarray | None:
    """Draw the position of the chosen frame within each segment, for `choose_frames`.

    Returns:
      float64 [limit] in [0, 1); None if the rule is not random.

    Raises:
      ValueError: if the rule is random and `rng` is None.
    """
    if sampling.kind != "segments" or sampling.pick == "middle":
        return None
    if rng is None:
        raise ValueError('rng is None, but sampling with pick="random" draws frames; pass a generator.')
    return rng.random(limit)


def _num_steps(duration: float, fps: float) -> int:
    """Return the number of multiples of 1 / fps within the duration, 0 included."""
    return max(1, math.ceil((duration - TIME_TOLERANCE) * fps))


def _thin_out(values: np.ndarray, sampling: Sampling, limit: int) -> np.ndarray:
    """Apply the cap of "fps" and the limit to chosen values."""
    if len(values) > sampling.cap:
        values = values[middle_indices(len(values), sampling.above)]
    return values[middle_indices(len(values), limit)]
