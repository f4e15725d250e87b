"""Reading frames from video and image files, in the cheapest way that is exact.

There are three ways to read the frames of a video:

- Indexed: read all packets without decoding them. Then the time and number of every frame is known, and
  whether the file is truncated. Decode each wanted frame from the key frame before it. An hour of video takes
  about a second of one core, but every byte of the file is read.
- By seeking, for a large file that is not truncated by its container's sizes: read only the packets around
  the wanted times.
- Sequentially: decode the file from beginning to end. Needed for GIFs and for files whose packets do not tell
  when their frames are shown (some AVI files) or announce frames that are not shown.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
from av.error import ExitError, FFmpegError
from av.video.frame import VideoFrame
from PIL import Image

from dynfocus_jax.errors import MediaError
from dynfocus_jax.media.containers import is_truncated
from dynfocus_jax.media.decoding import decode_all_frames, decode_frames
from dynfocus_jax.media.frame_sampling import (
    TIME_TOLERANCE,
    UNIFORM,
    Sampling,
    choose_frames,
    choose_times,
    draw_positions,
    frames_shown_at,
)
from dynfocus_jax.media.images import (
    CLIP_MEAN,
    IMAGE_SUFFIXES,
    check_exists,
    fit_to_square,
    read_image,
    read_image_header,
)
from dynfocus_jax.media.packets import (
    FrameNotFound,
    Timeline,
    Video,
    locate_frames,
    open_video,
    scan_packets,
)
from dynfocus_jax.media.rgb import RgbConverter
from dynfocus_jax.media.timeouts import Deadline

VIDEO_SUFFIXES = frozenset(
    {".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"}
    | {".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
)
_LARGE_FILE = 2**26  # bytes; reading them takes 0.1 s from memory, 1 s from a slow disk

T = TypeVar("T")


class Clip(NamedTuple):
    """Frames sampled from one file, in order of time."""

    frames: np.ndarray  # uint8 [n, size, size, 3], RGB
    times: np.ndarray  # float64 [n], seconds, from the container; MPEG transport streams begin at 0
    indices: np.ndarray  # int32 [n], number of each frame in the file; an estimate for large files


class MediaInfo(NamedTuple):
    """Header of a media file."""

    modality: str  # "image" | "video"
    duration: float  # seconds
    frames: int  # estimated from duration and rate if the container does not say
    fps: float  # average; 0 for an image
    width: int  # pixels as coded, before a display rotation
    height: int


class _FrameRequest(NamedTuple):
    """Frames to be read from a file, see `read_video`."""

    path: str | Path
    sampling: Sampling
    limit: int
    draws: np.ndarray | None
    span: tuple[float, float] | None

    def choose_frames(self, times: np.ndarray, end: float) -> np.ndarray:
        """Return the frame numbers, int64, ascending; `times` and `end` as in `choose_frames`."""
        if self.span is None:
            return choose_frames(times, end, self.sampling, self.limit, self.draws)
        start, end_of_span = self._clip_span(times[0], end)
        first = int(frames_shown_at(times, np.asarray(start)))
        last = max(first + 1, int(np.searchsorted(times, end_of_span - TIME_TOLERANCE)))
        return first + choose_frames(times[first:last], end_of_span, self.sampling, self.limit, self.draws)

    def choose_times(self, start: float, end: float, rate: float) -> np.ndarray:
        """Return the times in a video from `start` to `end`, float64, seconds, ascending."""
        span_start, span_end = self._clip_span(start, end)
        frames = max(1, round((span_end - span_start) * rate))
        return choose_times(span_start, span_end, frames, self.sampling, self.limit, self.draws)

    def _clip_span(self, start: float, end: float) -> tuple[float, float]:
        """Return the start and end of the part that is sampled, of a video from `start` to `end`."""
        if self.span is None:
            return start, end
        span_start, span_end = self.span
        if span_end <= start or span_start >= max(end, start + TIME_TOLERANCE) or span_end <= span_start:
            raise MediaError(
                f"{self.path}: the record's span is {span_start:g} to {span_end:g} s, but the video lasts "
                f"from {start:.2f} to {end:.2f} s; correct the record."
            )
        return max(start, span_start), min(end, span_end)


def probe(path: str | Path) -> MediaInfo:
    """Read the header of a file without decoding it; read its packets if the header is incomplete.

    Raises:
      MediaError: if the file is missing or cannot be read.
    """
    if not _is_video(path, "auto"):
        return MediaInfo("image", 0.0, 1, 0.0, *read_image_header(path).size)

    def read_header(deadline: Deadline) -> MediaInfo:
        with open_video(path, deadline) as video:
            stream, duration, rate = video.stream, _header_duration(video), _header_rate(video)
            frames = stream.frames or round(duration * rate)
            if not (duration and frames):
                timeline = scan_packets(video)
                frames = len(timeline.pts)
                duration = video.to_seconds(timeline.end - int(timeline.pts[0])) + video.start
            rate = rate or frames / max(duration, TIME_TOLERANCE)
            return MediaInfo("video", duration, frames, rate, stream.width, stream.height)

    return _read_with_deadline(path, read_header, None)


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
    """Read a video, or an image as a clip of one frame, depending on the suffix of the file.

    Args:
      path: the file. A GIF with several frames is a video (as in TGIF-QA).
      num_frames: see `read_video`.
      size: see `read_video`.
      modality: "auto", "image" or "video"; "image" reads the first frame of a GIF.
      sampling: see `read_video`, as for the other arguments.

    Raises:
      MediaError: see `read_video` and `read_image`.
    """
    if not _is_video(path, modality):
        image = read_image(path, size=size, layout=layout, mean=mean)
        return Clip(image[None], np.zeros(1), np.zeros(1, np.int32))
    return read_video(
        path,
        num_frames,
        size=size,
        sampling=sampling,
        rng=rng,
        layout=layout,
        mean=mean,
        span=span,
        timeout=timeout,
    )


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
    """Read frames of a video.

    Args:
      path: the file.
      num_frames: largest number of frames.
      size: height and width of the frames in pixels.
      sampling: the rule that chooses frames. By default, frame i of n is number floor((i + 0.5) * total / n)
        of the file.
      rng: draws the frames if the rule is random.
      layout: how a frame becomes a square, see `images.fit_to_square`.
      mean: see `images.fit_to_square`.
      span: start and end of the part of the video that is sampled, in seconds. None means all of it.
      timeout: time limit in seconds, checked between packets and by libav while it waits for the file.

    Raises:
      MediaError: if the file is missing, not a video or truncated, has no frame (in the span), or is damaged
        at a place that is decoded and the decoder reports it.
      MediaTimeout: if reading takes longer than `timeout`.
    """
    request = _FrameRequest(path, sampling, num_frames, draw_positions(sampling, num_frames, rng), span)
    to_rgb = RgbConverter()

    def to_image(frame: VideoFrame) -> np.ndarray:
        return np.asarray(fit_to_square(Image.fromarray(to_rgb(frame)), size, layout, mean))

    def read(deadline: Deadline) -> Clip:
        if Path(path).stat().st_size > _LARGE_FILE and is_truncated(path) is False:
            with open_video(path, deadline) as video:
                if (clip := _read_by_seeking(video, request, to_image)) is not None:
                    return clip
        with open_video(path, deadline) as video:
            timeline = scan_packets(video)
            if (clip := _read_indexed(video, timeline, request, to_image)) is not None:
                return clip
        return _read_sequentially(lambda: open_video(path, deadline), timeline, request, to_image)

    return _read_with_deadline(path, read, timeout)


_ToImage = Callable[[VideoFrame], np.ndarray]


def _read_by_seeking(video: Video, request: _FrameRequest, to_image: _ToImage) -> Clip | None:
    """Read only the packets around the wanted times; return None if that would not be exact."""
    duration, rate = _header_duration(video), _header_rate(video)
    if not (duration and rate):
        return None
    start = (video.stream.start_time or 0) * float(video.time_base) - video.start
    times = request.choose_times(start, start + duration, rate)
    try:
        timeline = locate_frames(video, video.to_pts(times + TIME_TOLERANCE))
        frames = [to_image(frame) for frame in decode_frames(video, timeline, timeline.pts)]
    except FrameNotFound:
        return None
    frame_times = video.to_seconds(timeline.pts)
    return Clip(np.stack(frames), frame_times, np.rint((frame_times - start) * rate).astype(np.int32))


def _read_indexed(
    video: Video, timeline: Timeline, request: _FrameRequest, to_image: _ToImage
) -> Clip | None:
    """Decode the packets that lead to the wanted frames; return None if that would not be exact."""
    if not timeline.exact:
        return None
    indices = request.choose_frames(video.to_seconds(timeline.pts), video.to_seconds(timeline.end))
    chosen = timeline.pts[indices]
    decoded = chosen if timeline.complete else np.union1d(chosen, timeline.pts[-1:])
    try:
        frames_of_file = decode_frames(video, timeline, decoded)
        frames = [to_image(frame) for _, frame in zip(chosen, frames_of_file, strict=False)]
        next(frames_of_file, None)  # the last frame may be decoded only to detect that it is cut off
    except FrameNotFound:
        return None
    return Clip(np.stack(frames), video.to_seconds(chosen), indices.astype(np.int32))


class _Decoded(NamedTuple):
    """Result of decoding a file from beginning to end."""

    images: list[np.ndarray]  # the frames that were asked for
    times: np.ndarray  # float64 [T], seconds: when each frame of the file is shown
    right_numbers: np.ndarray  # int64, ascending: numbers of the frames to choose, given `times`


def _read_sequentially(
    open_file: Callable[[], AbstractContextManager[Video]],
    timeline: Timeline,
    request: _FrameRequest,
    to_image: _ToImage,
) -> Clip:
    """Decode all frames: once if the packets announced exactly the frames that are shown, else twice."""
    with open_file() as video:
        end = video.to_seconds(timeline.end)
        numbers = request.choose_frames(video.to_seconds(timeline.pts), end)
        decoded = _decode_sequentially(video, numbers, end, request, to_image)
    if not np.array_equal(numbers, decoded.right_numbers):
        numbers = decoded.right_numbers
        with open_file() as video:
            decoded = _decode_sequentially(video, numbers, end, request, to_image)
    return Clip(np.stack(decoded.images), decoded.times[numbers], numbers.astype(np.int32))


def _decode_sequentially(
    video: Video, numbers: np.ndarray, end: float, request: _FrameRequest, to_image: _ToImage
) -> _Decoded:
    images: list[np.ndarray] = []
    pts: list[int | None] = []
    chosen = set(numbers.tolist())
    for number, frame in enumerate(decode_all_frames(video)):
        pts.append(frame.pts)
        if number in chosen:
            images.append(to_image(frame))
    if not pts:
        raise ValueError("none of its frames could be decoded")
    times = _frame_times(video, pts)
    return _Decoded(images, times, request.choose_frames(times, max(end, times[-1])))


def _frame_times(video: Video, pts: Sequence[int | None]) -> np.ndarray:
    """Return the times of decoded frames, float64 [T], seconds, ascending."""
    known = [each for each in pts if each is not None]
    if len(known) < len(pts):
        return np.arange(len(pts)) / (_header_rate(video) or 1.0)
    return video.to_seconds(np.sort(np.asarray(known, np.int64)))


def _header_duration(video: Video) -> float:
    """Return the duration in seconds from the header, 0 if it has none."""
    if video.stream.duration:
        return float(video.stream.duration * video.time_base)
    return (video.container.duration or 0) / av.time_base


def _header_rate(video: Video) -> float:
    """Return the average frames per second from the header, 0 if it has none."""
    return float(video.stream.average_rate or video.stream.guessed_rate or 0)


def _is_video(path: str | Path, modality: str) -> bool:
    check_exists(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".gif" and modality != "image":
        return read_image_header(path).is_animated
    if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        return suffix in VIDEO_SUFFIXES
    known = " ".join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))
    raise MediaError(f"{path}: unknown file type {suffix!r}, expected one of {known}.")


def _read_with_deadline(path: str | Path, read: Callable[[Deadline], T], timeout: float | None) -> T:
    """Return the result of `read`; turn errors of libav into MediaError."""
    check_exists(path)
    deadline = Deadline(path, timeout)
    try:
        return read(deadline)
    except ExitError:  # libav was interrupted while it waited for the file
        raise deadline.error() from None
    except (FFmpegError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"{path}: not a readable video ({reason}); replace or remove it.") from error
