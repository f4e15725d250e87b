"""Reading frames from video and image files: which are wanted, and the cheapest exact way to them.

Three ways lead to the frames of a video:

- All packets are read (not decoded), so that the time and number of every frame is known, and whether the
  file is truncated; then each wanted frame is decoded from the key frame before it. An hour takes about a
  second of a core, but every byte of the file is read.
- Of a large file that is whole by its container's sizes only packets around the wanted moments are read.
- A file whose packets do not tell when its frames are shown (some AVI) or announce frames that are not shown,
  and a GIF, are decoded from beginning to end.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from dynfocus_jax.errors import MediaError
from dynfocus_jax.media.containers import is_cut
from dynfocus_jax.media.decoding import (
    Deadline,
    Timeline,
    Unshown,
    Video,
    decode_all,
    fetch,
    locate,
    open_video,
    scan,
)
from dynfocus_jax.media.frame_sampling import (
    CLOCK,
    UNIFORM,
    Sampling,
    choose_frames,
    choose_moments,
    draw,
    shown_at,
)
from dynfocus_jax.media.images import CLIP_MEAN, IMAGE_SUFFIXES, check_exists, fit, image_header, read_image
from dynfocus_jax.media.rgb import ToRgb

VIDEO_SUFFIXES = frozenset(
    {".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"}
    | {".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
)
_LARGE = 2**26  # bytes; reading so many takes a tenth of a second from memory, a second from a slow disk


class Clip(NamedTuple):
    """Frames sampled from one file, in time order."""

    frames: np.ndarray  # uint8 [n, size, size, 3], RGB
    times: np.ndarray  # float64 [n], seconds, as the container has them; a broadcast (MPEG-TS) begins at 0
    indices: np.ndarray  # int32 [n], position of each frame in the file; an estimate in large files


class MediaInfo(NamedTuple):
    """Header of a media file."""

    modality: str  # "image" | "video"
    duration: float  # seconds
    frames: int  # estimated from duration and rate where the container does not say
    fps: float  # average; 0 of an image
    width: int  # pixels, as they are coded (a video may be turned when shown)
    height: int


class _Wanted(NamedTuple):
    """Frames to be read from a file."""

    path: str | Path
    sampling: Sampling
    limit: int
    draws: np.ndarray | None
    span: tuple[float, float] | None

    def frames(self, times: np.ndarray, end: float) -> np.ndarray:
        """Their numbers, int64, ascending; `times` and `end` as `choose_frames` takes them."""
        if self.span is None:
            return choose_frames(times, end, self.sampling, self.limit, self.draws)
        begin, end = self._within(times[0], end)
        first = int(shown_at(times, np.asarray(begin)))
        last = max(first + 1, int(np.searchsorted(times, end - CLOCK)))
        return first + choose_frames(times[first:last], end, self.sampling, self.limit, self.draws)

    def moments(self, begin: float, end: float, rate: float) -> np.ndarray:
        """Return their times in a video from `begin` to `end`, float64, seconds, ascending."""
        begin, end = self._within(begin, end)
        frames = max(1, round((end - begin) * rate))
        return choose_moments(begin, end, frames, self.sampling, self.limit, self.draws)

    def _within(self, begin: float, end: float) -> tuple[float, float]:
        """The part of the video that is sampled."""
        if self.span is None:
            return begin, end
        first, last = self.span
        if last <= begin or first >= max(end, begin + CLOCK) or last <= first:
            raise MediaError(
                f"{self.path}: it lasts from {begin:.2f} to {end:.2f} s and the record wants {first:g} to "
                f"{last:g} s, correct the record"
            )
        return max(begin, first), min(end, last)


def probe(path: str | Path) -> MediaInfo:
    """Return the header of a file without decoding; packets are read if the header is incomplete.

    Raises MediaError when the file is missing or cannot be read.
    """
    if not _is_video(path, "auto"):
        return MediaInfo("image", 0.0, 1, 0.0, *image_header(path).size)

    def look(deadline: Deadline) -> MediaInfo:
        with open_video(path, deadline) as video:
            stream, duration, rate = video.stream, _duration(video), _rate(video)
            frames = stream.frames or round(duration * rate)
            if not (duration and frames):
                timeline = scan(video)
                frames = len(timeline.pts)
                duration = float(video.seconds(timeline.end - timeline.pts[0]) + video.start)
            rate = rate or frames / max(duration, CLOCK)
            return MediaInfo("video", duration, frames, rate, stream.width, stream.height)

    return _try(path, look, None)


def read_media(
    path: str | Path,
    num_frames: int,
    size: int,
    *,
    modality: str = "auto",
    sampling: Sampling = UNIFORM,
    rng: np.random.Generator | None = None,
    layout: str = "crop",
    mean: Sequence[float] = CLIP_MEAN,
    span: tuple[float, float] | None = None,
    timeout: float | None = None,
) -> Clip:
    """Read a video (see `read_video`), or an image as a clip of one frame, by the suffix of the file.

    A GIF is a video when it has several frames (as in TGIF-QA), unless `modality` is "image".

    Raises MediaError like `read_video` and `read_image`.
    """
    if not _is_video(path, modality):
        image = read_image(path, size=size, layout=layout, mean=mean)
        return Clip(image[None], np.zeros(1), np.zeros(1, np.int32))
    options = {"sampling": sampling, "rng": rng, "span": span, "timeout": timeout}
    return read_video(path, num_frames, size=size, layout=layout, mean=mean, **options)


def read_video(
    path: str | Path,
    num_frames: int,
    *,
    size: int,
    sampling: Sampling = UNIFORM,
    rng: np.random.Generator | None = None,
    layout: str = "crop",
    mean: Sequence[float] = CLIP_MEAN,
    span: tuple[float, float] | None = None,
    timeout: float | None = None,
) -> Clip:
    """Read at most `num_frames` frames of a video, chosen by `sampling`; see the head of this module.

    size, layout, mean: how a frame becomes a square, see `images.fit`; a frame of that size stays as it is.
    rng: draws the frames, where the sampling is random.
    span: from when to when the video is sampled, in seconds; None is all of it.
    timeout: seconds; checked between packets, and by libav while it waits for the file.

    With the default sampling, frame i of n is number floor((i + 0.5) * total / n) of the file.

    Raises MediaError when the file is missing, is not a video, holds no frame (in the span), is truncated, or
    is damaged where it is decoded in a way that the decoder notices; MediaTimeout when it takes too long.
    """
    wanted = _Wanted(path, sampling, num_frames, draw(sampling, num_frames, rng), span)
    to_rgb = ToRgb()

    def show(frame: av.VideoFrame) -> np.ndarray:
        return np.asarray(fit(Image.fromarray(to_rgb(frame)), size, layout, mean))

    def read(deadline: Deadline) -> Clip:
        if Path(path).stat().st_size > _LARGE and is_cut(path) is False:
            with open_video(path, deadline) as video:
                if (clip := _read_around(video, wanted, show)) is not None:
                    return clip
        with open_video(path, deadline) as video:
            timeline = scan(video)
            if (clip := _read_near(video, timeline, wanted, show)) is not None:
                return clip
        return _read_through(lambda: open_video(path, deadline), timeline, wanted, show)

    return _try(path, read, timeout)


_Show = Callable[[av.VideoFrame], np.ndarray]


def _read_around(video: Video, wanted: _Wanted, show: _Show) -> Clip | None:
    """Read what lies around the wanted moments; None where that cannot be done exactly."""
    duration, rate = _duration(video), _rate(video)
    if not (duration and rate):
        return None
    begin = (video.stream.start_time or 0) * float(video.stream.time_base) - video.start
    moments = wanted.moments(begin, begin + duration, rate)
    try:
        timeline = locate(video, video.ticks(moments + CLOCK))
        frames = [show(frame) for frame in fetch(video, timeline, timeline.pts)]
    except Unshown:
        return None
    times = video.seconds(timeline.pts)
    return Clip(np.stack(frames), times, np.rint((times - begin) * rate).astype(np.int32))


def _read_near(video: Video, timeline: Timeline, wanted: _Wanted, show: _Show) -> Clip | None:
    """Decode what leads to the wanted frames; None where that cannot be done exactly."""
    if not timeline.exact:
        return None
    indices = wanted.frames(video.seconds(timeline.pts), video.seconds(timeline.end))
    chosen = timeline.pts[indices]
    decoded = chosen if timeline.certain else np.union1d(chosen, timeline.pts[-1:])
    try:
        fetched = fetch(video, timeline, decoded)
        frames = [show(frame) for _, frame in zip(chosen, fetched, strict=False)]
        next(fetched, None)  # the last frame, where it is decoded only to see whether it is whole
    except Unshown:
        return None
    return Clip(np.stack(frames), video.seconds(chosen), indices.astype(np.int32))


def _read_through(
    open_it: Callable[[], AbstractContextManager[Video]], timeline: Timeline, wanted: _Wanted, show: _Show
) -> Clip:
    """Decode everything: once where the packets announced the frames that there are, else twice."""

    def decode(numbers: np.ndarray | None) -> tuple[np.ndarray, list[np.ndarray], np.ndarray, np.ndarray]:
        """Numbers and pictures of frames, times of all, and the numbers that are right by these times."""
        with open_it() as video:
            end = video.seconds(timeline.end)
            if numbers is None:
                numbers = wanted.frames(video.seconds(timeline.pts), end)
            frames, pts, chosen = [], [], set(numbers.tolist())
            for number, frame in enumerate(decode_all(video)):
                pts.append(frame.pts)
                if number in chosen:
                    frames.append(show(frame))
            if not pts:
                raise ValueError("none of its frames could be decoded")
            times = _times(video, pts)
            return numbers, frames, times, wanted.frames(times, max(end, times[-1]))

    numbers, frames, times, right = decode(None)
    if not np.array_equal(numbers, right):
        numbers, frames, times, _ = decode(right)
    return Clip(np.stack(frames), times[numbers], numbers.astype(np.int32))


def _times(video: Video, pts: list[int | None]) -> np.ndarray:
    """Return the times of decoded frames, float64 [T], seconds: the k-th frame at the k-th of all times."""
    if None in pts:
        return np.arange(len(pts)) / (_rate(video) or 1.0)
    return video.seconds(np.sort(np.asarray(pts, np.int64)))


def _duration(video: Video) -> float:
    """Seconds, by the header; 0 where it says nothing."""
    if video.stream.duration:
        return float(video.stream.duration * video.stream.time_base)
    return (video.container.duration or 0) / av.time_base


def _rate(video: Video) -> float:
    """Average frames a second, by the header; 0 where it says nothing."""
    return float(video.stream.average_rate or video.stream.guessed_rate or 0)


def _is_video(path: str | Path, modality: str) -> bool:
    check_exists(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".gif" and modality != "image":
        return image_header(path).is_animated
    if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        return suffix in VIDEO_SUFFIXES
    known = " ".join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))
    raise MediaError(f"{path}: unknown kind of file {suffix!r}, expected one of {known}")


def _try(path: str | Path, read: Callable, timeout: float | None):
    """Return the result of `read`; errors of libav become MediaError."""
    check_exists(path)
    deadline = Deadline(path, timeout)
    try:
        return read(deadline)
    except av.error.ExitError:  # libav was interrupted while it waited
        raise deadline.error() from None
    except (av.error.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"{path}: not a readable video ({reason}), replace or remove it") from error
