"""Files as they occur in data sets: any length, wrong or incomplete headers, unusual names, damage."""

import contextlib
import struct

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dynfocus_jax.errors import MediaError, MediaTimeout
from dynfocus_jax.media import packets, video
from dynfocus_jax.media.frame_sampling import Sampling, count_frames
from dynfocus_jax.media.video import MediaInfo, probe, read_media, read_video
from tests.media.videos import REAL, container_times, content, encode, numbered, write_kind

CODECS = {
    "h264": ("mp4", "libx264", {"preset": "ultrafast", "g": "50"}),
    "vp9": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "50"}),
    "mjpeg": ("avi", "mjpeg", {}),
}
LENGTHS = {0.5: 8, 20: 5, 3600: 1}  # seconds: frames per second


def clock_start(path):
    """Return the time at which the clock of an MPEG stream begins, 0 for other containers."""
    with av.open(str(path)) as container:
        return container.start_time / av.time_base if container.format.name in ("mpegts", "mpeg") else 0.0


def write_length(folder, codec, seconds):
    suffix, encoder, options = CODECS[codec]
    path, rate = folder / f"{codec}.{suffix}", LENGTHS[seconds]
    total = round(seconds * rate)
    images = numbered(32, 32, 32)
    encode(path, images[np.arange(total) % 32], encoder, options, rate=rate)
    return path, total


# ---- Lengths and times -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seconds", [0.5, 20, 3600])
@pytest.mark.parametrize("kind", ["uniform", "fps", "segments"])
def test_times_equal_those_of_the_container(tmp_path, codec, seconds, kind):
    path, total = write_length(tmp_path, codec, seconds)
    times = container_times(path)
    assert len(times) == total
    limit = 12
    clip = read_media(path, limit, 32, sampling=Sampling(kind, fps=2.0))
    info = probe(path)
    assert len(clip.times) == count_frames(info, Sampling(kind, fps=2.0), limit)
    assert len(clip.times) == min(limit, total if kind != "fps" else max(1, int(2 * seconds)))
    np.testing.assert_allclose(clip.times, times[clip.indices], rtol=0, atol=1e-9)
    assert info.modality == "video"
    assert info.duration == pytest.approx(seconds, abs=0.01 + seconds / total)
    assert (info.frames, info.width, info.height) == (pytest.approx(total, abs=1), 32, 32)
    written = numbered(32, 32, 32).astype(int)  # each decoded frame is closest to the one it was encoded from
    likeness = [np.abs(written - frame).mean((1, 2, 3)).argmin() for frame in clip.frames]
    assert likeness == (clip.indices % 32).tolist()


def test_two_hours(tmp_path):
    frames = np.repeat(numbered(32, 32, 32), 60, axis=0)
    encode(
        tmp_path / "v.mkv",
        frames,
        options={"preset": "ultrafast", "g": "64"},
        pts=[3800 * i for i in range(1920)],
    )
    assert probe(tmp_path / "v.mkv").duration == pytest.approx(1920 * 3.8, abs=5)
    clip = read_video(tmp_path / "v.mkv", 5, size=32)
    np.testing.assert_allclose(clip.times, 3.8 * np.array([192, 576, 960, 1344, 1728]), atol=1e-6)


@pytest.mark.parametrize("name", ["bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"])
def test_real_videos(name):
    times = container_times(REAL / name)
    clip = read_media(REAL / name, 8, 64)
    middles = ((np.arange(8) + 0.5) * len(times) / 8).astype(int)
    np.testing.assert_allclose(clip.times, times[middles], rtol=0, atol=1e-9)
    assert len(np.unique(clip.frames.reshape(8, -1), axis=0)) == 8
    info = probe(REAL / name)
    assert info.frames == len(times)
    assert info.duration == pytest.approx(times[-1] + 1 / info.fps, abs=0.05)
    per_second = read_media(REAL / name, 100, 64, sampling=Sampling("fps"))
    ticks = np.arange(np.ceil(info.duration - 6e-4))
    shown = np.searchsorted(times, ticks + 6e-4, side="right") - 1
    np.testing.assert_allclose(per_second.times, times[shown], rtol=0, atol=1e-9)
    assert len(per_second.times) == count_frames(info, Sampling("fps"), 100)


