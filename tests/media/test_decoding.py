"""Frames are exact, whichever way they are read, and no more than necessary is read, decoded or kept."""

import gc
import itertools
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from dynfocus_jax.media import video
from dynfocus_jax.media.frame_sampling import (
    UNIFORM,
    Sampling,
    choose_frames,
    choose_times,
    draw_positions,
    frames_shown_at,
)
from dynfocus_jax.media.timeouts import Deadline
from dynfocus_jax.media.video import read_media, read_video
from tests.media.videos import KINDS, REAL, container_times, content, encode, numbered, write_kind

RULES = [UNIFORM, Sampling("fps", fps=3.0), Sampling("segments", pick="random")]
LARGE = {"VideoFrame", "Packet", "ndarray", "Image"}
READERS = ("_read_by_seeking", "_read_indexed", "_read_sequentially")
SEQUENTIAL = {"h264-avi", "mpeg4-avi", "gif"}  # their timestamps are not reliable
EITHER = {"h264-no-key-frames", "mpeg2"}  # gradual refresh; pts that libav may guess wrongly
UNSEEKABLE = ("ts", "mpg", "wmv", "flv")  # suffixes; these containers do not tell whether they are truncated
SEEKABLE = {kind for kind, (suffix, *_) in KINDS.items() if suffix not in UNSEEKABLE} - SEQUENTIAL


@pytest.fixture
def used_readers(monkeypatch):
    """Names of the functions that read the frames, one for each file read."""
    taken = []

    def spy_on(name):
        function = getattr(video, name)

        def spy(*arguments):
            clip = function(*arguments)
            if clip is not None:
                taken.append(name)
            return clip

        return spy

    for name in READERS:
        monkeypatch.setattr(video, name, spy_on(name))
    return taken


@pytest.fixture
def packets(monkeypatch):
    """A counter of the packets that are read."""
    counter = [0]
    check = Deadline.check

    def count(self):
        counter[0] += 1
        check(self)

    monkeypatch.setattr(Deadline, "check", count)
    return counter


