"""Reading files: the second attempt, the timeout and the cache."""

import copy
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dynfocus_jax.data import media_reader as media_lib
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.synthetic_frames import write_video
from dynfocus_jax.errors import MediaError, MediaTimeout
from dynfocus_jax.media.frame_sampling import Sampling
from dynfocus_jax.media.video import Clip, probe, read_media
from dynfocus_jax.records.records import Record

CLIP = Clip(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1), np.zeros(1, np.int32))
RECORD = Record("a", Path("a.mp4"), (("why ?", "because"),), span=(1.0, 2.0))
RNG = np.random.default_rng(0)


@pytest.fixture
def calls(monkeypatch):
    """Calls of a replaced `read_media`, which returns the result of `results[i]`, or of the last one."""

    class Calls(list):
        results = (lambda: CLIP,)

    recorded = Calls()

    def read(path, limit, size, **options):
        recorded.append((path, limit, size, options))
        return recorded.results[min(len(recorded), len(recorded.results)) - 1]()

    monkeypatch.setattr(media_lib, "read_media", read)
    return recorded


def raising(error):
    def raise_error():
        raise error

    return raise_error


def test_arguments_of_read_media(calls):
    sampling = Sampling(kind="segments", pick="random")
    media = MediaReader(8, sampling=sampling, layout="pad", mean=(0.1, 0.2, 0.3), timeout=7.0)
    assert media.read(RECORD, 5, RNG) is CLIP
    ((path, limit, size, options),) = calls
    assert (path, limit, size) == (Path("a.mp4"), 5, 8)
    assert options.pop("rng").random() == copy.deepcopy(RNG).random()
    assert options == {
        "span": (1.0, 2.0),
        "modality": "video",
        "sampling": sampling,
        "layout": "pad",
        "mean": (0.1, 0.2, 0.3),
        "timeout": 7.0,
    }


def test_second_attempt(calls):
    calls.results = [raising(MediaError("first")), lambda: CLIP]
    assert MediaReader(8).read(RECORD, 5, RNG) is CLIP
    first, second = (call[3]["rng"].random(4) for call in calls)
    assert first.tolist() == second.tolist(), "both attempts draw the same frames"

    calls.clear()
    calls.results = [raising(MediaError("first")), raising(MediaError("second")), lambda: CLIP]
    with pytest.raises(MediaError, match="second"):
        MediaReader(8).read(RECORD, 5, RNG)
    assert len(calls) == 2


def test_no_second_attempt_after_a_timeout(calls):
    calls.results = [raising(MediaTimeout("slow")), lambda: CLIP]
    with pytest.raises(MediaTimeout, match="slow"):
        MediaReader(8).read(RECORD, 5, RNG)
    assert len(calls) == 1


def test_other_exceptions_are_raised(calls):
    calls.results = [raising(RuntimeError("a bug"))]
    with pytest.raises(RuntimeError, match="a bug"):
        MediaReader(8).read(RECORD, 5, RNG)


def test_hanging_decoder_is_abandoned(calls):
    hang = threading.Event()
    calls.results = [lambda: hang.wait(60) and CLIP]
    media = MediaReader(8, timeout=0.1)
    started = time.monotonic()
    with pytest.raises(
        MediaTimeout, match=r"a\.mp4: reading the file takes more than 0\.1 s; .*data\.timeout"
    ):
        media.read(RECORD, 5, RNG)
    assert 0.1 <= time.monotonic() - started < 5
    with pytest.raises(MediaTimeout, match=r"a\.mp4: skipped, because"):
        media.read(RECORD, 3, RNG)
    assert len(calls) == 1
    calls.results = [lambda: CLIP]
    other = Record("b", Path("b.mp4"), RECORD.turns)
    assert media.read(other, 5, RNG) is CLIP
    hang.set()


def test_cache(calls):
    media = MediaReader(8, cache_bytes=2 * CLIP.frames.nbytes)
    for record, limit in ((RECORD, 5), (RECORD, 5), (RECORD, 4), (RECORD, 5)):
        media.read(record, limit, RNG)
    assert len(calls) == 2  # one per limit
    media.read(Record("b", Path("b.mp4"), RECORD.turns), 5, RNG)  # replaces the least recently used
    media.read(RECORD, 5, RNG)
    assert len(calls) == 3
    media.read(RECORD, 4, RNG)
    assert len(calls) == 4
    other = Record("a", Path("a.mp4"), RECORD.turns, span=(2.0, 3.0))
    media.read(other, 4, RNG)
    assert len(calls) == 5

    calls.clear()
    drawn = MediaReader(8, cache_bytes=2**20, sampling=Sampling(kind="segments", pick="random"))
    for _ in range(2):
        drawn.read(RECORD, 5, RNG)
    assert len(calls) == 2
    copied = pickle.loads(pickle.dumps(media))  # a worker process starts with an empty cache
    copied.read(RECORD, 5, RNG)
    assert len(calls) == 3


def test_count_frames(tmp_path):
    write_video(tmp_path / "v.mp4", np.zeros((23, 48, 48, 3), np.uint8))
    for sampling in (Sampling(), Sampling("fps", fps=2.0), Sampling("segments"), Sampling("fps", 5.0, 8, 4)):
        for span in (None, (0.3, 1.5)):
            media = MediaReader(48, sampling=sampling)
            record = Record("v", tmp_path / "v.mp4", RECORD.turns, span=span)
            info = media.info(record.media)
            assert info == probe(record.media)
            for limit in (1, 3, 40):
                clip = media.read(record, limit, RNG)
                assert media.count_frames(info, record, limit) == len(clip.frames), (sampling, span, limit)
                expected = read_media(record.media, limit, 48, sampling=sampling, span=span)
                np.testing.assert_array_equal(clip.frames, expected.frames)
