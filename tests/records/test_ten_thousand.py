"""A mixture of 10,000 records, 3 % of them broken: no record is lost or repeated, every skip has a reason."""

import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from dynfocus_jax.config import source, stage
from dynfocus_jax.data import pipeline
from dynfocus_jax.data.budget import Budget
from dynfocus_jax.data.lengths import SampleLengths
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.order import BatchOrder
from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.data.skipped import SkippedSamples
from dynfocus_jax.data.synthetic_frames import write_video
from dynfocus_jax.records.mixture import Mixture
from dynfocus_jax.text.conversation import TEMPLATES
from dynfocus_jax.text.tokenizers import WordTokenizer

COUNT, BATCH, SEED = 10_000, 32, 9
TOKENIZER = WordTokenizer(["what", "is", "this", "?", "a", "red", "disc", "why"])
BUCKETS = ((1, 16), (1, 48), (4, 16), (4, 48))
BROKEN = {  # file -> text in the reason
    "missing.png": "no such file",
    "empty.png": "not a readable image",
    "truncated.png": "not a readable image",
    "text.png": "not a readable image",
    "folder.png": "is a folder, expected a file",  # refused when the annotations are read
    "missing.mp4": "no such file",
    "empty.mp4": "not a readable video",
    "truncated.mp4": "truncated",
    "text.mp4": "not a readable video",
    "sound.xyz": "unknown file type",
}


