"""Decoding chosen frames with libav: packets are read first, and only what leads to the frames is decoded.

pts: a presentation timestamp, an integer in units of the stream's time base, as the container has it.
"""

import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from dynfocus_jax.errors import MediaError, MediaTimeout
from dynfocus_jax.media.containers import is_cut
from dynfocus_jax.media.images import timed_out

# Containers that hold their own frames: a play list dressed up as a video must not open other files.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif"
_MAX_PIXELS = 2**26  # of a frame; its header can claim billions

_STILLS = frozenset({"bmp", "gif", "mjpeg", "png", "tiff", "webp"})

_DURATION_TOLERANCE = 0.2  # seconds; some writers round, or leave the last packet's duration out
_NEAR = 2.0  # seconds; packets that far ahead are reached by reading on, not by seeking
_STEPS_BACK = (0.0, 2.0, 10.0, 60.0)  # seconds before a target where a seek is tried, as many land behind it
_OVERRUN = 1.0  # seconds; how far a moment may lie behind the last frame

_INTRA = (0, 1, 5)  # picture types that depend on no other: unknown, I, SI

# Decoders that leave out, exactly and without a trace, frames on which no other depends.
_SKIPPING = frozenset({"h264", "mpeg4", "mpeg2video", "mpeg1video"})

# Titles in other encodings are no errors; PyAV 19 always decodes them like this.
_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


class Unshown(Exception):
    """A frame that the packets announce was not found where it should be, or was not shown."""


class Deadline:
    """A moment by which a file has to be read; `check` raises MediaTimeout after it."""

    def __init__(self, path: str | Path, seconds: float | None):
        self._path, self._seconds = path, seconds
        self._end = float("inf") if seconds is None else time.monotonic() + seconds

    def error(self) -> MediaTimeout:
        return timed_out(self._path, self._seconds)

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise self.error()

    def left(self) -> float | None:
        """Seconds, for what waits by itself; None is without end."""
        return None if self._seconds is None else max(0.01, self._end - time.monotonic())


class Timeline(NamedTuple):
    """Timestamps of a video stream, from its packets."""

    pts: np.ndarray  # int64 [T], ascending: when each frame is shown
    end: int  # when the last one is over
    keys: np.ndarray  # int64 [K], ascending: frames at which decoding can start
    exact: bool  # decoded frames carry these very numbers, so that single ones can be fetched
    certain: bool  # nothing is missing; else only the decoder of the last frame notices that it was cut off


class Video(NamedTuple):
    """An open file."""

    path: str | Path
    container: av.container.InputContainer
    stream: av.video.stream.VideoStream
    deadline: Deadline

    @property
    def start(self) -> float:
        """Seconds on the stream's clock at which the file begins.

        0 but for MPEG streams, which are cut out of a broadcast whose clock has run for hours.
        """
        if self.container.format.name in ("mpegts", "mpeg"):
            return (self.container.start_time or 0) / av.time_base
        return 0.0

    def seconds(self, pts: np.ndarray) -> np.ndarray:
        """Times since the beginning of the file, float64 like `pts`."""
        unit = self.stream.time_base
        return pts * unit.numerator / unit.denominator - self.start

    def ticks(self, seconds: np.ndarray) -> np.ndarray:
        """The last pts at each of these times, int64 like `seconds`."""
        unit = self.stream.time_base
        return np.floor((seconds + self.start) * unit.denominator / unit.numerator).astype(np.int64)


@contextmanager
def open_video(path: str | Path, deadline: Deadline) -> Iterator[Video]:
    """Open a file's first stream of moving pictures, to be decoded by one thread.

    Raises MediaError when there is none, and av.error.FFmpegError when the file is not a video.
    """
    # Options of the container only: as `options`, PyAV before 16 would crash on MPEG program streams.
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    # "file:", because a colon in a name would be taken for a protocol.
    with av.open(
        f"file:{path}", container_options=options, timeout=deadline.left(), **_METADATA
    ) as container:
        stream = next((each for each in container.streams.video if not _is_cover(each)), None)
        if stream is None:
            raise MediaError(f"{path}: holds no video stream, replace or remove it")
        if stream.codec_context is None:
            raise MediaError(f"{path}: there is no decoder for its video stream, convert it to H.264")
        stream.codec_context.thread_count = 1  # samples are read in parallel, not the frames of one
        stream.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}
        yield Video(path, container, stream, deadline)


def _is_cover(stream: av.video.stream.VideoStream) -> bool:
    """Whether a stream is the cover picture of a piece of music: a still image without a frame rate."""
    decoder, rate = stream.codec_context, stream.average_rate
    has_no_rate = rate is None or rate.numerator == 0  # 0/0 since PyAV 19
    return has_no_rate and decoder is not None and decoder.name in _STILLS


