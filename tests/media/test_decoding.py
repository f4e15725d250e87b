"""Frames are exact however they are reached, and no more is read, decoded or kept than they need."""

import gc
import itertools
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from dynfocus_jax.media import decoding, video
from dynfocus_jax.media.frame_sampling import UNIFORM, Sampling, choose_frames, choose_moments, draw, shown_at
from dynfocus_jax.media.video import read_media, read_video
from tests.media.videos import KINDS, REAL, container_times, content, encode, numbered, write_kind

RULES = [UNIFORM, Sampling("fps", fps=3.0), Sampling("segments", pick="random")]
LARGE = {"VideoFrame", "Packet", "ndarray", "Image"}
WAYS = ("_read_around", "_read_near", "_read_through")
THROUGH = {"h264-avi", "mpeg4-avi", "gif"}  # no times that can be trusted
EITHER = {"h264-no-key-frames", "mpeg2"}  # pictures that recover bit by bit; times that libav may guess wrong
AROUND = {kind for kind, (suffix, *_) in KINDS.items() if suffix not in ("ts", "mpg", "wmv", "flv")} - THROUGH


@pytest.fixture
def ways(monkeypatch):
    """The ways that led to frames, one for each file read."""
    taken = []

    def spied(name):
        function = getattr(video, name)

        def spy(*arguments):
            clip = function(*arguments)
            if clip is not None:
                taken.append(name)
            return clip

        return spy

    for name in WAYS:
        monkeypatch.setattr(video, name, spied(name))
    return taken


@pytest.fixture
def packets(monkeypatch):
    """A counter of the packets that were looked at, for whatever reason."""
    counter = [0]
    check = decoding.Deadline.check

    def count(self):
        counter[0] += 1
        check(self)

    monkeypatch.setattr(decoding.Deadline, "check", count)
    return counter


def assert_exact(path, expected, ways, *, numbers=(1, 3, 17, 100), rules=RULES):
    """Whatever is asked for is what decoding everything gives, to the bit."""
    times, size = expected.times, expected.frames.shape[2]
    end = times[-1] + np.median(np.diff(times))
    top = (size - expected.frames.shape[1]) // 2
    for number, rule in itertools.product(numbers, rules):
        options = {"sampling": rule, "rng": np.random.default_rng(7), "layout": "pad", "mean": (0, 0, 0)}
        clip = read_video(path, number, size=size, **options)
        draws = draw(rule, number, np.random.default_rng(7))
        if ways[-1] == "_read_around":
            moments = choose_moments(times[0], end, len(times), rule, number, draws)
            chosen = np.unique(shown_at(times, moments))
        else:
            chosen = choose_frames(times, end, rule, number, draws)
        assert clip.indices.tolist() == chosen.tolist()
        pictures = clip.frames[:, top : top + expected.frames.shape[1]]
        np.testing.assert_array_equal(pictures, expected.frames[chosen])
        np.testing.assert_allclose(clip.times, times[chosen], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_decoding_everything(tmp_path, kind, ways):
    path = write_kind(tmp_path, kind)
    assert_exact(path, content(path), ways)
    if kind in THROUGH:
        assert set(ways) == {"_read_through"}
    elif kind in EITHER:
        assert set(ways) <= {"_read_near", "_read_through"}
    else:
        assert set(ways) == {"_read_near"}


@pytest.mark.parametrize("kind", sorted(AROUND))
def test_of_large_files_too(tmp_path, kind, ways, monkeypatch):
    monkeypatch.setattr(video, "_LARGE", 0)
    path = write_kind(tmp_path, kind)
    assert_exact(path, content(path), ways)
    assert set(ways) == {"_read_around"} or (kind in EITHER and "_read_around" in ways)


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
@pytest.mark.parametrize("large", [2**30, 0])
def test_real_videos(name, ways, monkeypatch, large):
    monkeypatch.setattr(video, "_LARGE", large)
    assert_exact(REAL / name, content(REAL / name), ways, numbers=(6,), rules=RULES[:2])
    assert set(ways) == {"_read_near" if large else "_read_around"}


@pytest.mark.parametrize("large", [2**30, 0])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_that_last_differently(tmp_path, ways, monkeypatch, large, suffix):
    monkeypatch.setattr(video, "_LARGE", large)
    pts = np.cumsum(np.random.default_rng(3).integers(8, 400, 70)).tolist()  # milliseconds
    path = tmp_path / f"v.{suffix}"
    encode(path, numbered(70), options={"g": "12", "bf": "3"}, pts=pts)
    expected, times = content(path), container_times(path)
    np.testing.assert_allclose(times - times[0], np.subtract(pts, pts[0]) / 1000, atol=1e-3)
    options = {"size": 64, "layout": "pad", "mean": (0, 0, 0)}
    clip = read_video(path, 1000, sampling=Sampling("fps", fps=10.0), **options)
    ticks = np.arange(times[0], times[-1], 0.1)
    shown = np.unique(np.searchsorted(times, ticks + 6e-4, side="right") - 1)
    assert len(shown) < len(times) - 5  # some frames are not shown at any tick
    # how long the last one lasts is not known here, and the header, which says when to stop in a large file,
    # may not count the last ones' lengths
    common = min(len(shown), len(clip.times))
    assert common >= len(shown) - (0 if large else 1)
    np.testing.assert_allclose(clip.times[:common], times[shown[:common]], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(clip.frames[:common, 8:56], expected.frames[shown[:common]])
    assert set(ways) == {"_read_near" if large else "_read_around"}


# ---- how much is done ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    """An hour with a key frame every 30 s, 2 frames a second."""
    path = tmp_path_factory.mktemp("hour") / "hour.mp4"
    frames = numbered(160, 32, 32)
    frames = np.broadcast_to(frames[None], (45, *frames.shape)).reshape(-1, 32, 32, 3)
    encode(path, frames, options={"g": "60", "preset": "ultrafast"}, rate=2)
    return path


@pytest.mark.parametrize("large", [2**30, 0])
def test_only_what_is_near_the_wanted_frames_is_decoded(hour, packets, monkeypatch, large):
    monkeypatch.setattr(video, "_LARGE", large)
    clip = read_video(hour, 4, size=32)
    assert clip.indices.tolist() == [900, 2700, 4500, 6300]
    # each 0 to 60 frames behind its key frame; a little more because of the order of decoding
    passes = 1 if large else 2
    everything = 7200 if large else 0
    assert packets[0] <= everything + passes * 4 * (60 + 10)
    assert packets[0] >= everything + 4


def test_memory_is_bounded_by_the_frames_asked_for(hour):
    read_video(hour, 2, size=32)
    tracemalloc.start()
    read_video(hour, 2, size=32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000  # a list of 7200 packets takes three times as much


def test_nothing_of_a_file_outlives_reading_it(tmp_path):
    """Not even until the garbage collector comes: it counts objects, of which a large frame is one."""
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


def test_one_thread_decodes():
    """Samples are read in parallel: threads of the decoder or of the colour conversion would only compete."""
    code = (
        "import os, sys; from dynfocus_jax.media.video import read_video;"
        "threads = lambda: len(os.listdir('/proc/self/task')); before = threads();"
        "read_video(sys.argv[1], 8, size=224); print(threads() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code, REAL / "bikes.mp4"], capture_output=True, text=True)
    assert run.stdout == "0\n", run.stderr
