"""Reading files for samples: a second try, decoders that hang, frames that are kept."""

import copy
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dynfocus_jax.data import media_reader as media_lib
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.synthetic import write_video
from dynfocus_jax.errors import MediaError, MediaTimeout
from dynfocus_jax.media.frame_sampling import Sampling
from dynfocus_jax.media.video import Clip, probe, read_media
from dynfocus_jax.records.records import Record

CLIP = Clip(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1), np.zeros(1, np.int32))
RECORD = Record("a", Path("a.mp4"), (("why ?", "because"),), span=(1.0, 2.0))
RNG = np.random.default_rng(0)


@pytest.fixture
def calls(monkeypatch):
    """What `read_media` was asked for; it does what the items of `calls.then` say, the last one for good."""

    class Calls(list):
        then = (lambda: CLIP,)

    made = Calls()

    def read(path, limit, size, **options):
        made.append((path, limit, size, options))
        return made.then[min(len(made), len(made.then)) - 1]()

    monkeypatch.setattr(media_lib, "read_media", read)
    return made


def fail(error):
    def act():
        raise error

    return act


def test_everything_that_reading_depends_on_is_passed(calls):
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


def test_one_more_try(calls):
    calls.then = [fail(MediaError("first")), lambda: CLIP]
    assert MediaReader(8).read(RECORD, 5, RNG) is CLIP
    first, second = (call[3]["rng"].random(4) for call in calls)
    assert first.tolist() == second.tolist(), "the same frames are drawn"

    calls.clear()
    calls.then = [fail(MediaError("first")), fail(MediaError("second")), lambda: CLIP]
    with pytest.raises(MediaError, match="second"):
        MediaReader(8).read(RECORD, 5, RNG)
    assert len(calls) == 2


def test_no_second_try_of_what_takes_too_long(calls):
    calls.then = [fail(MediaTimeout("slow")), lambda: CLIP]
    with pytest.raises(MediaTimeout, match="slow"):
        MediaReader(8).read(RECORD, 5, RNG)
    assert len(calls) == 1


def test_other_errors_are_no_reason_to_skip(calls):
    calls.then = [fail(RuntimeError("a fault of the program"))]
    with pytest.raises(RuntimeError, match="a fault of the program"):
        MediaReader(8).read(RECORD, 5, RNG)


def test_a_decoder_that_hangs_is_left_alone(calls):
    hang = threading.Event()
    calls.then = [lambda: hang.wait(60) and CLIP]
    media = MediaReader(8, timeout=0.1)
    started = time.monotonic()
    with pytest.raises(MediaTimeout, match=r"a\.mp4: reading it takes more than 0\.1 s; .*data\.timeout"):
        media.read(RECORD, 5, RNG)
    assert 0.1 <= time.monotonic() - started < 5
    with pytest.raises(MediaTimeout, match=r"a\.mp4: not tried again"):
        media.read(RECORD, 3, RNG)
    assert len(calls) == 1
    calls.then = [lambda: CLIP]
    other = Record("b", Path("b.mp4"), RECORD.turns)
    assert media.read(other, 5, RNG) is CLIP
    hang.set()


def test_what_is_kept_in_memory(calls):
    media = MediaReader(8, cache_bytes=2 * CLIP.frames.nbytes)
    for record, limit in ((RECORD, 5), (RECORD, 5), (RECORD, 4), (RECORD, 5)):
        media.read(record, limit, RNG)
    assert len(calls) == 2  # one for each limit
    media.read(Record("b", Path("b.mp4"), RECORD.turns), 5, RNG)  # takes the place of the oldest
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
    elsewhere = pickle.loads(pickle.dumps(media))  # a worker process starts with nothing
    elsewhere.read(RECORD, 5, RNG)
    assert len(calls) == 3


def test_count_is_what_reading_gives(tmp_path):
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
