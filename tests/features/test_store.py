"""The folder of features: what is written is read; what is unfinished, damaged or of others is noticed."""

import itertools
import json
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import ml_dtypes
import numpy as np
import pytest
from absl import flags

from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.errors import MediaError, RunError, UserError
from dynfocus_jax.features.shards import ShardWriter, begin_folder, first_free_number
from dynfocus_jax.features.store import (
    FeatureStore,
    Key,
    Part,
    blank_frame,
    check_storable,
    describe,
    feature_dtype,
    feature_shape,
    key_of,
    open_features,
    read_index,
)
from dynfocus_jax.media.subtitles import Subtitle
from dynfocus_jax.media.video import MediaInfo
from dynfocus_jax.records.records import Record
from tests.tiny import tiny_config

INFO = MediaInfo("video", 4.0, 16, 4.0, 48, 32)


@pytest.fixture
def config():
    config = tiny_config()
    config.model.dtype = "bfloat16"
    return config


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def record(root, name="a.mp4", **fields):
    return Record(name, root / name, (("why ?", "so"),), **fields)


def random_features(config, frames, seed):
    values = np.random.default_rng(seed).standard_normal((frames, *feature_shape(config)))
    return values.astype(feature_dtype(config))


def write(folder, config, media, *, numbers=None, max_bytes=2**20, weights="digest", **description):
    """media: (key, parts, features) of each; the folder is begun, or gone on with."""
    begin_folder(folder, describe(config) | {"weights": weights, "code": {"source": "x"}} | description)
    numbers = iter([first_free_number(folder)]) if numbers is None else numbers
    shards = ShardWriter(folder, numbers, max_bytes=max_bytes, max_seconds=60)
    for key, parts, features in media:
        shards.add(key, INFO, parts, features)
    shards.finish()


def simple(config, name="a.mp4", frames=4, limits=(4,), seed=0, **fields):
    """A medium whose frames are all there for each limit, up to it."""
    features = random_features(config, frames, seed)
    parts = {
        limit: Part(
            list(range(min(limit, frames))),
            [i / 3 for i in range(min(limit, frames))],
            list(range(min(limit, frames))),
        )
        for limit in limits
    }
    return Key(name, fields.get("modality", "video"), fields.get("span")), parts, features


def store(folder, root, config):
    config.data.features = str(folder)
    return FeatureStore(folder, root, config)


# --- Writing and reading ------------------------------------------------------------------------------------


def test_round_trip(tmp_path, root, config):
    """Bit for bit, frames chosen anew, times exact, several media in several shards."""
    features = random_features(config, 5, 0)
    parts = {
        2: Part([1, 4], [0.1, 1 / 3], [7, 2**20]),
        6: Part([0, 1, 1, 2, 3, 4], [0.0, 0.1, 0.2, 1e-9, 1 / 3, 1e6], [0, 7, 8, 9, 10, 11]),
    }
    others = [simple(config, f"{i}/b c.mp4", frames=i, seed=i) for i in range(1, 6)]
    media = [(Key("a.mp4", "video", None), parts, features), *others]
    write(tmp_path / "f", config, media, numbers=itertools.count(3, 4), max_bytes=1)
    names = sorted(path.name for path in (tmp_path / "f").iterdir())
    numbers = [3 + 4 * i for i in range(6)]
    assert names == sorted(
        ["description.json"]
        + [f"features-{number:06d}.{kind}" for number in numbers for kind in ("array_record", "jsonl")]
    )
    read = store(tmp_path / "f", root, config)
    for limit, (rows, times, indices) in parts.items():
        clip = read.read(record(root), limit)
        assert clip.frames.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(clip.frames.view(np.uint16), features[rows].view(np.uint16))
        assert clip.times.dtype == np.float64
        assert clip.times.tolist() == times
        assert clip.indices.dtype == np.int32
        assert clip.indices.tolist() == indices
    for key, _, features in others:
        np.testing.assert_array_equal(read.read(record(root, key.media), 4).frames, features[:4])
    assert read.info(root / "a.mp4") == INFO
    assert type(read.info(root / "a.mp4")) is MediaInfo
    assert (read.weights, read.code) == ("digest", {"source": "x"})


def test_a_file_may_be_several_media(tmp_path, root, config):
    """Two spans, and a GIF as an image and as a video."""
    media = [
        simple(config, "a.gif", span=(0.5, 2.0), seed=1),
        simple(config, "a.gif", span=(0.5, 2.5), seed=2),
        simple(config, "a.gif", frames=1, limits=(1,), modality="image", seed=3),
        simple(config, "a.gif", seed=4),
    ]
    write(tmp_path / "f", config, media)
    read = store(tmp_path / "f", root, config)
    records = [
        record(root, "a.gif", span=(0.5, 2.0)),
        record(root, "a.gif", span=(0.5, 2.5)),
        record(root, "a.gif", modality="image"),
        record(root, "a.gif"),
    ]
    for each, (_, _, features) in zip(records, media, strict=True):
        np.testing.assert_array_equal(read.read(each, 4).frames, features)
    np.testing.assert_array_equal(read.read(records[2], 64).frames, media[2][2])  # an image has one frame


