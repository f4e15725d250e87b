"""The input pipeline: order, resume, epochs, processes, unusable samples, and the content of batches."""

import itertools
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynfocus_jax.data import media_reader as media_lib
from dynfocus_jax.data import pipeline
from dynfocus_jax.data.budget import Budget
from dynfocus_jax.data.lengths import SampleLengths
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.order import BatchOrder
from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.data.skipped import SkippedSamples
from dynfocus_jax.data.synthetic_frames import write_video
from dynfocus_jax.errors import MediaError, UserError
from dynfocus_jax.records.records import Record
from dynfocus_jax.records.sources import read_records
from dynfocus_jax.text.conversation import TEMPLATES
from dynfocus_jax.text.tokenizers import WordTokenizer

TOKENIZER = WordTokenizer(["what", "?", "red", "disc", "why", "because"])  # ids 4 to 9


def make_loader(
    records, *, buckets=((4, 10),), size=8, max_query=6, cache_bytes=0, tokenizer=TOKENIZER, **options
):
    budget_fields = ("count_visual_tokens", "max_length", "on_overflow")
    budget = {name: options.pop(name) for name in budget_fields if name in options}
    media = MediaReader(size, cache_bytes=cache_bytes, timeout=options.pop("timeout", 60.0))
    options = {"max_query": max_query} | options
    return SampleLoader(
        records, tokenizer, TEMPLATES["plain"], media, Budget.from_buckets(buckets, **budget), **options
    )


def make_dataset(loader, *, batch_size, seed=0, shuffle=True, epochs=None, **options):
    """Return the batches of a loader, in an order with the buckets of its samples."""
    order = BatchOrder(
        lambda epoch: np.arange(len(loader)),
        SampleLengths().assign_buckets(loader),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        epochs=epochs,
    )
    return pipeline.make_dataset(loader, order, seed=seed, **options)


def texts(count):
    """Return text-only records, which `Batch.index` tells apart."""
    return [Record(f"r{i}", None, (("why ?", "because"),)) for i in range(count)]


def with_missing_files(records, *numbers):
    """Return the records, some of them with a file that does not exist."""
    return [
        Record(record.id, Path("missing.mp4"), record.turns) if i in numbers else record
        for i, record in enumerate(records)
    ]


def take(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def indices(batches):
    return [batch.index.tolist() for batch in batches]


def flat(batches):
    return [i for batch in batches for i in batch.index.tolist()]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name, x, y in zip(a._fields, a, b, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.fixture
def media(tmp_path):
    """A six-frame video whose frame i has grey level 20 * i, and an image of level 99."""
    write_video(
        tmp_path / "v.mp4", np.repeat(20 * np.arange(6, dtype=np.uint8), 48 * 48 * 3).reshape(6, 48, 48, 3)
    )
    Image.new("RGB", (8, 8), (99, 99, 99)).save(tmp_path / "i.png")
    return tmp_path


def test_content_of_a_mixed_batch(media):
    records = [
        Record("v", media / "v.mp4", (("what ?", "red disc"),), needle_frames=((2, 3),)),
        Record("i", media / "i.png", (("what ?", "disc"), ("why ?", "because")), visual_at_end=True),
        Record("t", None, (("why ?", "because"),)),
    ]
    (batch,) = make_dataset(make_loader(records), batch_size=3, seed=0, shuffle=False, epochs=1)
    assert batch.frames.shape == (3, 4, 8, 8, 3)
    levels = batch.frames.mean((2, 3, 4))  # frames 0, 2, 3, 5 of the video
    np.testing.assert_allclose(levels, [[0, 40, 60, 100], [99, 0, 0, 0], [0, 0, 0, 0]], atol=1.5)
    assert batch.frame_mask.astype(int).tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.oracle_frames.astype(int).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.tokens.tolist() == [
        [1, 4, 5, 6, 7, 2, 0, 0, 0, 0],
        [1, 4, 5, 7, 2, 8, 5, 9, 2, 0],
        [1, 8, 5, 9, 2, 0, 0, 0, 0, 0],
    ]
    assert batch.loss_mask.astype(int).tolist() == [
        [0, 0, 0, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 0, 0, 0, 0, 0],
    ]
    assert batch.length.tolist() == [6, 9, 5]
    assert batch.visual_position.tolist() == [1, 3, 1]
    assert batch.query_tokens.tolist() == [[4, 5, 0, 0, 0, 0], [4, 5, 8, 5, 0, 0], [8, 5, 0, 0, 0, 0]]
    assert batch.query_length.tolist() == [2, 4, 2]
    assert batch.index.tolist() == [0, 1, 2]
    assert [array.dtype.name for array in batch] == [
        *("uint8", "bool", "int32", "int32", "int32"),
        *("int32", "int32", "bool", "bool", "int32", "int32", "int32"),
    ]


def test_prompts_end_before_the_last_answer():
    records = [Record("t", None, (("what ?", "disc"), ("why ?", "because")))]
    (batch,) = make_dataset(
        make_loader(records, prompt_only=True), batch_size=1, seed=0, shuffle=False, epochs=1
    )
    assert batch.tokens.tolist() == [[1, 4, 5, 7, 2, 8, 5, 0, 0, 0]]
    assert batch.length.tolist() == [7]
    assert not batch.loss_mask.any()


def test_long_query_keeps_its_last_tokens():
    records = [Record("t", None, (("what what why ?", "disc"),))]
    sample, _ = make_loader(records, max_query=2)(0, np.random.default_rng(0))
    assert sample.query_tokens.tolist() == [8, 5]
    assert sample.query_length == 2


@pytest.mark.parametrize("num_threads", [0, 2])
def test_every_record_once_per_epoch_in_another_order(num_threads):
    options = {"batch_size": 5, "seed": 3, "shuffle": True, "num_threads": num_threads}
    batches = take(make_dataset(make_loader(texts(20)), **options), 12)
    epochs = [flat(batches[start : start + 4]) for start in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(20)]}) == 4
    assert indices(take(make_dataset(make_loader(texts(20)), **options), 12)) == indices(batches)
    other = take(make_dataset(make_loader(texts(20)), **(options | {"seed": 4})), 4)
    assert indices(other) != indices(batches[:4])