def scan(video: Video) -> Timeline:
    """Read all packets, without decoding them, and check that the file is not truncated.

    A file that lacks bytes, or does not say how many it should have, must hold what its header claims.

    Raises MediaError when it does not, when a packet is damaged, and when there are no frames.
    """
    path, container, stream, deadline = video
    # Matroska and WebM claim a duration, of all streams, instead of a number of frames.
    by_duration = "matroska" in container.format.name
    streams = container.streams if by_duration else [stream]
    units = {each.index: float(each.time_base or 0) for each in streams}
    pts, keys, present, end, last = array("q"), array("q"), 0, 0.0, 0
    missing = guessed = False
    for packet in container.demux(list(streams)):
        deadline.check()
        if packet.is_corrupt:
            raise MediaError(f"{path}: truncated or damaged after frame {present}, replace or remove it")
        if not packet.size:
            continue
        shown, duration = packet.pts, packet.duration or 0
        if shown is not None:
            end = max(end, (shown + duration) * units[packet.stream_index])
        if packet.stream_index != stream.index:
            continue
        present += 1
        guessed |= shown != packet.dts
        if shown is None:
            missing, shown = True, packet.dts if packet.dts is not None else last
        last = shown + duration
        if packet.is_keyframe:
            keys.append(shown)
        if not packet.is_discard:
            pts.append(shown)
    claimed = (container.duration or 0) / av.time_base if by_duration else 0.0
    expected = 0 if container.format.name == "gif" else stream.frames  # those of a GIF were only counted
    lacking = present < expected or end < claimed - _DURATION_TOLERANCE
    complete = present >= expected > 0 or end >= claimed - _DURATION_TOLERANCE > 0
    cut, certain = is_cut(path), by_duration or expected > 0
    if (cut and not complete) or (cut is None and lacking):
        what = f"{end:.2f} of {claimed:.2f} s" if claimed else f"{present} of {expected or 'more'} frames"
        raise MediaError(f"{path}: truncated, {what} are present, replace or remove it")
    if not pts:
        raise MediaError(f"{path}: holds a video stream without frames, replace or remove it")
    exact = not missing and has_own_times(video, guessed)
    return _timeline(pts, keys, last, exact, certain or cut is False)


def has_own_times(video: Video, reordered: bool) -> bool:
    """Whether pts belong to the frames of their packets: AVI has no pts, and guesses fail where B-frames are.

    Nor are single frames fetched from a GIF, in which no seeking is possible.
    """
    name = video.container.format.name
    return name != "gif" and not (name == "avi" and reordered)


def _timeline(pts: Sequence[int], keys: Sequence[int], last: int, exact: bool, certain: bool) -> Timeline:
    times, starts = np.sort(np.asarray(pts, np.int64)), np.asarray(keys, np.int64)
    exact = exact and bool((np.diff(times) > 0).all() and (np.diff(starts) > 0).all())
    step = int(np.median(np.diff(times))) if len(times) > 1 else 0
    return Timeline(times, max(last, int(times[-1]) + step), np.sort(starts), exact, certain)


def locate(video: Video, moments: np.ndarray) -> Timeline:
    """The frames shown at `moments` (pts, int64, ascending), found by reading the packets around each only.

    `pts` of the result are those frames, each once, and `keys` the key frames that lead to them.

    Raises Unshown when the file cannot be read in this way, and MediaError when a packet is damaged.
    """
    walk = _Walk(video)
    found = [walk.find(moment) for moment in moments.tolist()]
    pts, keys = (np.unique(each) for each in zip(*found, strict=True))
    return Timeline(pts, int(pts[-1]), keys, exact=True, certain=True)


class _Walk:
    """Looks for frames from the front to the back; keeps the times of a few packets only."""

    def __init__(self, video: Video):
        self._video = video
        self._second = int(1 / video.stream.time_base)
        self._packets: Iterator[av.Packet] = iter(())
        self._reached: int | None = None  # dts of the last packet
        self._end = 0  # when the last packet's frame is over
        self._pts: list[int] = []  # of packets since the key frame that was last used
        self._keys: list[int] = []

    def find(self, moment: int) -> tuple[int, int]:
        """The frame shown at a moment and the key frame before it, as pts."""
        seeks = self._reached is None or moment > self._reached + _NEAR * self._second
        for back in _STEPS_BACK:
            if seeks:
                self._seek(moment - int(back * self._second))
            self._read_to(moment)
            shown = max((pts for pts in self._pts if pts <= moment), default=None)
            if (
                shown is not None
                and (key := max((k for k in self._keys if k <= shown), default=None)) is not None
            ):
                self._pts = [pts for pts in self._pts if pts >= key]
                self._keys = [k for k in self._keys if k >= key]
                return shown, key
            seeks = True
        raise Unshown

    def _seek(self, target: int) -> None:
        self._packets = seek(self._video, target)
        self._pts, self._keys = [], []

    def _read_to(self, moment: int) -> None:
        for packet in self._packets:
            self._video.deadline.check()
            if packet.is_corrupt:
                raise MediaError(f"{self._video.path}: a packet is damaged, replace or remove the file")
            if not packet.size:
                continue
            if packet.pts is None or not has_own_times(self._video, packet.pts != packet.dts):
                raise Unshown
            if packet.is_keyframe:
                self._keys.append(packet.pts)
            if not packet.is_discard:
                self._pts.append(packet.pts)
            self._end = packet.pts + (packet.duration or 0)
            if packet.dts is not None:
                self._reached = packet.dts
                if packet.dts > moment:  # no frame is shown before it is decoded: all up to `moment` are seen
                    return
        if moment > self._end + _OVERRUN * self._second:  # the file is shorter than it claims
            raise Unshown