def make_media(root):
    """Write a few valid and broken images and videos, which many records share."""
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (10 + i, 12, 3), dtype=np.uint8)).save(root / f"good{i}.png")
        frames = rng.integers(0, 255, (2 + i, 16, 16, 3), dtype=np.uint8)
        write_video(root / f"good{i}.mp4", frames)
    for suffix in ("png", "mp4"):
        whole = (root / f"good7.{suffix}").read_bytes()
        (root / f"empty.{suffix}").touch()
        (root / f"truncated.{suffix}").write_bytes(whole[: len(whole) // 2])
        (root / f"text.{suffix}").write_text("this is not a picture\n" * 20)
    (root / "folder.png").mkdir()
    (root / "sound.xyz").write_bytes(b"\0" * 99)


def entries(rng):
    """Return LLaVA entries of one to three turns, and {id of a broken one: text in its reason}."""
    bad = set(rng.choice(COUNT, COUNT * 3 // 100, replace=False).tolist())
    kinds, result, broken = list(BROKEN), [], {}
    for number in range(COUNT):
        turns = [
            {"from": role, "value": text}
            for _ in range(rng.integers(1, 4))
            for role, text in (("human", "what is this ?"), ("gpt", "a red disc " * rng.integers(1, 4)))
        ]
        entry = {"id": f"r{number}", "conversations": turns}
        if number in bad:
            file = kinds[len(broken) % len(kinds)]
            broken[f"r{number}"] = BROKEN[file]
        else:
            file = rng.choice(["", "", "", "good%d.png", "good%d.png", "good%d.mp4"])
            file = file and file % rng.integers(0, 8)
        if file:
            entry["video" if file.endswith("mp4") else "image"] = file
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        result.append(entry)
    return result, broken


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A mixture of three sources, and {id of a broken record: text in its reason}."""
    root = tmp_path_factory.mktemp("mixture")
    make_media(root)
    everything, broken = entries(np.random.default_rng(1))
    parts = (everything[:5000], everything[5000:8000], everything[8000:])
    for number, part in enumerate(parts):
        (root / f"part{number}.json").write_text(json.dumps(part))
    sources = tuple(source(name=f"part{number}", annotations=f"part{number}.json") for number in range(3))
    return Mixture(stage(sources=sources), root, SEED), broken


@pytest.fixture(scope="module")
def parts(mixture, tmp_path_factory):
    """The sample loader, and the bucket of each sample."""
    budget = Budget.from_buckets(BUCKETS, lambda frames: 2 * frames)
    media = MediaReader(8, cache_bytes=2**24)
    load = SampleLoader(mixture[0].records, TOKENIZER, TEMPLATES["plain"], media, budget, max_query=8)
    return load, SampleLengths(tmp_path_factory.mktemp("lengths") / "lengths.jsonl").assign_buckets(load)


def read(mixture, parts, rows=None, start=0, skipped=None, count=None):
    """Return (record numbers, frames, text length) of the batches of one epoch, as one process reads them."""
    load, bucket_of = parts
    order = BatchOrder(mixture[0].epoch, bucket_of, batch_size=BATCH, seed=SEED, epochs=1)
    batches = iter(
        pipeline.make_dataset(
            load, order, seed=SEED, rows=rows, start=start, skipped=skipped or keep(mixture)
        )
    )
    taken = [
        (batch.index.tolist(), batch.frames.shape[1], batch.tokens.shape[1])
        for batch in itertools.islice(batches, count)
    ]
    batches.close()
    return taken


def keep(mixture, path=None):
    """Return a list of skipped samples that already contains the refused entries."""
    skipped = SkippedSamples(path, max_share=0.05)
    skipped.note_refused(mixture[0].refused, COUNT)
    return skipped


@pytest.fixture(scope="module")
def whole(mixture, parts, tmp_path_factory):
    """One epoch read by one process: its batches, the skipped samples and their file."""
    path = tmp_path_factory.mktemp("whole") / "skipped.jsonl"
    skipped = keep(mixture, path)
    batches = read(mixture, parts, skipped=skipped)
    return batches, skipped, path


def test_epoch_has_every_valid_record_once(mixture, whole):
    records, broken = mixture[0].records, mixture[1]
    assert (len(records), len(mixture[0].refused), len(broken)) == (COUNT - 30, 30, 300)
    seen = [number for batch, _, _ in whole[0] for number in batch if number >= 0]
    good = [number for number, record in enumerate(records) if record.id not in broken]
    assert sorted(seen) == good


def test_broken_records_are_listed_with_reasons(mixture, whole):
    _, skipped, path = whole
    listed = {entry["id"]: entry for entry in map(json.loads, path.read_text().splitlines())}
    assert listed.keys() == mixture[1].keys()
    for name, part in mixture[1].items():
        assert re.search(part, listed[name]["reason"]), listed[name]
        assert (listed[name]["media"] or "folder.png") in listed[name]["reason"]
        number = int(name[1:])
        assert listed[name]["source"] == f"part{(number >= 5000) + (number >= 8000)}"
    assert (skipped.count, skipped.seen) == (270, COUNT - 30)


def test_few_shapes_and_mixed_batches(mixture, whole):
    """Each batch belongs to one bucket; images, videos and texts of the same length are mixed."""
    shapes = {tuple(shape) for _, *shape in whole[0]}
    assert shapes == set(BUCKETS)
    kinds = [
        {mixture[0].records[number].modality for number in batch if number >= 0} for batch, *_ in whole[0]
    ]
    assert {"image", "text"} in kinds


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_epoch(mixture, parts, whole, count):
    """Each process reads its rows of every batch; together they read the same as one process."""
    shares = [range(rank, BATCH, count) for rank in range(count)]
    skipped = [keep(mixture) for _ in shares]
    read_by = [read(mixture, parts, rows, skipped=own) for rows, own in zip(shares, skipped, strict=True)]
    for step, (batch, *shape) in enumerate(whole[0]):
        for rows, part in zip(shares, read_by, strict=True):
            assert part[step] == ([batch[row] for row in rows], *shape)
    assert {entry["id"] for own in skipped for entry in own.entries} == mixture[1].keys()
    assert sum(own.count for own in skipped) == 270


@pytest.mark.parametrize("count", [1, 4])
def test_resume_within_an_epoch(mixture, parts, whole, count):
    """A process resumes within an epoch from the number of a step."""
    middle = len(whole[0]) // 2
    rows = range(count - 1, BATCH, count)
    expected = [[batch[row] for row in rows] for batch, *_ in whole[0]]
    first = read(mixture, parts, rows, count=middle)
    rest = read(mixture, parts, rows, start=middle)
    assert [batch for batch, *_ in first + rest] == expected