def test_unshuffled_order_and_remainder():
    dataset = make_dataset(make_loader(texts(7)), batch_size=3, seed=0, shuffle=False, epochs=2)
    assert indices(dataset) == [[0, 1, 2], [3, 4, 5], [6, -1, -1]] * 2


@pytest.mark.parametrize("num_threads", [0, 2])
def test_resume_with_another_number_of_processes(needles, num_threads):
    """The next batches are the same, over epochs, with unusable samples and drawn turns."""

    def dataset(**part):
        tokenizer = WordTokenizer.from_file(needles / "vocabulary.json")
        records = read_records(needles / "sequences.json", needles)
        records = with_missing_files(records, 4, 11)
        loader = make_loader(
            records, tokenizer=tokenizer, buckets=((3, 64),), size=48, max_query=64, max_turns=3
        )
        skipped = SkippedSamples(max_share=0.5)
        return make_dataset(
            loader, batch_size=4, seed=1, shuffle=True, skipped=skipped, num_threads=num_threads, **part
        )

    batches = take(dataset(), 11)
    seen = flat(batches)
    assert not {4, 11} & set(seen)
    assert -1 in seen
    for start in (0, 1, 5, 8):
        expected = batches[start : start + 3]
        assert_same(take(dataset(start=start), 3), expected)
        for rows in ([0, 1], [2, 3], [3], [0, 3]):
            part = [type(batch)(*(x[rows] for x in batch)) for batch in expected]
            assert_same(take(dataset(start=start, rows=rows), 3), part)


def test_turns_are_drawn_anew_each_epoch():
    turns = tuple((word, "because") for word in ("what", "?", "red", "disc"))
    options = {"batch_size": 1, "seed": 0, "shuffle": False}
    loader = make_loader([Record("t", None, turns)], max_turns=2)
    batches = take(make_dataset(loader, **options), 30)
    drawn = [tuple(batch.tokens[0, [1, 4]].tolist()) for batch in batches]
    assert all(a != b and {a, b} <= {4, 5, 6, 7} for a, b in drawn)
    assert len(set(drawn)) > 6
    assert all(
        batch.query_tokens[0, :2].tolist() == list(pair) for batch, pair in zip(batches, drawn, strict=True)
    )
    assert_same(take(make_dataset(loader, **options), 30), batches)


def test_processes_share_one_order():
    options = {"batch_size": 4, "seed": 5, "shuffle": True, "epochs": 2}
    expected = indices(make_dataset(make_loader(texts(9)), **options))
    assert [batch.count(-1) for batch in expected] == [0, 0, 3] * 2
    for rows in ([0, 1], [2, 3], [1], [0, 1, 2, 3]):
        part = indices(make_dataset(make_loader(texts(9)), rows=rows, **options))
        assert part == [[batch[row] for row in rows] for batch in expected]


