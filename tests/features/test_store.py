"""Stored features: round trips, and errors for missing, unfinished, damaged and incompatible ones."""

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
from dynfocus_jax.features.shards import ShardWriter, next_shard_number, prepare_folder
from dynfocus_jax.features.store import (
    FeatureStore,
    FrameSelection,
    MediaKey,
    blank_frame,
    check_storable,
    describe_features,
    feature_dtype,
    feature_shape,
    media_key,
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
    """Write media, each as (key, selections, features), into a new folder or an existing one."""
    prepare_folder(
        folder, describe_features(config) | {"weights": weights, "code": {"source": "x"}} | description
    )
    shard_numbers = iter([next_shard_number(folder)]) if numbers is None else numbers
    shards = ShardWriter(folder, shard_numbers, max_bytes=max_bytes, max_seconds=60)
    for key, selections, features in media:
        shards.add(key, INFO, selections, features)
    shards.finish()


def make_item(config, name="a.mp4", frames=4, limits=(4,), seed=0, **fields):
    """Return (key, selections, features) of a media item whose first frames are selected for each limit."""
    features = random_features(config, frames, seed)
    selections = {
        limit: FrameSelection(
            list(range(min(limit, frames))),
            [i / 3 for i in range(min(limit, frames))],
            list(range(min(limit, frames))),
        )
        for limit in limits
    }
    return MediaKey(name, fields.get("modality", "video"), fields.get("span")), selections, features


def open_store(folder, root, config):
    config.data.features = str(folder)
    return FeatureStore(folder, root, config)


# --- Writing and reading ------------------------------------------------------------------------------------


def test_round_trip(tmp_path, root, config):
    """Features and times are read back bit for bit, for several limits, media and shards."""
    features = random_features(config, 5, 0)
    selections = {
        2: FrameSelection([1, 4], [0.1, 1 / 3], [7, 2**20]),
        6: FrameSelection([0, 1, 1, 2, 3, 4], [0.0, 0.1, 0.2, 1e-9, 1 / 3, 1e6], [0, 7, 8, 9, 10, 11]),
    }
    others = [make_item(config, f"{i}/b c.mp4", frames=i, seed=i) for i in range(1, 6)]
    media = [(MediaKey("a.mp4", "video", None), selections, features), *others]
    write(tmp_path / "f", config, media, numbers=itertools.count(3, 4), max_bytes=1)
    names = sorted(path.name for path in (tmp_path / "f").iterdir())
    numbers = [3 + 4 * i for i in range(6)]
    assert names == sorted(
        ["description.json"]
        + [f"features-{number:06d}.{kind}" for number in numbers for kind in ("array_record", "jsonl")]
    )
    stored = open_store(tmp_path / "f", root, config)
    for limit, (rows, times, indices) in selections.items():
        clip = stored.read(record(root), limit)
        assert clip.frames.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(clip.frames.view(np.uint16), features[rows].view(np.uint16))
        assert clip.times.dtype == np.float64
        assert clip.times.tolist() == times
        assert clip.indices.dtype == np.int32
        assert clip.indices.tolist() == indices
    for key, _, features in others:
        np.testing.assert_array_equal(stored.read(record(root, key.media), 4).frames, features[:4])
    assert stored.info(root / "a.mp4") == INFO
    assert type(stored.info(root / "a.mp4")) is MediaInfo
    assert (stored.weights_digest, stored.code) == ("digest", {"source": "x"})


def test_several_media_items_of_a_file(tmp_path, root, config):
    """Two spans of a GIF, and the GIF as an image and as a video."""
    media = [
        make_item(config, "a.gif", span=(0.5, 2.0), seed=1),
        make_item(config, "a.gif", span=(0.5, 2.5), seed=2),
        make_item(config, "a.gif", frames=1, limits=(1,), modality="image", seed=3),
        make_item(config, "a.gif", seed=4),
    ]
    write(tmp_path / "f", config, media)
    stored = open_store(tmp_path / "f", root, config)
    records = [
        record(root, "a.gif", span=(0.5, 2.0)),
        record(root, "a.gif", span=(0.5, 2.5)),
        record(root, "a.gif", modality="image"),
        record(root, "a.gif"),
    ]
    for each, (_, _, features) in zip(records, media, strict=True):
        np.testing.assert_array_equal(stored.read(each, 4).frames, features)
    np.testing.assert_array_equal(stored.read(records[2], 64).frames, media[2][2])  # an image has one frame


def test_media_keys(tmp_path):
    root = tmp_path / "data"
    assert media_key(record(root, "x/a.mp4"), root) == MediaKey("x/a.mp4", "video", None)
    assert media_key(record(root, "a.png", modality="image", span=(1.0, 2.0)), root) == MediaKey(
        "a.png", "image", (1, 2)
    )
    outside = tmp_path / "database" / "a.mp4"  # its name starts with the name of the root
    assert media_key(Record("a", outside, ()), root).media == str(outside)


def test_moved_folders(tmp_path, config):
    """The data root and the folder of features can be moved."""
    item = make_item(config)
    write(tmp_path / "f", config, [item])
    shutil.move(tmp_path / "f", tmp_path / "g")
    stored = open_store(tmp_path / "g", tmp_path / "moved", config)
    np.testing.assert_array_equal(stored.read(record(tmp_path / "moved"), 4).frames, item[2])


def test_later_entry_replaces_earlier(tmp_path, root, config):
    first, second = make_item(config, limits=(4,), seed=1), make_item(config, limits=(2, 4), seed=2)
    write(tmp_path / "f", config, [first])
    write(tmp_path / "f", config, [second])
    stored = open_store(tmp_path / "f", root, config)
    np.testing.assert_array_equal(stored.read(record(root), 2).frames, second[2][:2])


def test_subtitles(tmp_path, root, config):
    prepare_folder(tmp_path / "f", describe_features(config) | {"weights": None, "code": {}})
    shards = ShardWriter(tmp_path / "f", itertools.count(), max_bytes=2**20, max_seconds=60)
    subtitles = [Subtitle(0.0, 1.5, "hällo"), Subtitle(2.0, 2.0, "\u4f60 \U0001f600")]
    shards.add(MediaKey("a.mp4", "video", None), INFO, *make_item(config)[1:], subtitles)
    shards.finish()
    assert open_store(tmp_path / "f", root, config).subtitles(record(root)) == subtitles


def test_threads_and_pickling(tmp_path, root, config):
    media = [make_item(config, f"{i}.mp4", seed=i) for i in range(8)]
    write(tmp_path / "f", config, media, numbers=itertools.count(), max_bytes=1)
    stored = pickle.loads(pickle.dumps(open_store(tmp_path / "f", root, config)))

    def is_exact(i):
        return np.array_equal(stored.read(record(root, f"{i % 8}.mp4"), 4).frames, media[i % 8][2])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_exact, range(200)))