def test_keys(tmp_path):
    root = tmp_path / "data"
    assert key_of(record(root, "x/a.mp4"), root) == Key("x/a.mp4", "video", None)
    assert key_of(record(root, "a.png", modality="image", span=(1.0, 2.0)), root) == Key(
        "a.png", "image", (1, 2)
    )
    outside = tmp_path / "database" / "a.mp4"  # its name begins like the root's
    assert key_of(Record("a", outside, ()), root).media == str(outside)


def test_another_root(tmp_path, config):
    """Data and features may be moved."""
    medium = simple(config)
    write(tmp_path / "f", config, [medium])
    shutil.move(tmp_path / "f", tmp_path / "g")
    read = store(tmp_path / "g", tmp_path / "moved", config)
    np.testing.assert_array_equal(read.read(record(tmp_path / "moved"), 4).frames, medium[2])


def test_the_later_of_two_counts(tmp_path, root, config):
    first, second = simple(config, limits=(4,), seed=1), simple(config, limits=(2, 4), seed=2)
    write(tmp_path / "f", config, [first])
    write(tmp_path / "f", config, [second])
    read = store(tmp_path / "f", root, config)
    np.testing.assert_array_equal(read.read(record(root), 2).frames, second[2][:2])


def test_subtitles(tmp_path, root, config):
    begin_folder(tmp_path / "f", describe(config) | {"weights": None, "code": {}})
    shards = ShardWriter(tmp_path / "f", itertools.count(), max_bytes=2**20, max_seconds=60)
    said = [Subtitle(0.0, 1.5, "hällo"), Subtitle(2.0, 2.0, "\u4f60 \U0001f600")]
    shards.add(Key("a.mp4", "video", None), INFO, *simple(config)[1:], said)
    shards.finish()
    assert store(tmp_path / "f", root, config).subtitles(record(root)) == said


def test_in_threads_and_another_process(tmp_path, root, config):
    media = [simple(config, f"{i}.mp4", seed=i) for i in range(8)]
    write(tmp_path / "f", config, media, numbers=itertools.count(), max_bytes=1)
    read = pickle.loads(pickle.dumps(store(tmp_path / "f", root, config)))

    def right(i):
        return np.array_equal(read.read(record(root, f"{i % 8}.mp4"), 4).frames, media[i % 8][2])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, range(200)))


class _Frames:
    """Reads clips in grain's worker processes."""

    def __init__(self, media, records):
        self.media, self.records = media, records

    def __call__(self, i):
        return self.media.read(self.records[i], 4, np.random.default_rng(0)).frames


def test_grain_carries_bfloat16_between_processes(tmp_path, root, config):
    media = [simple(config, f"{i}.mp4", seed=i) for i in range(4)]
    write(tmp_path / "f", config, media)
    reader = MediaReader(16, features=store(tmp_path / "f", root, config))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    frames = _Frames(reader, [record(root, f"{i}.mp4") for i in range(4)])
    data = grain.MapDataset.range(4).map(frames).to_iter_dataset()
    found = list(data.mp_prefetch(grain.MultiprocessingOptions(num_workers=1)))
    for each, (_, _, features) in zip(found, media, strict=True):
        assert each.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(each, features)


def test_media_reader_reads_features(tmp_path, root, config):
    medium = simple(config, frames=6, limits=(4, 6))
    write(tmp_path / "f", config, [medium])
    config.data.features = str(tmp_path / "f")
    reader = MediaReader(
        16, features=open_features(config, root), blank=blank_frame(config), cache_bytes=2**20
    )
    for limit in (6, 4, 6, 4):  # the second time from memory
        clip = reader.read(record(root), limit, np.random.default_rng(0))
        np.testing.assert_array_equal(clip.frames, medium[2][:limit])
    info = reader.info(root / "a.mp4")
    assert info == INFO
    assert reader.count(info, record(root), 6) == 6
    assert reader.blank.shape == feature_shape(config)
    assert reader.blank.dtype == ml_dtypes.bfloat16
    with pytest.raises(MediaError, match=r"b\.mp4: .* has no features of it"):
        reader.read(record(root, "b.mp4"), 4, np.random.default_rng(0))