def test_start_at_or_after_the_end():
    options = {"batch_size": 2, "seed": 0, "shuffle": False, "epochs": 1}
    for start, count in ((2, 1), (3, 0), (4, 0)):
        assert len(list(make_dataset(make_loader(texts(6)), start=start, **options))) == count


def test_padding_of_the_last_batch():
    options = {"batch_size": 2, "seed": 0, "shuffle": False, "epochs": 1}
    dataset = make_dataset(
        make_loader(with_missing_files(texts(5), 2)), skipped=SkippedSamples(max_share=0.5), **options
    )
    batches = list(dataset)
    assert indices(batches) == [[0, 1], [-1, 3], [4, -1]]
    for row in (batches[1], 0), (batches[2], 1):
        batch, i = row
        assert (batch.length[i], batch.query_length[i]) == (1, 1)
        assert not batch.loss_mask[i].any()
        assert not batch.frame_mask[i].any()
        assert not batch.tokens[i].any()
    options |= {"batch_size": 4}
    parts = [make_dataset(make_loader(texts(5)), rows=rows, **options) for rows in ([0, 1], [2, 3])]
    assert [indices(part) for part in parts] == [[[0, 1], [4, -1]], [[2, 3], [-1, -1]]]


def test_unusable_samples_are_padding_rows_listed_once(tmp_path):
    records = with_missing_files(texts(30), 4, 17)
    records[9] = Record("r9", None, (("why ?", "because " * 9),))
    path = tmp_path / "skipped.jsonl"
    skipped = SkippedSamples(path, max_share=0.2)
    dataset = make_dataset(
        make_loader(records), batch_size=3, seed=0, shuffle=True, epochs=2, skipped=skipped
    )
    seen = flat(dataset)
    assert sorted(seen) == sorted([-1 if i in (4, 9, 17) else i for i in range(30)] * 2)
    assert (skipped.count, skipped.seen) == (6, 60)
    listed = [json.loads(line) for line in path.read_text().splitlines()]
    assert listed == skipped.entries
    assert sorted(entry["id"] for entry in listed) == ["r17", "r4", "r9"]
    by_id = {entry["id"]: entry for entry in listed}
    assert by_id["r4"]["media"] == "missing.mp4"
    assert "no such file" in by_id["r4"]["reason"]
    assert by_id["r9"]["media"] is None
    assert "13 text tokens, expected at most 10" in by_id["r9"]["reason"]
    content = path.read_text()
    path.write_text(content[:-5])  # killed while writing the last line
    resumed = SkippedSamples(path, max_share=0.2)
    assert resumed.entries == listed[:2]
    list(make_dataset(make_loader(records), batch_size=3, seed=0, shuffle=True, epochs=1, skipped=resumed))
    assert resumed.count == 3
    assert path.read_text() == content


@pytest.mark.parametrize("num_threads", [0, 2])
def test_only_unusable_samples(num_threads):
    records = with_missing_files(texts(3), 0, 1, 2)
    for max_share in (0.0, 0.05, 0.99):
        dataset = make_dataset(
            make_loader(records),
            batch_size=2,
            seed=0,
            shuffle=True,
            skipped=SkippedSamples(max_share=max_share),
            num_threads=num_threads,
        )
        with pytest.raises(UserError, match=r"of \d+ samples could not be used.*missing\.mp4"):
            take(dataset, 1000)


def test_share_of_unusable_samples():
    record = texts(1)[0]
    skipped = SkippedSamples(max_share=0.1, grace=20)
    for reason in ["bad", "bad", *[None] * 27, "bad"]:  # 2 of the first 20, 3 of 30
        skipped.note(record, reason)
    message = r"4 of 31 samples could not be used.*max_skip_share = 0\.1 .*record r0: bad"
    with pytest.raises(UserError, match=message):
        skipped.note(record, "bad")
    early = SkippedSamples(max_share=0.1, grace=20)
    for _ in range(2):
        early.note(record, "bad")
    with pytest.raises(UserError, match="3 of 3 samples"):
        early.note(record, "bad")
    with pytest.raises(UserError, match="at least 0 and less than 1"):
        SkippedSamples(max_share=1.0)


