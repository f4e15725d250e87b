"""Video files and the timestamps of their frames, read from packets without decoding them.

A pts is a presentation timestamp: an integer in units of the stream's time base.
"""

from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, overload

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Stream
from av.video.stream import VideoStream

from dynfocus_jax.errors import MediaError
from dynfocus_jax.media.containers import is_truncated
from dynfocus_jax.media.timeouts import Deadline

# Containers that hold their own frames. A playlist with the suffix of a video must not open other files.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif"
_MAX_PIXELS = 2**26  # per frame; a header can claim billions

_STILL_CODECS = frozenset({"bmp", "gif", "mjpeg", "png", "tiff", "webp"})

_DURATION_TOLERANCE = 0.2  # seconds; some writers round, or omit the duration of the last packet
READ_AHEAD = 2.0  # seconds; packets at most this far ahead are reached by reading, not by seeking
SEEK_MARGINS = (0.0, 2.0, 10.0, 60.0)  # seconds before a target to seek to, because a seek may overshoot
_OVERRUN = 1.0  # seconds by which a requested time may exceed the end of the last frame

# Accept titles that are not UTF-8; PyAV 19 always does.
_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


class FrameNotFound(Exception):
    """A frame cannot be decoded by its pts, or cannot be reached by seeking."""


class Timeline(NamedTuple):
    """Timestamps of a video stream, from its packets."""

    pts: np.ndarray  # int64 [T], ascending
    end: int  # pts at which the last frame ends
    keys: np.ndarray  # int64 [K], ascending: pts of the frames at which decoding can start
    exact: bool  # decoded frames carry exactly these pts, so single frames can be decoded
    complete: bool  # no frame is missing; if False, only decoding the last frame shows whether it is cut off


class Video(NamedTuple):
    """An open video file and its stream."""

    path: str | Path
    container: InputContainer
    stream: VideoStream
    time_base: Fraction  # seconds per unit of pts
    deadline: Deadline

    @property
    def start(self) -> float:
        """Time on the stream's clock at which the file begins, in seconds.

        0 except for MPEG program and transport streams, which use the clock of the broadcast.
        """
        if self.container.format.name in ("mpegts", "mpeg"):
            return (self.container.start_time or 0) / av.time_base
        return 0.0

    @overload
    def to_seconds(self, pts: int) -> float: ...
    @overload
    def to_seconds(self, pts: np.ndarray) -> np.ndarray: ...

    def to_seconds(self, pts: int | np.ndarray) -> float | np.ndarray:
        """Convert pts to times since the beginning of the file, float64 of the same shape."""
        return pts * self.time_base.numerator / self.time_base.denominator - self.start

    def to_pts(self, seconds: np.ndarray) -> np.ndarray:
        """Convert times since the beginning of the file to pts, rounded down, int64 of the same shape."""
        ticks = (seconds + self.start) * self.time_base.denominator / self.time_base.numerator
        return np.floor(ticks).astype(np.int64)


@contextmanager
def open_video(path: str | Path, deadline: Deadline) -> Iterator[Video]:
    """Open the first video stream of a file, to be decoded by one thread.

    Raises:
      MediaError: if the file has no video stream, or none that can be decoded.
      av.error.FFmpegError: if the file is not a video.
    """
    # Options of the container only: PyAV before 16 crashes on MPEG program streams when given `options`.
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    # "file:", because libav would take a colon in the name for the end of a protocol.
    with av.open(
        f"file:{path}", mode="r", container_options=options, timeout=deadline.remaining(), **_METADATA
    ) as container:
        stream = next((stream for stream in container.streams.video if not _is_cover(stream)), None)
        if stream is None:
            raise MediaError(f"{path}: the file has no video stream; replace or remove it.")
        if stream.codec_context is None or stream.time_base is None:
            raise MediaError(f"{path}: the video stream has no decoder; convert the file to H.264.")
        stream.codec_context.thread_count = 1  # files are read in parallel instead
        stream.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}
        yield Video(path, container, stream, stream.time_base, deadline)