class _ReadFrames:
    """Reads the frames of a record in grain's worker processes."""

    def __init__(self, media, records):
        self.media, self.records = media, records

    def __call__(self, i):
        return self.media.read(self.records[i], 4, np.random.default_rng(0)).frames


def test_grain_carries_bfloat16_between_processes(tmp_path, root, config):
    media = [make_item(config, f"{i}.mp4", seed=i) for i in range(4)]
    write(tmp_path / "f", config, media)
    reader = MediaReader(16, features=open_store(tmp_path / "f", root, config))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    frames = _ReadFrames(reader, [record(root, f"{i}.mp4") for i in range(4)])
    data = grain.MapDataset.range(4).map(frames).to_iter_dataset()
    found = list(data.mp_prefetch(grain.MultiprocessingOptions(num_workers=1)))
    for each, (_, _, features) in zip(found, media, strict=True):
        assert each.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(each, features)


def test_media_reader_reads_features(tmp_path, root, config):
    item = make_item(config, frames=6, limits=(4, 6))
    write(tmp_path / "f", config, [item])
    config.data.features = str(tmp_path / "f")
    reader = MediaReader(
        16, features=open_features(config, root), blank=blank_frame(config), cache_bytes=2**20
    )
    for limit in (6, 4, 6, 4):  # the second time from the cache
        clip = reader.read(record(root), limit, np.random.default_rng(0))
        np.testing.assert_array_equal(clip.frames, item[2][:limit])
    info = reader.info(root / "a.mp4")
    assert info == INFO
    assert reader.count_frames(info, record(root), 6) == 6
    assert reader.blank.shape == feature_shape(config)
    assert reader.blank.dtype == ml_dtypes.bfloat16
    with pytest.raises(MediaError, match=r"b\.mp4: .* has no features of it"):
        reader.read(record(root, "b.mp4"), 4, np.random.default_rng(0))


def test_no_features_configured(root, config):
    assert config.data.features is None
    assert open_features(config, root) is None
    assert blank_frame(config) is None


# --- Missing features ---------------------------------------------------------------------------------------


