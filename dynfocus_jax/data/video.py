"""Reading frames from video and image files."""

from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset(
    {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
)

# Containers that hold their own frames: a play list dressed up as a video must not open other files.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf"

_DURATION_TOLERANCE = 0.2  # seconds; some writers round, or leave the last packet's duration out


class MediaError(Exception):
    """A media file that cannot be read, in one sentence: which file, what was found, what to do."""


class Clip(NamedTuple):
    """Frames sampled from one file, in time order."""

    frames: np.ndarray  # uint8 [n, size, size, 3], RGB
    times: np.ndarray  # float32 [n], seconds
    indices: np.ndarray  # int32 [n], position of each frame in the file


def sample_indices(total: int, num_frames: int) -> np.ndarray:
    """Middles of `num_frames` equal parts of `total` frames, int64 [min(total, num_frames)]."""
    count = min(total, num_frames)
    return ((2 * np.arange(count) + 1) * total) // (2 * count)


def read_media(path: str | Path, num_frames: int, size: int) -> Clip:
    """Reads a video, or an image as a clip of one frame, by the suffix of the file; see `read_video`."""
    suffix = Path(path).suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return read_video(path, num_frames, size=size)
    if suffix in IMAGE_SUFFIXES:
        return Clip(read_image(path, size=size)[None], np.zeros(1, np.float32), np.zeros(1, np.int32))
    known = " ".join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))
    raise MediaError(f"{path}: unknown kind of file {suffix!r}, expected one of {known}")


def read_image(path: str | Path, *, size: int) -> np.ndarray:
    """Reads an image, upright by its EXIF orientation: uint8 [size, size, 3], RGB.

    Raises MediaError when the file is missing, is not an image or is truncated.
    """
    _check_exists(path)
    try:
        with Image.open(path) as image:
            return np.asarray(_fit(ImageOps.exif_transpose(image).convert("RGB"), size))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: not a readable image ({error}), replace or remove it") from error


def read_video(path: str | Path, num_frames: int, *, size: int) -> Clip:
    """Samples at most `num_frames` frames uniformly over the frames that the file holds, all when fewer.

    Frame i of n is number floor((i + 0.5) * total / n) of the file. Frames of another size than
    `size` x `size` are scaled (bicubic, shorter side to `size`) and cut to the centre.

    Raises MediaError when the file is missing, is not a video, holds no frame, is truncated, or is damaged
    in a way that the decoder notices.
    """
    _check_exists(path)
    try:
        total = _count_packets(path)
        frames, times, decoded = _decode(path, sample_indices(total, num_frames), size)
        if decoded != total:  # packets that are never shown (rare): sample again over the frames that are
            total = decoded
            frames, times, decoded = _decode(path, sample_indices(total, num_frames), size)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"{path}: not a readable video ({reason}), replace or remove it") from error
    indices = sample_indices(total, num_frames).astype(np.int32)
    return Clip(np.stack(frames), np.asarray(times, np.float32), indices)


def _check_exists(path: str | Path) -> None:
    if not Path(path).is_file():
        raise MediaError(f"{path}: no such file, check the path and the media folder")


def _open(path: str | Path) -> av.container.InputContainer:
    return av.open(str(path), options={"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"})


def _count_packets(path: str | Path) -> int:
    """Number of frames by demultiplexing alone (no decoding), checked against what the header claims."""
    present = shown = 0
    end = 0.0  # seconds, of all streams
    with _open(path) as container:
        if not container.streams.video:
            raise MediaError(f"{path}: holds no video stream, replace or remove it")
        stream = container.streams.video[0]
        for packet in container.demux():
            if packet.is_corrupt:
                raise MediaError(f"{path}: truncated or damaged after frame {present}, replace or remove it")
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == stream.index:
                present += packet.size > 0
                shown += packet.size > 0 and not packet.is_discard
        if present < stream.frames:
            raise MediaError(
                f"{path}: truncated, {present} of {stream.frames} frames are present, replace or remove it"
            )
        # Matroska and WebM declare a duration instead of a number of frames.
        declared = (container.duration or 0) / av.time_base if "matroska" in container.format.name else 0.0
        if end < declared - _DURATION_TOLERANCE:
            raise MediaError(
                f"{path}: truncated, {end:.2f} of {declared:.2f} s are present, replace or remove it"
            )
    if not shown:
        raise MediaError(f"{path}: holds a video stream without frames, replace or remove it")
    return shown


def _decode(path: str | Path, wanted: np.ndarray, size: int) -> tuple[list[np.ndarray], list[float], int]:
    """Decodes the file once, in order: wanted frames, their times in seconds, number of frames decoded."""
    frames, times, decoded = [], [], 0
    remaining = set(wanted.tolist())
    to_rgb = VideoReformatter()  # kept for the whole file: setting one up costs more than a small frame
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # samples are read in parallel, not the frames of one
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise MediaError(f"{path}: frame {decoded} is damaged, replace or remove the file")
            if decoded in remaining:
                image = to_rgb.reformat(frame, format="rgb24").to_ndarray()  # [H, W, 3]
                frames.append(np.asarray(_fit(Image.fromarray(image), size)))
                times.append(
                    frame.time if frame.time is not None else decoded / float(stream.average_rate or 1)
                )
            decoded += 1
    if not decoded:
        raise MediaError(f"{path}: none of its frames could be decoded, replace or remove it")
    return frames, times, decoded


def _fit(image: Image.Image, size: int) -> Image.Image:
    """Scales the shorter side to `size` (bicubic), then cuts the centre square."""
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))
