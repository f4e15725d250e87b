"""Frame sampling: by frame number, or by time where not all timestamps are known."""

import math
from typing import NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

CLOCK = 6e-4  # seconds; containers round the times of frames to milliseconds


class Sampling(NamedTuple):
    """A rule that chooses frames.

    kind: "uniform", the middles of equal parts of the frames; "segments", the middle or, with `pick`
      "random", a random frame of each of these parts; "fps", the frames shown at the beginning and every
      1 / `fps` seconds after it, of which, when they are more than `cap`, `above` uniform ones stay (the
      published rule: 1 a second, above 2000 frames 200).
    """

    kind: str = "uniform"
    fps: float = 1.0
    cap: int = 2000
    above: int = 200
    pick: str = "middle"

    @classmethod
    def from_config(cls, section: ConfigDict) -> "Sampling":
        """The rule that the section `config.data.sampling` describes."""
        return cls(**{field: section[field] for field in cls._fields})


UNIFORM = Sampling()


class TimedMedia(Protocol):
    """The part of `video.MediaInfo` that counting frames needs."""

    modality: str
    duration: float  # seconds
    frames: int


def sample_indices(total: int, num_frames: int) -> np.ndarray:
    """Middles of `num_frames` equal parts of `total` frames, int64 [min(total, num_frames)]."""
    count = min(total, num_frames)
    return ((2 * np.arange(count) + 1) * total) // (2 * count)


def count(
    info: TimedMedia, sampling: Sampling, limit: int, *, span: tuple[float, float] | None = None
) -> int:
    """Return the number of frames that reading returns, at most `limit`; as exact as the header `info`."""
    if info.modality == "image":
        return 1
    frames, duration = info.frames, info.duration
    if span is not None and duration > 0:
        inside = max(0.0, min(span[1], duration) - max(span[0], 0.0))
        frames, duration = max(1, math.ceil(frames * inside / duration - CLOCK)), inside
    if sampling.kind == "fps":
        frames = min(frames, _ticks(duration, sampling.fps))
        frames = sampling.above if frames > sampling.cap else frames
    return min(frames, limit)


def choose_frames(
    times: np.ndarray, end: float, sampling: Sampling, limit: int, draws: np.ndarray | None = None
) -> np.ndarray:
    """Numbers of the frames that the rule chooses, ascending, each once: int64 [at most limit].

    times: float64 [T], seconds, ascending, when each frame is shown; end: when the last one is over.
    draws: float64 [limit] in [0, 1), which frame of each segment; None is the middle.
    """
    total = len(times)
    if sampling.kind == "fps":
        ticks = np.arange(_ticks(end - times[0], sampling.fps)) / sampling.fps
        return _thin(np.unique(shown_at(times, times[0] + ticks)), sampling, limit)
    if draws is None:
        return sample_indices(total, limit)
    parts = min(total, limit)
    edges = np.arange(parts + 1) * total // parts
    return edges[:-1] + (draws[:parts] * np.diff(edges)).astype(np.int64)


def choose_moments(
    start: float, end: float, frames: int, sampling: Sampling, limit: int, draws: np.ndarray | None = None
) -> np.ndarray:
    """Moments at which the chosen frames are shown, ascending: float64 [at most limit], seconds.

    For files of which not every frame's time is known: the parts are equal parts of the time, which are equal
    parts of the frames where these last equally long.

    start, end: of what is sampled, in seconds; frames: how many frames that has; draws: as above.
    """
    if sampling.kind == "fps":
        return _thin(start + np.arange(_ticks(end - start, sampling.fps)) / sampling.fps, sampling, limit)
    parts = min(frames, limit)
    inside = 0.5 if draws is None else draws[:parts]
    return start + (np.arange(parts) + inside) / parts * (end - start)


def shown_at(times: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Number of the frame shown at each moment, int64 like `moments`: the last that began by then."""
    return np.maximum(np.searchsorted(times, moments + CLOCK, side="right") - 1, 0)


def draw(sampling: Sampling, limit: int, rng: np.random.Generator | None) -> np.ndarray | None:
    """Return the random `draws` for `choose_frames`, float64 [limit]; None if nothing is random.

    Raises ValueError when the rule is random and `rng` is missing.
    """
    if sampling.kind != "segments" or sampling.pick == "middle":
        return None
    if rng is None:
        raise ValueError("random frames of segments are drawn from rng, found None: pass a generator")
    return rng.random(limit)


def _ticks(duration: float, fps: float) -> int:
    """Return the number of multiples of 1 / fps within the duration, 0 included."""
    return max(1, math.ceil((duration - CLOCK) * fps))


def _thin(values: np.ndarray, sampling: Sampling, limit: int) -> np.ndarray:
    """Return the values chosen by "fps" that are kept under the cap and the limit."""
    if len(values) > sampling.cap:
        values = values[sample_indices(len(values), sampling.above)]
    return values[sample_indices(len(values), limit)]