def test_media_that_were_not_extracted(tmp_path, root, config):
    write(tmp_path / "f", config, [make_item(config, limits=(2, 4))])
    stored = open_store(tmp_path / "f", root, config)
    there, other = record(root), record(root, "b.mp4")
    assert stored.missing_reason(there, [2, 4]) is None
    assert "for 2, 4 frames, not for 8" in stored.missing_reason(there, [2, 8])
    assert "no features of it" in stored.missing_reason(other, [2])
    assert "no features of it" in stored.missing_reason(record(root, span=(0.0, 1.0)), [2])
    with pytest.raises(MediaError, match="for 2, 4 frames, not for 8"):
        stored.read(there, 8)
    with pytest.raises(MediaError, match=r"b\.mp4: .*no features of it; check .* skipped\.jsonl"):
        stored.read(other, 2)
    with pytest.raises(MediaError, match="no features of it"):
        stored.info(root / "b.mp4")
    text = Record("t", None, (("why ?", "so"),))
    stored.check_coverage([there, there, text, other], [2], 0.34)
    with pytest.raises(UserError, match=r"1 of 3 records have no features, .*max_skip_share = 0\.33"):
        stored.check_coverage([there, there, text, other], [2], 0.33)
    with pytest.raises(UserError, match="not for 8"):
        stored.check_coverage([there], [2, 8], 0.0)


def test_configurations_that_do_not_determine_frames(config):
    check_storable(config)
    config.data.sampling.update({"kind": "segments", "pick": "middle"})
    check_storable(config)
    config.data.sampling.pick = "random"
    with pytest.raises(UserError, match=r"config\.data\.sampling\.pick is 'random'"):
        check_storable(config)
    config.data.sampling.kind = "uniform"  # which ignores `pick`
    check_storable(config)
    config.stages[1].on_overflow = "fewer_frames"
    with pytest.raises(UserError, match=r"config\.stages\[1\]\.on_overflow is 'fewer_frames'"):
        check_storable(config)


# --- Damaged files ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, config):
    write(tmp_path / "f", config, [make_item(config)])
    return tmp_path / "f"


