"""Reading media: frame numbers and times, cropping, and errors for incomplete or damaged files."""

import av
import numpy as np
import pytest

from dynfocus_jax.data.synthetic_frames import write_video
from dynfocus_jax.errors import MediaError
from dynfocus_jax.media.video import read_media, read_video


def numbered_frames(count, height=48, width=48):
    """Return frames of which frame i is uniformly grey at level 8 * i."""
    return np.broadcast_to(
        (8 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3)
    )


def noisy_frames(count=30):
    return np.random.default_rng(0).integers(0, 255, (count, 48, 48, 3), dtype=np.uint8)


def write(path, frames, codec="libx264", pix_fmt="yuv420p", **options):
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=4)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("count", "num_frames", "expected"),
    [(5, 5, [0, 1, 2, 3, 4]), (5, 16, [0, 1, 2, 3, 4]), (20, 4, [2, 7, 12, 17]), (7, 2, [1, 5]), (1, 1, [0])],
)
def test_frames_have_the_returned_indices(tmp_path, count, num_frames, expected):
    write_video(tmp_path / "v.mp4", numbered_frames(count))
    clip = read_video(tmp_path / "v.mp4", num_frames, size=48)
    assert clip.indices.tolist() == expected
    assert np.round(clip.frames.mean((1, 2, 3)) / 8).tolist() == expected
    np.testing.assert_allclose(clip.times, np.array(expected) / 4, atol=1e-6)
    assert (clip.frames.dtype, clip.times.dtype) == (np.uint8, np.float64)


def test_reordered_frames_are_returned_in_order_of_time(tmp_path):
    write_video(tmp_path / "v.mp4", numbered_frames(30), {"bf": "3", "b_strategy": "0", "crf": "5"})
    with av.open(str(tmp_path / "v.mp4")) as container:
        pts = [packet.pts for packet in container.demux() if packet.size]
    assert pts != sorted(pts)  # the codec did reorder the frames
    clip = read_video(tmp_path / "v.mp4", 30, size=48)
    assert np.round(clip.frames.mean((1, 2, 3)) / 8).tolist() == list(range(30))


@pytest.mark.parametrize(("height", "width"), [(48, 144), (144, 48)])
def test_centre_crop_and_scaling(tmp_path, height, width):
    frame = np.zeros((height, width, 3), np.uint8)
    middle = (slice(None), slice(48, 96)) if width > height else (slice(48, 96), slice(None))
    frame[middle] = (255, 255, 255)
    write_video(tmp_path / "v.mp4", np.stack([frame] * 2))
    for size in (48, 24):
        clip = read_video(tmp_path / "v.mp4", 2, size=size)
        assert clip.frames.shape == (2, size, size, 3)
        assert clip.frames[:, 2:-2, 2:-2].min() > 245
    assert read_video(tmp_path / "v.mp4", 1, size=56).frames.shape == (1, 56, 56, 3)


CONTAINERS = [("mp4", "libx264", {}), ("mp4", "libx264", {"movflags": "faststart"})]
CONTAINERS += [
    ("mkv", "libx264", {}),
    ("ts", "libx264", {}),
    ("avi", "libx264", {}),
    ("webm", "libvpx-vp9", {}),
]


@pytest.mark.parametrize(("suffix", "codec", "options"), CONTAINERS)
def test_truncated_files_are_refused(tmp_path, suffix, codec, options):
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    write(whole, noisy_frames(), codec, **options)
    assert read_media(whole, 8, 48).indices.tolist() == [1, 5, 9, 13, 16, 20, 24, 28]
    content = whole.read_bytes()
    for length in (len(content) // 2 + 1, len(content) - 2500):
        cut.write_bytes(content[:length])
        with pytest.raises(MediaError, match=r"cut\.\w+: .*remove"):
            read_media(cut, 8, 48)


@pytest.mark.parametrize("cut", [300, 600, 4000])
def test_truncation_that_the_decoder_does_not_report_is_refused(tmp_path, cut):
    write(tmp_path / "v.avi", noisy_frames(10), "mjpeg", "yuvj420p")
    content = (tmp_path / "v.avi").read_bytes()
    (tmp_path / "v.avi").write_bytes(content[:-cut])
    with av.open(str(tmp_path / "v.avi")) as container:
        assert not any(frame.is_corrupt for frame in container.decode(video=0))
    with pytest.raises(MediaError, match=r"v\.avi: the file is truncated"):
        read_video(tmp_path / "v.avi", 8, size=48)


@pytest.mark.parametrize("start", [5000, 20_000, 40_000, 60_000])
def test_damaged_frames_are_refused(tmp_path, start):
    write_video(tmp_path / "v.mp4", noisy_frames())
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    content[start : start + 4096] = bytes(4096)  # as if a block of the disk had never been written
    (tmp_path / "v.mp4").write_bytes(bytes(content))
    with pytest.raises(MediaError, match=r"v\.mp4: .*(damaged|not a readable video)"):
        read_video(tmp_path / "v.mp4", 8, size=48)


def test_files_that_are_not_media(tmp_path):
    playlist = b"ffconcat version 1.0\nfile whole.mp4\n"  # libav would open another file
    write_video(tmp_path / "whole.mp4", noisy_frames(3))
    for name, content, message in [
        ("text.mp4", b"not a video\n" * 50, "not a readable video"),
        ("empty.mp4", b"", "not a readable video"),
        ("list.mp4", playlist, "not a readable video"),
        ("text.png", b"not an image\n" * 50, "not a readable image"),
        ("notes.txt", b"hello", "unknown file type '.txt'"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match=message) as error:
            read_media(tmp_path / name, 4, 48)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    for name in ("missing.mp4", "missing.png"):
        with pytest.raises(MediaError, match="no such file"):
            read_media(tmp_path / name, 4, 48)


def test_audio_without_video_is_refused(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="no video stream"):
        read_video(tmp_path / "sound.mp4", 4, size=48)