def test_pixels_where_no_features_are_named(root, config):
    assert config.data.features is None
    assert open_features(config, root) is None
    assert blank_frame(config) is None


# --- What is missing ----------------------------------------------------------------------------------------


def test_what_was_not_extracted(tmp_path, root, config):
    write(tmp_path / "f", config, [simple(config, limits=(2, 4))])
    read = store(tmp_path / "f", root, config)
    there, other = record(root), record(root, "b.mp4")
    assert read.missing(there, [2, 4]) is None
    assert "for 2, 4 frames, not for 8" in read.missing(there, [2, 8])
    assert "no features of it" in read.missing(other, [2])
    assert "no features of it" in read.missing(record(root, span=(0.0, 1.0)), [2])
    with pytest.raises(MediaError, match="for 2, 4 frames, not for 8"):
        read.read(there, 8)
    with pytest.raises(MediaError, match=r"b\.mp4: .*no features of it, see its skipped\.jsonl"):
        read.read(other, 2)
    with pytest.raises(MediaError, match="no features of it"):
        read.info(root / "b.mp4")
    text = Record("t", None, (("why ?", "so"),))
    read.require([there, there, text, other], [2], 0.34)
    with pytest.raises(UserError, match=r"1 of 3 records have no features, .* share of 0\.33"):
        read.require([there, there, text, other], [2], 0.33)
    with pytest.raises(UserError, match="not for 8"):
        read.require([there], [2, 8], 0.0)


def test_random_frames_and_frames_by_text_are_refused(config):
    check_storable(config)
    config.data.sampling.update({"kind": "segments", "pick": "middle"})
    check_storable(config)
    config.data.sampling.pick = "random"
    with pytest.raises(UserError, match=r"config\.data\.sampling\.pick is 'random'"):
        check_storable(config)
    config.data.sampling.kind = "uniform"  # which draws nothing
    check_storable(config)
    config.stages[1].on_overflow = "fewer_frames"
    with pytest.raises(UserError, match=r"config\.stages\[1\]\.on_overflow is 'fewer_frames'"):
        check_storable(config)


# --- What is damaged ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, config):
    write(tmp_path / "f", config, [simple(config)])
    return tmp_path / "f"