@pytest.mark.parametrize("large", [2**30, 0])
def test_span(tmp_path, monkeypatch, large):
    monkeypatch.setattr(video, "_LARGE_FILE", large)
    path = write_kind(tmp_path, "h264")  # 6 s, 10 frames a second
    clip = read_video(path, 4, size=64, span=(2.0, 4.0))
    assert clip.indices.tolist() == [22, 27, 32, 37]
    np.testing.assert_allclose(clip.times, [2.2, 2.7, 3.2, 3.7])
    assert read_video(path, 99, size=64, span=(2.0, 4.0)).indices.tolist() == list(range(20, 40))
    ticks = read_video(path, 99, size=64, span=(2.05, 4.0), sampling=Sampling("fps", fps=2.0))
    assert ticks.indices.tolist() == [20, 25, 30, 35]  # the frame of 2.0 s is shown at 2.05 s
    assert read_video(path, 99, size=64, span=(5.7, 99.0)).indices.tolist() == [57, 58, 59]
    for span in [(6.0, 9.0), (-3.0, 0.0), (4.0, 2.0), (3.0, 3.0)]:
        with pytest.raises(
            MediaError, match=r"span is .* but the video lasts from 0\.00 to 6\.00 s; correct"
        ):
            read_video(path, 4, size=64, span=span)


@pytest.mark.parametrize("kind", ["h264-ts", "mpeg2"])
def test_mpeg_streams_begin_at_zero(tmp_path, kind):
    path = write_kind(tmp_path, kind)
    assert container_times(path)[0] > 0.1
    assert read_video(path, 60, size=64).times[0] == pytest.approx(0)
    assert read_video(path, 4, size=64, span=(0.0, 1.0)).times.max() < 1


# ---- Headers ---------------------------------------------------------------------------------------------


def claim_more(path, kind):
    """Change a header: too many frames (AVI), too long (Matroska), an edit that shows only a part (MP4)."""
    data = bytearray(path.read_bytes())
    if kind == "mjpeg-avi":
        for at in (data.index(b"avih") + 8 + 16, data.index(b"strh") + 8 + 32):  # dwTotalFrames, dwLength
            data[at : at + 4] = struct.pack("<I", 90)
    elif kind == "h264-mkv":
        at = data.index(b"\x44\x89\x88") + 3  # Duration
        data[at : at + 8] = struct.pack(">d", 9000.0)
    else:
        at = data.index(b"elst") + 12  # segment_duration, in milliseconds
        data[at : at + 4] = struct.pack(">I", 4000)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(("kind", "present"), [("mjpeg-avi", 60), ("h264-mkv", 60), ("h264", 40)])
