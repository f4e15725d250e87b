"""Measured lengths: the buckets that follow from them, and the file that keeps them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynfocus_jax.data.budget import Budget
from dynfocus_jax.data.lengths import SampleLengths
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.data.synthetic_frames import write_video
from dynfocus_jax.records.records import Record
from dynfocus_jax.text.conversation import TEMPLATES
from dynfocus_jax.text.tokenizers import WordTokenizer

TOKENIZER = WordTokenizer(["what", "?", "red", "because"])
BUCKETS = ((1, 8), (4, 8), (4, 20), (9, 20))


def turns(words):
    """Return one turn with a number of text tokens."""
    return (("what", " ".join(["because"] * (words - 3))),)


@pytest.fixture
def records(tmp_path):
    for name, frames in (("short", 3), ("long", 30)):
        write_video(tmp_path / f"{name}.mp4", np.zeros((frames, 48, 48, 3), np.uint8))
    Image.new("RGB", (9, 9)).save(tmp_path / "i.png")
    return [
        Record("text", None, turns(8)),
        Record("long text", None, turns(9)),
        Record("image", tmp_path / "i.png", turns(8), modality="image"),
        Record("short", tmp_path / "short.mp4", turns(8)),
        Record("short video, long text", tmp_path / "short.mp4", turns(20)),
        Record("long", tmp_path / "long.mp4", turns(5)),
        Record("missing", tmp_path / "missing.mp4", turns(5)),
        Record("special", None, (("what <eos>", "red"),)),
    ]


EXPECTED = [0, 2, 0, 1, 2, 3, 3, 0]


def make_loader(records, buckets=BUCKETS, tokenizer=TOKENIZER, **options):
    budget = Budget.from_buckets(buckets, lambda frames: frames)
    return SampleLoader(
        records, tokenizer, TEMPLATES["plain"], MediaReader(8), budget, max_query=4, **options
    )


def test_buckets(records):
    assert Budget.from_buckets(BUCKETS, lambda frames: frames).buckets == BUCKETS
    assert SampleLengths().assign_buckets(make_loader(records)).tolist() == EXPECTED


def test_one_bucket_needs_no_measurement(tmp_path):
    records = [Record("x", Path("missing.mp4"), (("unknown words",) * 2,))]
    lengths = SampleLengths(tmp_path / "lengths.jsonl")
    assert lengths.assign_buckets(make_loader(records, ((4, 20),))).tolist() == [0]
    assert not (tmp_path / "lengths.jsonl").exists()


def test_lengths_are_measured_once(records, tmp_path, monkeypatch):
    path = tmp_path / "lengths.jsonl"
    SampleLengths(path, threads=1).assign_buckets(make_loader(records))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    media = {entry["media"]: entry["info"] for entry in lines if "media" in entry}
    assert {Path(name).name for name in media} == {"short.mp4", "long.mp4", "missing.mp4"}
    assert media[str(tmp_path / "missing.mp4")] is None
    assert sorted(entry["ends"] for entry in lines if entry.get("ends")) == [[5], [8], [8], [9], [20]]
    assert len(lines) == 3 + 6  # a text with and without a file counts twice

    monkeypatch.setattr(MediaReader, "info", None)
    monkeypatch.setattr(SampleLoader, "text_ends", None)
    (tmp_path / "long.mp4").unlink()  # a resumed run sees the same lengths
    content = path.read_text()
    assert SampleLengths(path).assign_buckets(make_loader(records)).tolist() == EXPECTED
    assert path.read_text() == content


def test_interrupted_measurement_is_continued(records, tmp_path):
    path = tmp_path / "lengths.jsonl"
    SampleLengths(path).assign_buckets(make_loader(records))
    content = path.read_text()
    path.write_text(content[: len(content) // 2])
    assert SampleLengths(path).assign_buckets(make_loader(records)).tolist() == EXPECTED
    assert sorted(path.read_text().splitlines()) == sorted(content.splitlines())


def test_other_texts_and_settings_are_measured(records, tmp_path):
    path = tmp_path / "lengths.jsonl"
    SampleLengths(path, text_settings="words").assign_buckets(make_loader(records))
    count = len(path.read_text().splitlines())
    SampleLengths(path, text_settings="letters").assign_buckets(make_loader(records))
    assert len(path.read_text().splitlines()) == count + 6
    SampleLengths(path, text_settings="words").assign_buckets(make_loader([Record("text", None, turns(12))]))
    assert len(path.read_text().splitlines()) == count + 7


def test_process_that_does_not_write(records, tmp_path):
    path = tmp_path / "lengths.jsonl"
    assert SampleLengths(path, write=False).assign_buckets(make_loader(records)).tolist() == EXPECTED
    assert not path.exists()


def test_bucket_of_each_turn():
    record = Record("t", None, (*turns(5), *turns(6), *turns(9)))  # 5, 10 and 18 tokens, with one <bos>
    assert SampleLengths().assign_buckets(make_loader([record], guidance="each_turn")).tolist() == [0, 2, 2]
    assert SampleLengths().assign_buckets(make_loader([record])).tolist() == [2]


def test_drawn_turns_count_as_the_longest(records):
    record = Record("t", None, (*turns(5), *turns(9), *turns(4)))
    samples = make_loader([record], max_turns=2)
    assert samples.text_ends(0)[-1] == 9 + 4
    rng = np.random.default_rng(0)
    assert max(int(samples(0, rng, 2)[0].length) for _ in range(20)) == 13