def _is_cover(stream: VideoStream) -> bool:
    """Return whether a stream is the cover image of a music file: a still image without a frame rate."""
    decoder, rate = stream.codec_context, stream.average_rate
    has_no_rate = rate is None or rate.numerator == 0  # 0/0 since PyAV 19
    return has_no_rate and decoder is not None and decoder.name in _STILL_CODECS


class _Packets(NamedTuple):
    """Summary of the packets of a file."""

    pts: "array[int]"  # of the frames that are shown, in file order
    keys: "array[int]"  # pts of the key frames, in file order
    count: int  # packets of the video stream
    end: int  # pts at which the last frame ends
    end_seconds: float  # end of the last packet of any stream that was read
    has_all_pts: bool
    is_reordered: bool  # some pts differ from the dts


def scan_packets(video: Video) -> Timeline:
    """Read all packets without decoding them, and check that the file is not truncated.

    If the container tells that bytes are missing, or does not tell, the file must contain as many frames, or
    seconds, as its header claims.

    Raises:
      MediaError: if the file is truncated, has a damaged packet, or has no frames.
    """
    path, container = video.path, video.container
    # Matroska and WebM headers have a duration, over all streams, but no number of frames.
    has_duration = "matroska" in container.format.name
    packets = _read_packets(video, container.streams if has_duration else [video.stream])
    claimed_seconds = (container.duration or 0) / av.time_base if has_duration else 0.0
    # libav's number of frames of a GIF is only the number of frames that it found.
    claimed_frames = 0 if container.format.name == "gif" else video.stream.frames
    reaches_end = packets.end_seconds >= claimed_seconds - _DURATION_TOLERANCE
    falls_short = packets.count < claimed_frames or not reaches_end
    is_complete = packets.count >= claimed_frames > 0 or (
        reaches_end and claimed_seconds > _DURATION_TOLERANCE
    )
    truncated = is_truncated(path)
    if (truncated and not is_complete) or (truncated is None and falls_short):
        if claimed_seconds:
            found = f"{packets.end_seconds:.2f} s, expected {claimed_seconds:.2f} s"
        else:
            found = f"{packets.count} frames, expected {claimed_frames or 'more'}"
        raise MediaError(f"{path}: the file is truncated ({found}); replace or remove it.")
    if not packets.pts:
        raise MediaError(f"{path}: the video stream has no frames; replace or remove it.")

    pts, keys = np.sort(np.asarray(packets.pts, np.int64)), np.asarray(packets.keys, np.int64)
    exact = packets.has_all_pts and has_reliable_pts(video, packets.is_reordered)
    exact = exact and bool((np.diff(pts) > 0).all() and (np.diff(keys) > 0).all())
    typical_duration = int(np.median(np.diff(pts))) if len(pts) > 1 else 0
    return Timeline(
        pts,
        end=max(packets.end, int(pts[-1]) + typical_duration),
        keys=np.sort(keys),
        exact=exact,
        complete=has_duration or claimed_frames > 0 or truncated is False,
    )


def _read_packets(video: Video, streams: Iterable[Stream]) -> _Packets:
    """Read all packets of the streams; raise MediaError if one is damaged."""
    seconds_per_tick = {stream.index: float(stream.time_base or 0) for stream in streams}
    pts, keys, count, end, end_seconds = array("q"), array("q"), 0, 0, 0.0
    has_all_pts, is_reordered = True, False
    for packet in video.container.demux(list(streams)):
        video.deadline.check()
        if packet.is_corrupt:
            raise MediaError(
                f"{video.path}: the file is truncated or damaged after frame {count}; replace or remove it."
            )
        if not packet.size:
            continue
        shown, duration = packet.pts, packet.duration or 0
        if shown is not None:
            end_seconds = max(end_seconds, (shown + duration) * seconds_per_tick[packet.stream_index])
        if packet.stream_index != video.stream.index:
            continue
        count += 1
        is_reordered |= shown != packet.dts
        if shown is None:
            has_all_pts = False
            shown = packet.dts if packet.dts is not None else end
        end = shown + duration
        if packet.is_keyframe:
            keys.append(shown)
        if not packet.is_discard:
            pts.append(shown)
    return _Packets(pts, keys, count, end, end_seconds, has_all_pts, is_reordered)