def test_complete_file_with_a_wrong_header_is_read(tmp_path, kind, present):
    path = write_kind(tmp_path, kind)
    expected = content(path).frames
    claim_more(path, kind)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        claimed = stream.frames or container.duration / 100_000
        assert sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream)) < claimed
    clip = read_video(path, 6, size=64, layout="pad", mean=(0, 0, 0))
    middles = ((np.arange(6) + 0.5) * present / 6).astype(int)
    assert clip.indices.tolist() == middles.tolist()
    np.testing.assert_array_equal(clip.frames[:, 8:56], expected[middles])
    data = path.read_bytes()
    path.write_bytes(data[: 3 * len(data) // 4])
    with pytest.raises(MediaError, match=r"(truncated|not a readable video).* remove"):
        read_video(path, 6, size=64)


@pytest.mark.parametrize("format", ["matroska", "webm", "mpegts", "flv"])
def test_no_duration_in_the_header(tmp_path, format):
    """A live recording cannot seek back to write the duration."""
    path = tmp_path / f"v.{ {'matroska': 'mkv', 'mpegts': 'ts'}.get(format, format) }"
    codec, options = ("libvpx-vp9", CODECS["vp9"][2]) if format == "webm" else ("libx264", {"bf": "2"})
    with path.open("wb") as file:

        class Pipe:
            def write(self, data):
                return file.write(data)

        encode(Pipe(), numbered(40), codec, options, format=format)
    with av.open(str(path)) as container:
        assert format in ("mpegts", "flv") or container.duration is None
    info = probe(path)
    assert (info.frames, info.duration) == (pytest.approx(40, abs=1), pytest.approx(4.0, abs=0.2))
    clip = read_video(path, 4, size=64)
    assert clip.indices.tolist() == [5, 15, 25, 35]
    np.testing.assert_allclose(clip.times, container_times(path)[clip.indices] - clock_start(path), atol=1e-6)


def test_frames_before_the_first_key_frame_are_not_shown(tmp_path):
    """A recording that begins between key frames: its packets announce more frames than can be decoded."""
    path = write_kind(tmp_path, "h264-ts")
    data, tables = path.read_bytes(), 3 * 188  # they come first, and are repeated later
    begins = [at for at in range(tables, len(data), 188) if data[at + 1] & 0x40]  # of frames and of tables
    path.write_bytes(data[:tables] + data[begins[15] :])
    announced, shown = container_times(path) - clock_start(path), content(path)
    assert 30 < len(shown.frames) < len(announced) < 60
    clip = read_video(path, 5, size=64, layout="pad", mean=(0, 0, 0))
    middles = ((np.arange(5) + 0.5) * len(shown.frames) / 5).astype(int)
    assert clip.indices.tolist() == middles.tolist()
    np.testing.assert_array_equal(clip.frames[:, 8:56], shown.frames[middles])
    np.testing.assert_allclose(clip.times, shown.times[middles], atol=1e-9)


def test_video_without_frames(tmp_path):
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        container.start_encoding()
    with pytest.raises(MediaError, match=r"v\.mkv: .*(has no frames|not a readable video)"):
        read_video(tmp_path / "v.mkv", 4, size=48)


def test_cover_image_of_a_music_file_is_not_a_video(tmp_path):
    path = tmp_path / "music.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 16000, 0
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    Image.new("RGB", (32, 32), "red").save(tmp_path / "cover.jpg")

    def box(kind, *parts):
        return struct.pack(">I4s", 8 + sum(map(len, parts)), kind) + b"".join(parts)

    picture = box(b"data", struct.pack(">II", 13, 0), (tmp_path / "cover.jpg").read_bytes())
    handler = box(b"hdlr", bytes(8), b"mdirappl", bytes(9))
    cover = box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", box(b"covr", picture))))
    data = path.read_bytes()
    at = data.index(b"moov") - 4
    size = int.from_bytes(data[at : at + 4], "big")
    assert at + size == len(data)  # the last box, so no other box moves
    path.write_bytes(data[:at] + struct.pack(">I", size + len(cover)) + data[at + 4 :] + cover)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    for read in (probe, lambda path: read_video(path, 4, size=32)):
        with pytest.raises(MediaError, match=r"music\.mp4: the file has no video stream"):
            read(path)


# ---- GIF -------------------------------------------------------------------------------------------------


def write_gif(path, count, duration):
    images = [Image.fromarray(each).quantize(64) for each in numbered(count)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)
    return [np.asarray(each.convert("RGB")) for each in images]


def test_gif_with_several_frames_is_a_video(tmp_path):
    lengths = [50, 200, 1000, 50, 300, 40]  # milliseconds
    images = write_gif(tmp_path / "v.gif", 6, lengths)
    clip = read_media(tmp_path / "v.gif", 10, 64, layout="pad", mean=(0, 0, 0))
    np.testing.assert_allclose(clip.times, np.cumsum([0, *lengths[:-1]]) / 1000, atol=1e-9)
    np.testing.assert_array_equal(clip.frames[:, 8:56], images)
    info = probe(tmp_path / "v.gif")
    assert (info.modality, info.frames, info.width, info.height) == ("video", 6, 64, 48)
    assert info.duration == pytest.approx(1.64, abs=0.01)
    ticks = read_media(tmp_path / "v.gif", 10, 64, sampling=Sampling("fps", fps=2.0))
    assert ticks.indices.tolist() == [0, 2, 4]  # shown at 0 s; at 0.5 and 1 s; at 1.5 s
    image = read_media(tmp_path / "v.gif", 10, 64, modality="image", layout="pad", mean=(0, 0, 0))
    np.testing.assert_array_equal(image.frames[:, 8:56], images[:1])
    data = (tmp_path / "v.gif").read_bytes()
    (tmp_path / "v.gif").write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=r"v\.gif: (the file is truncated|not a readable)"):
        read_media(tmp_path / "v.gif", 10, 64)


def test_gif_with_one_frame_is_an_image(tmp_path):
    (picture,) = write_gif(tmp_path / "i.gif", 1, 100)
    clip = read_media(tmp_path / "i.gif", 10, 64, layout="pad", mean=(0, 0, 0))
    np.testing.assert_array_equal(clip.frames[:, 8:56], [picture])
    assert probe(tmp_path / "i.gif") == MediaInfo("image", 0.0, 1, 0.0, 64, 48)


# ---- Names, times, hostile bytes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a:b.mp4", "http:x.mp4", "100%d.mp4", "ein Fülm ?.mp4", "-i.mp4", "V.MP4"])
def test_unusual_file_names(tmp_path, name, monkeypatch):
    encode(tmp_path / "plain.mp4", numbered(4))
    (tmp_path / "plain.mp4").rename(tmp_path / name)
    assert len(read_media(tmp_path / name, 4, 32).frames) == 4
    monkeypatch.chdir(tmp_path)
    assert len(read_media(name, 4, 32).frames) == 4


def test_titles_that_are_not_utf8(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        container.metadata["title"] = "Cafe-Titel"
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(1, 48, 48)[0], format="rgb24")))
        container.mux(stream.encode())
    data = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "v.mp4").write_bytes(data.replace(b"Cafe-Titel", b"Caf\xe9-T\xfctel"))
    assert len(read_media(tmp_path / "v.mp4", 4, 32).frames) == 1