def fetch(video: Video, timeline: Timeline, wanted: np.ndarray) -> Iterator[av.VideoFrame]:
    """Yield the frames whose pts are `wanted` (int64, ascending), decoding from the key frame before each.

    Raises Unshown when one does not come, and MediaError when one of the frames decoded is damaged.
    """
    before = np.searchsorted(timeline.keys, wanted, side="right") - 1
    if before[0] < 0:
        raise Unshown
    run = _Run(video, frozenset(wanted.tolist()))
    for pts, key in zip(wanted.tolist(), timeline.keys[before].tolist(), strict=True):
        if run.last_key is None or key > run.last_key:
            frames = run.start(key)
        frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= pts), None)
        if frame is None or frame.pts != pts:
            raise Unshown
        yield frame


def seek(video: Video, target: int) -> Iterator[av.Packet]:
    """The packets from the key frame at or before `target` (pts) on, or from a little later."""
    try:
        video.container.seek(target, stream=video.stream)
    except av.error.FFmpegError:
        raise Unshown from None
    return video.container.demux(video.stream)


class _Run:
    """Decodes from one key frame on, until it is started at another."""

    def __init__(self, video: Video, wanted: frozenset[int]):
        self._video, self._wanted, self._decoder = video, wanted, video.stream.codec_context
        self._second = int(1 / video.stream.time_base)
        self._skips = self._decoder.name in _SKIPPING
        self._packets: Iterator[av.Packet] = iter(())
        self._position: int | None = None  # pts of the last packet
        self.last_key: int | None = None  # pts of the last key frame that was decoded

    def start(self, key: int) -> Iterator[av.VideoFrame]:
        """The frames from the key frame on whose pts is `key`."""
        near = self._position is not None and key <= self._position + _NEAR * self._second
        packet = self._packet_of(key) if near else None
        if packet is None:
            for back in _STEPS_BACK:
                self._packets = seek(self._video, key - int(back * self._second))
                if (packet := self._packet_of(key)) is not None:
                    break
            else:
                raise Unshown
        self._decoder.flush_buffers()
        return self._decode_from(packet)

    def _packet_of(self, key: int) -> av.Packet | None:
        """Read on to the packet of a key frame; None when it is not ahead."""
        for packet in self._packets:
            self._video.deadline.check()
            if packet.is_keyframe and packet.pts is not None and packet.pts >= key:
                return packet if packet.pts == key else None
        return None

    def _decode_from(self, packet: av.Packet) -> Iterator[av.VideoFrame]:
        key = packet.pts
        while packet is not None:
            self._video.deadline.check()
            if packet.pts is not None:
                self._position = packet.pts
                if packet.is_keyframe:
                    self.last_key = packet.pts
            if self._skips:
                self._decoder.skip_frame = "DEFAULT" if packet.pts in self._wanted else "NONREF"
            # Frames shown before the key frame may depend on some before it: they come damaged or not at all.
            leads = packet.pts is not None and packet.pts < key
            try:
                frames = self._decoder.decode(packet)
            except av.error.InvalidDataError:
                if not leads:
                    raise
                frames = []
            for frame in frames:
                if frame.pts == key and int(frame.pict_type) not in _INTRA:  # it was no key frame
                    raise Unshown
                if frame.is_corrupt and (frame.pts is None or frame.pts >= key):
                    raise MediaError(f"{self._video.path}: a frame is damaged, replace or remove the file")
                yield frame
            packet = next(self._packets, None)


def decode_all(video: Video) -> Iterator[av.VideoFrame]:
    """Yield all frames of a video in the order in which they are shown.

    Raises MediaError when one is damaged.
    """
    number, can_begin = 0, False
    for packet in video.container.demux(video.stream):
        video.deadline.check()
        can_begin |= packet.is_keyframe
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if can_begin:
                raise
            continue  # a piece cut out without decoding: what depends on frames before it is not shown
        for frame in frames:
            if frame.is_corrupt:
                raise MediaError(f"{video.path}: frame {number} is damaged, replace or remove the file")
            yield frame
            number += 1