def assert_exact(path, expected, used_readers, *, numbers=(1, 3, 17, 100), rules=RULES):
    """Check that sampled frames are bitwise those of decoding the whole file."""
    times, size = expected.times, expected.frames.shape[2]
    end = times[-1] + np.median(np.diff(times))
    top = (size - expected.frames.shape[1]) // 2
    for number, rule in itertools.product(numbers, rules):
        options = {"sampling": rule, "rng": np.random.default_rng(7), "layout": "pad", "mean": (0, 0, 0)}
        clip = read_video(path, number, size=size, **options)
        draws = draw_positions(rule, number, np.random.default_rng(7))
        if used_readers[-1] == "_read_by_seeking":
            moments = choose_times(times[0], end, len(times), rule, number, draws)
            chosen = np.unique(frames_shown_at(times, moments))
        else:
            chosen = choose_frames(times, end, rule, number, draws)
        assert clip.indices.tolist() == chosen.tolist()
        images = clip.frames[:, top : top + expected.frames.shape[1]]
        np.testing.assert_array_equal(images, expected.frames[chosen])
        np.testing.assert_allclose(clip.times, times[chosen], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_equal_those_of_decoding_the_whole_file(tmp_path, kind, used_readers):
    path = write_kind(tmp_path, kind)
    assert_exact(path, content(path), used_readers)
    if kind in SEQUENTIAL:
        assert set(used_readers) == {"_read_sequentially"}
    elif kind in EITHER:
        assert set(used_readers) <= {"_read_indexed", "_read_sequentially"}
    else:
        assert set(used_readers) == {"_read_indexed"}


@pytest.mark.parametrize("kind", sorted(SEEKABLE))
def test_frames_of_large_files(tmp_path, kind, used_readers, monkeypatch):
    monkeypatch.setattr(video, "_LARGE_FILE", 0)
    path = write_kind(tmp_path, kind)
    assert_exact(path, content(path), used_readers)
    assert set(used_readers) == {"_read_by_seeking"} or (
        kind in EITHER and "_read_by_seeking" in used_readers
    )


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
@pytest.mark.parametrize("large", [2**30, 0])
def test_real_videos(name, used_readers, monkeypatch, large):
    monkeypatch.setattr(video, "_LARGE_FILE", large)
    assert_exact(REAL / name, content(REAL / name), used_readers, numbers=(6,), rules=RULES[:2])
    assert set(used_readers) == {"_read_indexed" if large else "_read_by_seeking"}


@pytest.mark.parametrize("large", [2**30, 0])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate(tmp_path, used_readers, monkeypatch, large, suffix):
    monkeypatch.setattr(video, "_LARGE_FILE", large)
    pts = np.cumsum(np.random.default_rng(3).integers(8, 400, 70)).tolist()  # milliseconds
    path = tmp_path / f"v.{suffix}"
    encode(path, numbered(70), options={"g": "12", "bf": "3"}, pts=pts)
    expected, times = content(path), container_times(path)
    np.testing.assert_allclose(times - times[0], np.subtract(pts, pts[0]) / 1000, atol=1e-3)
    options = {"size": 64, "layout": "pad", "mean": (0, 0, 0)}
    clip = read_video(path, 1000, sampling=Sampling("fps", fps=10.0), **options)
    steps = np.arange(times[0], times[-1], 0.1)
    shown = np.unique(np.searchsorted(times, steps + 6e-4, side="right") - 1)
    assert len(shown) < len(times) - 5  # some frames are not shown at any of these times
    # The duration of the last frame is unknown here, and the header, which gives the end of a large file, may
    # not include the last frames.
    common = min(len(shown), len(clip.times))
    assert common >= len(shown) - (0 if large else 1)
    np.testing.assert_allclose(clip.times[:common], times[shown[:common]], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(clip.frames[:common, 8:56], expected.frames[shown[:common]])
    assert set(used_readers) == {"_read_indexed" if large else "_read_by_seeking"}


# ---- Amount of work --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    """An hour of video with 2 frames per second and a key frame every 30 s."""
    path = tmp_path_factory.mktemp("hour") / "hour.mp4"
    frames = numbered(160, 32, 32)
    frames = np.broadcast_to(frames[None], (45, *frames.shape)).reshape(-1, 32, 32, 3)
    encode(path, frames, options={"g": "60", "preset": "ultrafast"}, rate=2)
    return path


@pytest.mark.parametrize("large", [2**30, 0])
def test_only_packets_near_the_wanted_frames_are_read(hour, packets, monkeypatch, large):
    monkeypatch.setattr(video, "_LARGE_FILE", large)
    clip = read_video(hour, 4, size=32)
    assert clip.indices.tolist() == [900, 2700, 4500, 6300]
    # Each frame is 0 to 60 frames after its key frame; reordering adds a few packets.
    passes = 1 if large else 2
    everything = 7200 if large else 0
    assert packets[0] <= everything + passes * 4 * (60 + 10)
    assert packets[0] >= everything + 4


def test_memory_does_not_grow_with_the_length_of_the_video(hour):
    read_video(hour, 2, size=32)
    tracemalloc.start()
    read_video(hour, 2, size=32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000  # a list of 7200 packets takes three times as much memory


def test_no_frame_outlives_reading(tmp_path):
    """Frames must not wait for the garbage collector, which counts objects, not their bytes."""
    paths = [write_kind(tmp_path, kind, count=12) for kind in ("h264", "h264-avi", "vp9", "gif")]
    for path in paths:
        read_media(path, 4, 32)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for path in paths:
            read_media(path, 4, 32)
        gc.collect()
        left = [
            each for each in gc.garbage if type(each).__name__ in LARGE and getattr(each, "width", 99) > 16
        ]
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
    assert left == []


def test_decoding_uses_one_thread():
    """Files are read in parallel, so further threads would only compete for the cores."""
    code = (
        "import os, sys; from dynfocus_jax.media.video import read_video;"
        "threads = lambda: len(os.listdir('/proc/self/task')); before = threads();"
        "read_video(sys.argv[1], 8, size=224); print(threads() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code, REAL / "bikes.mp4"], capture_output=True, text=True)
    assert run.stdout == "0\n", run.stderr