@pytest.mark.parametrize("large", [2**30, 0])
@pytest.mark.parametrize("kind", ["h264", "h264-avi"])
def test_timeout(tmp_path, monkeypatch, large, kind):
    monkeypatch.setattr(video, "_LARGE_FILE", large)
    path = write_kind(tmp_path, kind)
    assert len(read_media(path, 4, 32, timeout=60.0).frames) == 4
    with pytest.raises(
        MediaTimeout, match=r"h264.*: reading the file takes more than 1e-06 s; .*config.data.timeout"
    ):
        read_media(path, 4, 32, timeout=1e-6)


def test_image(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "i.JPG")
    assert probe(tmp_path / "i.JPG") == MediaInfo("image", 0.0, 1, 0.0, 40, 30)
    clip = read_media(tmp_path / "i.JPG", 8, 32)
    assert (clip.frames.shape, clip.times.tolist(), clip.indices.tolist()) == ((1, 32, 32, 3), [0.0], [0])
    for name, text in [("none.mp4", "no such file"), ("none.png", "no such file"), (".", "no such file")]:
        with pytest.raises(MediaError, match=text):
            probe(tmp_path / name)


def test_frames_of_excessive_size_are_refused(tmp_path, monkeypatch):
    path = write_kind(tmp_path, "h264", count=4)
    monkeypatch.setattr(packets, "_MAX_PIXELS", 1000)
    with pytest.raises(MediaError, match=r"h264\.mp4: not a readable video"):
        read_media(path, 4, 32)


FUZZED = ["h264", "h264-mkv", "vp9", "mjpeg-avi", "mpeg4-avi", "gif", "h264-ts", "flv"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed")
    return {kind: write_kind(folder, kind, count=12) for kind in FUZZED}


@settings(deadline=None, derandomize=True, max_examples=150)
@given(kind=st.sampled_from(FUZZED), large=st.sampled_from([0, 2**30]), data=st.data())
def test_any_bytes_are_read_or_refused(originals, kind, large, data):
    path = originals[kind]
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    fuzzed = path.with_name(f"fuzzed{path.suffix}")
    fuzzed.write_bytes(
        bytes(damaged[: data.draw(st.sampled_from([len(whole), len(whole) - 50, len(whole) // 2]))])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "_LARGE_FILE", large)
        with contextlib.suppress(MediaError):
            clip = read_media(fuzzed, 4, 16, timeout=20.0)
            assert clip.frames.shape == (len(clip.times), 16, 16, 3)
            assert 1 <= len(clip.times) <= 4
            assert (np.diff(clip.times) >= 0).all()
        with contextlib.suppress(MediaError):
            assert probe(fuzzed).duration >= 0