def test_unknown_words_stop_the_run():
    records = [Record("t", None, (("who ?", "because"),))]
    with pytest.raises(UserError, match="'who'"):
        take(make_dataset(make_loader(records), batch_size=1, seed=0, shuffle=False), 1)


def test_no_records():
    with pytest.raises(UserError, match="no records to read"):
        make_dataset(make_loader([]), batch_size=1, seed=0, shuffle=True)


def test_cache_of_decoded_frames(media):
    frame_bytes = 4 * 8 * 8 * 3
    for name in ("a", "b"):
        shutil.copy(media / "v.mp4", media / f"{name}.mp4")
    records = [Record(name, media / f"{name}.mp4", (("what ?", "disc"),)) for name in ("a", "b")]
    rng = np.random.default_rng(0)
    large, small, none = (
        make_loader(records, cache_bytes=size) for size in (2 * frame_bytes, frame_bytes, 0)
    )
    first = [[loader(i, rng)[0] for i in (0, 1)] for loader in (large, small, none)]
    for name in ("a", "b"):
        (media / f"{name}.mp4").unlink()
    assert_same([large(i, rng)[0] for i in (0, 1)], first[0])
    assert_same([small(1, rng)[0]], first[1][1:])
    for loader, index in ((small, 0), (none, 0), (none, 1)):
        with pytest.raises(MediaError, match="no such file"):
            loader(index, rng)


def test_samples_do_not_share_memory_with_the_cache(media):
    records = [Record("v", media / "v.mp4", (("what ?", "disc"),))]
    loader, rng = make_loader(records, cache_bytes=10_000), np.random.default_rng(0)
    loader(0, rng)[0].frames[:] = 7
    assert loader(0, rng)[0].frames.max() > 90


def test_hanging_decoder_skips_one_sample(media, monkeypatch, tmp_path):
    """The sample becomes a padding row in every epoch; the others are unaffected."""
    hang, read = threading.Event(), media_lib.read_media

    def read_or_hang(path, *arguments, **options):
        return hang.wait(60) if path.name == "hung.mp4" else read(path, *arguments, **options)

    monkeypatch.setattr(media_lib, "read_media", read_or_hang)
    names = ("v.mp4", "hung.mp4", "i.png", "v.mp4")
    records = [Record(f"r{i}", media / name, (("what ?", "disc"),)) for i, name in enumerate(names)]
    skipped = SkippedSamples(tmp_path / "skipped.jsonl", max_share=0.5)
    started = time.monotonic()
    options = {"batch_size": 2, "shuffle": False, "epochs": 3, "skipped": skipped}
    batches = list(make_dataset(make_loader(records, timeout=0.5), **options))
    assert time.monotonic() - started < 10
    hang.set()
    assert indices(batches) == [[0, -1], [2, 3]] * 3
    assert [batch.frame_mask.sum(1).tolist() for batch in batches] == [[4, 0], [1, 4]] * 3
    (entry,) = skipped.entries
    assert (entry["id"], skipped.count) == ("r1", 3)
    assert "takes more than 0.5 s" in entry["reason"]


def test_images_videos_and_texts_in_each_bucket(media):
    """Batches mix modalities, whose rows differ in their masks only; samples are in the smallest bucket."""
    long = (("what what what ?", "red disc because because"),)
    records = [
        Record("v", media / "v.mp4", (("what ?", "red disc"),)),
        Record("i", media / "i.png", (("what ?", "disc"),), modality="image"),
        Record("t", None, (("why ?", "because"),)),
        Record("long v", media / "v.mp4", long),
        Record("long t", None, long),
        Record("other v", media / "v.mp4", (("why ?", "disc"),)),
    ]
    loader = make_loader(
        records, buckets=((1, 6), (6, 6), (6, 12)), count_visual_tokens=lambda frames: frames
    )
    batches = list(make_dataset(loader, batch_size=3, shuffle=False, epochs=1))
    shapes = [(batch.frames.shape[1], batch.tokens.shape[1]) for batch in batches]
    assert shapes == [(1, 6), (6, 6), (6, 12)]
    assert indices(batches) == [[1, 2, -1], [0, 5, -1], [3, 4, -1]]
    assert [batch.frame_mask.sum(1).tolist() for batch in batches] == [[1, 0, 0], [6, 6, 0], [6, 0, 0]]
    assert [batch.length.tolist() for batch in batches] == [[5, 5, 1], [6, 5, 1], [10, 10, 1]]