def test_damaged_bytes_are_detected(folder, root, config):
    """Wherever a bit is flipped, reading returns the original features or an error."""
    shard = folder / "features-000000.array_record"
    whole = shard.read_bytes()
    clip = open_store(folder, root, config).read(record(root), 4)
    payload = clip.frames[2].tobytes()
    begin = whole.index(payload)
    num_detected = 0
    for place in [begin, begin + len(payload) // 2, begin + len(payload) - 1, *range(0, len(whole), 4001)]:
        content = bytearray(whole)
        content[place] ^= 0x10
        shard.write_bytes(content)
        damaged, error = read_or_error(open_store(folder, root, config), record(root))
        if error:
            assert str(shard) in error
            assert "remove features-000000.jsonl" in error
            num_detected += 1
        else:
            np.testing.assert_array_equal(damaged.frames, clip.frames)
            assert not begin <= place < begin + len(payload)
    assert num_detected >= 3


def read_or_error(stored, record):
    """Return the clip and an empty message, or None and the error message."""
    try:
        return stored.read(record, 4), ""
    except MediaError as error:
        return None, str(error)


def test_swapped_shards(tmp_path, root, config):
    """Two complete shards of the same size: only the checksum of the header detects the swap."""
    media = [make_item(config, f"{i}.mp4", seed=i) for i in range(2)]
    write(tmp_path / "f", config, media, numbers=itertools.count(), max_bytes=1)
    one, two = sorted((tmp_path / "f").glob("*.array_record"))
    assert one.stat().st_size == two.stat().st_size
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    with pytest.raises(MediaError, match="record 0 has another checksum"):
        open_store(tmp_path / "f", root, config).read(record(root, "0.mp4"), 4)


def test_missing_or_truncated_shard(folder, root, config):
    shard = folder / "features-000000.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"has {len(content) - 1} bytes, expected {len(content)}"):
        open_store(folder, root, config)
    shard.unlink()
    with pytest.raises(UserError, match=r"features-000000\.array_record is missing"):
        open_store(folder, root, config)


def test_shard_deleted_while_in_use(folder, root, config):
    stored = open_store(folder, root, config)
    (folder / "features-000000.array_record").unlink()
    with pytest.raises(MediaError, match="cannot be opened"):
        stored.read(record(root), 4)


@pytest.mark.parametrize("text", ["", "x", "{}\n", '{"shard": "a", "bytes": 1}\n{"media": 1}\n', "[]\n"])
def test_damaged_index(folder, root, config, text):
    (folder / "features-000000.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"features-000000\.jsonl is damaged"):
        open_store(folder, root, config)


def test_unfinished_files_are_deleted(folder, config):
    """A killed run leaves temporary files, shards without an index and lists of skipped media."""
    unfinished = [
        "features-000001.array_record",
        "features-000002.array_record.tmp",
        "features-000002.jsonl.tmp",
    ]
    for name in [*unfinished, "skipped.jsonl", "skipped.3.jsonl"]:
        (folder / name).write_text("unfinished")
    assert list(read_index(folder)) == [MediaKey("a.mp4", "video", None)]
    write(folder, config, [make_item(config, "b.mp4")])
    assert sorted(path.name for path in folder.iterdir()) == [
        "description.json",
        "features-000000.array_record",
        "features-000000.jsonl",
        "features-000001.array_record",
        "features-000001.jsonl",
    ]
    assert [key.media for key in read_index(folder)] == ["a.mp4", "b.mp4"]


def test_shards_are_finished_by_size_or_age(tmp_path, config):
    size = 4 * feature_dtype(config).itemsize * int(np.prod(feature_shape(config)))
    prepare_folder(tmp_path, describe_features(config) | {"weights": None, "code": {}})
    for max_bytes, max_seconds, shards in ((2 * size, 60, 2), (10**9, -1.0, 4), (10**9, 60, 0)):
        before = len(list(tmp_path.glob("features-*.jsonl")))
        numbers = itertools.count(next_shard_number(tmp_path))
        writer = ShardWriter(tmp_path, numbers, max_bytes=max_bytes, max_seconds=max_seconds)
        for i in range(4):
            writer.add(*make_item_with_info(config, f"{i}.mp4"))
        assert len(list(tmp_path.glob("features-*.jsonl"))) - before == shards
        writer.finish()
        writer.finish()  # no shard is open
        assert len(read_index(tmp_path)) == 4


def make_item_with_info(config, name):
    key, selections, features = make_item(config, name)
    return key, INFO, selections, features


def test_missing_output_folder(tmp_path, config):
    writer = ShardWriter(tmp_path / "nowhere", itertools.count(), max_bytes=1, max_seconds=60)
    with pytest.raises(RunError, match=r"cannot be written .* Finished shards are kept"):
        writer.add(*make_item_with_info(config, "a.mp4"))


# --- Incompatible features ----------------------------------------------------------------------------------


CHANGES = {
    "vision.width": lambda c: c.model.vision.update({"width": 32}),
    "vision.mean": lambda c: c.model.vision.update({"mean": (0.5, 0.5, 0.5)}),
    "vision.select_layer": lambda c: c.model.vision.update({"select_layer": -2}),
    "sampling.kind": lambda c: c.data.sampling.update({"kind": "fps"}),
    "image_layout": lambda c: c.data.update({"image_layout": "pad"}),
    "dtype": lambda c: c.model.update({"dtype": "float32"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings(folder, root, config, name):
    before = Path(folder / "description.json").read_text()
    CHANGES[name](config)
    with pytest.raises(
        UserError, match=f"differ from this configuration's .*{re.escape(name)}: stored .*, now"
    ):
        open_store(folder, root, config)
    with pytest.raises(UserError, match=f"--output .* has features of another vision tower .*{name}"):
        write(folder, config, [])
    assert Path(folder / "description.json").read_text() == before


def test_speed_settings_may_differ(folder, root, config):
    config.model.vision.update({"remat": "full"})
    open_store(folder, root, config)


def test_other_weights(folder, config):
    with pytest.raises(UserError, match="weights: stored digest, now other"):
        write(folder, config, [], weights="other")


def test_movie_and_computed_features_share_a_folder(tmp_path, root, config):
    """The digest of the weights is None for movie features; the first computed features set it for good."""
    folder = tmp_path / "f"
    for weights, kept in ((None, None), ("one", "one"), (None, "one"), ("one", "one")):
        write(folder, config, [make_item(config, f"{weights}.mp4")], weights=weights)
        assert open_store(folder, root, config).weights_digest == kept
    assert len(read_index(folder)) == 2
    with pytest.raises(UserError, match="weights: stored one, now two"):
        write(folder, config, [], weights="two")


def test_missing_or_damaged_description(tmp_path, root, config):
    with pytest.raises(UserError, match=r"has no description\.json; .* python -m dynfocus_jax\.extract"):
        open_store(tmp_path / "nothing", root, config)
    for text in ("{", "[]", '{"weights": null}'):
        (tmp_path / "description.json").write_text(text)
        with pytest.raises(UserError, match=r"description\.json is damaged"):
            open_store(tmp_path, root, config)


def test_file_in_place_of_a_folder(tmp_path, root, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"has no description\.json"):
        open_store(tmp_path / "file", root, config)
    with pytest.raises(UserError, match=r"--output '.*file' cannot be written \(File exists\)"):
        write(tmp_path / "file", config, [])


def test_description(folder, config):
    described = json.loads((folder / "description.json").read_text())
    assert described["vision"]["width"] == config.model.vision.width
    assert described["dtype"] == "bfloat16"
    assert "remat" not in described["vision"]