def has_reliable_pts(video: Video, is_reordered: bool) -> bool:
    """Return whether single frames can be found by the pts of their packets.

    They cannot in a GIF, where libav cannot seek, nor in an AVI with reordered frames: AVI stores no pts, and
    libav guesses them wrongly there.
    """
    name = video.container.format.name
    return name != "gif" and not (name == "avi" and is_reordered)


def locate_frames(video: Video, moments: np.ndarray) -> Timeline:
    """Find the frames shown at given times, reading only the packets around them.

    Args:
      video: a file that is not truncated.
      moments: int64, ascending, in units of pts.

    Returns:
      A timeline of only those frames, each once, and of the key frames that lead to them.

    Raises:
      FrameNotFound: if frames cannot be found in this way in the file.
      MediaError: if a packet is damaged.
    """
    finder = _FrameFinder(video)
    found = [finder.find(moment) for moment in moments.tolist()]
    pts, keys = (np.unique(each) for each in zip(*found, strict=True))
    return Timeline(pts, int(pts[-1]), keys, exact=True, complete=True)


class _FrameFinder:
    """Finds frames by time, in ascending order; keeps the pts of only a few packets."""

    def __init__(self, video: Video):
        self._video = video
        self._ticks_per_second = int(1 / video.time_base)
        self._packets: Iterator[Packet] = iter(())
        self._last_dts: int | None = None  # of the last packet read
        self._end = 0  # pts at which the frame of the last packet ends
        self._pts: list[int] = []  # of the packets since the key frame that was returned last
        self._keys: list[int] = []

    def find(self, moment: int) -> tuple[int, int]:
        """Return the pts of the frame shown at a time and of the key frame before it."""
        seek = self._last_dts is None or moment > self._last_dts + READ_AHEAD * self._ticks_per_second
        for margin in SEEK_MARGINS:
            if seek:
                self._seek(moment - int(margin * self._ticks_per_second))
            self._read_to(moment)
            shown = max((pts for pts in self._pts if pts <= moment), default=None)
            if shown is not None:
                key = max((key for key in self._keys if key <= shown), default=None)
                if key is not None:
                    self._pts = [pts for pts in self._pts if pts >= key]
                    self._keys = [each for each in self._keys if each >= key]
                    return shown, key
            seek = True
        raise FrameNotFound

    def _seek(self, target: int) -> None:
        self._packets = seek_packets(self._video, target)
        self._pts, self._keys = [], []

    def _read_to(self, moment: int) -> None:
        for packet in self._packets:
            self._video.deadline.check()
            if packet.is_corrupt:
                raise MediaError(f"{self._video.path}: a packet is damaged; replace or remove the file.")
            if not packet.size:
                continue
            if packet.pts is None or not has_reliable_pts(self._video, packet.pts != packet.dts):
                raise FrameNotFound
            if packet.is_keyframe:
                self._keys.append(packet.pts)
            if not packet.is_discard:
                self._pts.append(packet.pts)
            self._end = packet.pts + (packet.duration or 0)
            if packet.dts is not None:
                self._last_dts = packet.dts
                if packet.dts > moment:  # pts >= dts: all frames that are shown until `moment` have been read
                    return
        if moment > self._end + _OVERRUN * self._ticks_per_second:  # the file is shorter than it claims
            raise FrameNotFound


def seek_packets(video: Video, target: int) -> Iterator[Packet]:
    """Return the packets from the key frame at or before a pts; the seek may overshoot.

    Raises:
      FrameNotFound: if the file does not support seeking.
    """
    try:
        video.container.seek(target, stream=video.stream)
    except FFmpegError:
        raise FrameNotFound from None
    return video.container.demux(video.stream)
