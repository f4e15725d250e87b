"""Decoding of frames with libav: single frames from the key frames before them, or all frames in order."""

from collections.abc import Iterator

import numpy as np
from av.error import InvalidDataError
from av.packet import Packet
from av.video.frame import VideoFrame

from dynfocus_jax.errors import MediaError
from dynfocus_jax.media.packets import READ_AHEAD, SEEK_MARGINS, FrameNotFound, Timeline, Video, seek_packets

_INTRA = (0, 1, 5)  # picture types that depend on no other picture: unknown, I, SI

# Decoders that can skip the frames on which no other frame depends, without changing the others.
_SKIPPING_CODECS = frozenset({"h264", "mpeg4", "mpeg2video", "mpeg1video"})


def decode_frames(video: Video, timeline: Timeline, wanted: np.ndarray) -> Iterator[VideoFrame]:
    """Decode single frames, each from the key frame before it.

    Args:
      video: an open file.
      timeline: its timeline, which must be `exact`.
      wanted: pts of the frames, int64, ascending.

    Yields:
      The frames, one for each pts.

    Raises:
      FrameNotFound: if no frame with a wanted pts is decoded.
      MediaError: if one of the frames decoded is damaged.
    """
    keys_before = np.searchsorted(timeline.keys, wanted, side="right") - 1
    if keys_before[0] < 0:
        raise FrameNotFound
    decoder = _SeekingDecoder(video, frozenset(wanted.tolist()))
    frames: Iterator[VideoFrame] = iter(())
    for pts, key in zip(wanted.tolist(), timeline.keys[keys_before].tolist(), strict=True):
        if decoder.last_key is None or key > decoder.last_key:
            frames = decoder.decode_from(key)
        frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= pts), None)
        if frame is None or frame.pts != pts:
            raise FrameNotFound
        yield frame


class _SeekingDecoder:
    """Decodes from one key frame on, until it is restarted at a later one."""

    def __init__(self, video: Video, wanted: frozenset[int]):
        self._video, self._wanted, self._decoder = video, wanted, video.stream.codec_context
        self._ticks_per_second = int(1 / video.time_base)
        self._skips = self._decoder.name in _SKIPPING_CODECS
        self._packets: Iterator[Packet] = iter(())
        self._last_pts: int | None = None  # of the last packet read
        self.last_key: int | None = None  # pts of the last key frame that was decoded

    def decode_from(self, key: int) -> Iterator[VideoFrame]:
        """Return the frames from the key frame with pts `key` on."""
        is_near = self._last_pts is not None and key <= self._last_pts + READ_AHEAD * self._ticks_per_second
        packet = self._read_to_key(key) if is_near else None
        if packet is None:
            packet = self._seek_key(key)
        self._decoder.flush_buffers()
        return self._decode(packet, key)

    def _seek_key(self, key: int) -> Packet:
        for margin in SEEK_MARGINS:
            self._packets = seek_packets(self._video, key - int(margin * self._ticks_per_second))
            packet = self._read_to_key(key)
            if packet is not None:
                return packet
        raise FrameNotFound

    def _read_to_key(self, key: int) -> Packet | None:
        """Read up to the packet of a key frame; return None if it is not ahead."""
        for packet in self._packets:
            self._video.deadline.check()
            if packet.is_keyframe and packet.pts is not None and packet.pts >= key:
                return packet if packet.pts == key else None
        return None

    def _decode(self, first: Packet, key: int) -> Iterator[VideoFrame]:
        packet: Packet | None = first
        while packet is not None:
            self._video.deadline.check()
            if packet.pts is not None:
                self._last_pts = packet.pts
                if packet.is_keyframe:
                    self.last_key = packet.pts
            if self._skips:
                self._decoder.skip_frame = "DEFAULT" if packet.pts in self._wanted else "NONREF"
            # Frames that are shown before the key frame may depend on frames before it, which were not
            # decoded: such frames are damaged or missing.
            is_leading = packet.pts is not None and packet.pts < key
            try:
                frames = self._decoder.decode(packet)
            except InvalidDataError:
                if not is_leading:
                    raise
                frames = []
            for frame in frames:
                if frame.pts == key and int(frame.pict_type) not in _INTRA:
                    raise FrameNotFound  # the container calls it a key frame, but it is not
                if frame.is_corrupt and (frame.pts is None or frame.pts >= key):
                    raise MediaError(f"{self._video.path}: a frame is damaged; replace or remove the file.")
                yield frame
            packet = next(self._packets, None)


def decode_all_frames(video: Video) -> Iterator[VideoFrame]:
    """Yield all frames of a video in the order in which they are shown.

    Raises:
      MediaError: if a frame is damaged.
    """
    number, after_key = 0, False
    for packet in video.container.demux(video.stream):
        video.deadline.check()
        after_key |= packet.is_keyframe
        try:
            frames = packet.decode()
        except InvalidDataError:
            if after_key:
                raise
            continue  # the file was cut without re-encoding: the first frames depend on missing ones
        for frame in frames:
            if frame.is_corrupt:
                raise MediaError(f"{video.path}: frame {number} is damaged; replace or remove the file.")
            yield frame
            number += 1