def test_every_damaged_byte_of_the_data_is_noticed(folder, root, config):
    """What is read is what was written, or an error, wherever a bit is flipped."""
    shard = folder / "features-000000.array_record"
    whole = shard.read_bytes()
    clip = store(folder, root, config).read(record(root), 4)
    payload = clip.frames[2].tobytes()
    begin = whole.index(payload)
    noticed = 0
    for place in [begin, begin + len(payload) // 2, begin + len(payload) - 1, *range(0, len(whole), 4001)]:
        content = bytearray(whole)
        content[place] ^= 0x10
        shard.write_bytes(content)
        again, error = outcome(store(folder, root, config), record(root))
        if error:
            assert str(shard) in error
            assert "delete features-000000.jsonl" in error
            noticed += 1
        else:
            np.testing.assert_array_equal(again.frames, clip.frames)
            assert not begin <= place < begin + len(payload)
    assert noticed >= 3


def outcome(read, record):
    """The clip, or what is said instead."""
    try:
        return read.read(record, 4), ""
    except MediaError as error:
        return None, str(error)


def test_shards_that_were_swapped(tmp_path, root, config):
    """Both are whole, and of one size: only our own checksums tell."""
    media = [simple(config, f"{i}.mp4", seed=i) for i in range(2)]
    write(tmp_path / "f", config, media, numbers=itertools.count(), max_bytes=1)
    one, two = sorted((tmp_path / "f").glob("*.array_record"))
    assert one.stat().st_size == two.stat().st_size
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    with pytest.raises(MediaError, match="record 0 has another checksum"):
        store(tmp_path / "f", root, config).read(record(root, "0.mp4"), 4)


def test_a_shard_that_is_missing_or_cut(folder, root, config):
    shard = folder / "features-000000.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"has {len(content) - 1} bytes, expected {len(content)}"):
        store(folder, root, config)
    shard.unlink()
    with pytest.raises(UserError, match=r"features-000000\.array_record is missing"):
        store(folder, root, config)


def test_a_shard_that_goes_away_while_it_is_used(folder, root, config):
    read = store(folder, root, config)
    (folder / "features-000000.array_record").unlink()
    with pytest.raises(MediaError, match="cannot be opened"):
        read.read(record(root), 4)


@pytest.mark.parametrize("text", ["", "x", "{}\n", '{"shard": "a", "bytes": 1}\n{"media": 1}\n', "[]\n"])
def test_a_damaged_index(folder, root, config, text):
    (folder / "features-000000.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"features-000000\.jsonl is damaged"):
        store(folder, root, config)


def test_what_a_killed_run_leaves_is_removed(folder, config):
    """Drafts, and shards without their index: before that is there, a shard is not finished."""
    left = ["features-000001.array_record", "features-000002.array_record.tmp", "features-000002.jsonl.tmp"]
    for name in [*left, "skipped.jsonl", "skipped.3.jsonl"]:
        (folder / name).write_text("left")
    assert list(read_index(folder)) == [Key("a.mp4", "video", None)]
    write(folder, config, [simple(config, "b.mp4")])
    assert sorted(path.name for path in folder.iterdir()) == [
        "description.json",
        "features-000000.array_record",
        "features-000000.jsonl",
        "features-000001.array_record",
        "features-000001.jsonl",
    ]
    assert [key.media for key in read_index(folder)] == ["a.mp4", "b.mp4"]


def test_a_shard_ends_when_it_is_large_or_old(tmp_path, config):
    size = 4 * feature_dtype(config).itemsize * int(np.prod(feature_shape(config)))
    begin_folder(tmp_path, describe(config) | {"weights": None, "code": {}})
    for max_bytes, max_seconds, shards in ((2 * size, 60, 2), (10**9, -1.0, 4), (10**9, 60, 0)):
        before = len(list(tmp_path.glob("features-*.jsonl")))
        numbers = itertools.count(first_free_number(tmp_path))
        writer = ShardWriter(tmp_path, numbers, max_bytes=max_bytes, max_seconds=max_seconds)
        for i in range(4):
            writer.add(*simple_with_info(config, f"{i}.mp4"))
        assert len(list(tmp_path.glob("features-*.jsonl"))) - before == shards
        writer.finish()
        writer.finish()  # nothing is open
        assert len(read_index(tmp_path)) == 4


def simple_with_info(config, name):
    key, parts, features = simple(config, name)
    return key, INFO, parts, features


def test_a_folder_that_cannot_be_written(tmp_path, config):
    writer = ShardWriter(tmp_path / "nowhere", itertools.count(), max_bytes=1, max_seconds=60)
    with pytest.raises(RunError, match=r"cannot be written .* Finished shards are kept"):
        writer.add(*simple_with_info(config, "a.mp4"))


# --- What is of others --------------------------------------------------------------------------------------


CHANGES = {
    "vision.width": lambda c: c.model.vision.update({"width": 32}),
    "vision.mean": lambda c: c.model.vision.update({"mean": (0.5, 0.5, 0.5)}),
    "vision.select_layer": lambda c: c.model.vision.update({"select_layer": -2}),
    "sampling.kind": lambda c: c.data.sampling.update({"kind": "fps"}),
    "image_layout": lambda c: c.data.update({"image_layout": "pad"}),
    "dtype": lambda c: c.model.update({"dtype": "float32"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused(folder, root, config, name):
    before = Path(folder / "description.json").read_text()
    CHANGES[name](config)
    with pytest.raises(
        UserError, match=f"differ from this configuration's .*{re.escape(name)}: there .*, here"
    ):
        store(folder, root, config)
    with pytest.raises(UserError, match=f"--output .* has features of another tower .*{name}"):
        write(folder, config, [])
    assert Path(folder / "description.json").read_text() == before


def test_settings_of_speed_may_differ(folder, root, config):
    config.model.vision.update({"remat": "full"})
    store(folder, root, config)


def test_another_tower_is_refused(folder, config):
    with pytest.raises(UserError, match="weights: there digest, here other"):
        write(folder, config, [], weights="other")


def test_movies_and_towers_share_a_folder(tmp_path, root, config):
    """Features that were given say nothing of the tower; the first that are computed do, for good."""
    folder = tmp_path / "f"
    for weights, kept in ((None, None), ("one", "one"), (None, "one"), ("one", "one")):
        write(folder, config, [simple(config, f"{weights}.mp4")], weights=weights)
        assert store(folder, root, config).weights == kept
    assert len(read_index(folder)) == 2
    with pytest.raises(UserError, match="weights: there one, here two"):
        write(folder, config, [], weights="two")


def test_no_folder(tmp_path, root, config):
    with pytest.raises(
        UserError, match=r"holds no description\.json; make it with python -m dynfocus_jax\.extract"
    ):
        store(tmp_path / "nothing", root, config)
    (tmp_path / "description.json").write_text("{")
    with pytest.raises(UserError, match=r"description\.json is damaged"):
        store(tmp_path, root, config)


def test_description_is_readable(folder, config):
    described = json.loads((folder / "description.json").read_text())
    assert described["vision"]["width"] == config.model.vision.width
    assert described["dtype"] == "bfloat16"
    assert "remat" not in described["vision"]
