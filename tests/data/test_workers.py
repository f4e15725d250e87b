"""Worker processes: the same batches as without them, and no worker outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynfocus_jax.data.budget import Budget
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.order import BatchOrder
from dynfocus_jax.data.pipeline import make_dataset
from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.data.skipped import ShortenedSamples, SkippedSamples
from dynfocus_jax.data.synthetic_frames import write_video
from dynfocus_jax.errors import UserError
from dynfocus_jax.records.records import Record
from dynfocus_jax.text.conversation import TEMPLATES
from dynfocus_jax.text.tokenizers import WordTokenizer
from tests.commands import REPOSITORY

TOKENIZER = WordTokenizer(["what", "?", "red", "disc", "why", "because"])
TURNS = tuple((word, "because") for word in ("what", "?", "red", "disc"))


@pytest.fixture
def records(tmp_path):
    write_video(tmp_path / "v.mp4", np.random.default_rng(0).integers(0, 255, (9, 48, 48, 3), np.uint8))
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "i.png")
    files = (None, tmp_path / "v.mp4", tmp_path / "i.png", Path("missing.png"), None)
    return [Record(f"r{i}", files[i % 5], TURNS[: 1 + i % 4]) for i in range(23)]


def load_all(records, *, processes, start=0, **options):
    """Return the batches of two epochs, the skipped and the shortened samples."""
    budget = Budget.from_buckets([(4, 9), (7, 12)], lambda frames: frames, 14, "drop_turns")
    loader = SampleLoader(
        records, TOKENIZER, TEMPLATES["plain"], MediaReader(48), budget, max_query=9, max_turns=3
    )
    order = BatchOrder(epoch, np.arange(23) % 2, batch_size=4, seed=3, epochs=2)
    skipped, shortened = SkippedSamples(max_share=0.9), ShortenedSamples()
    batches = iter(
        make_dataset(
            loader,
            order,
            seed=3,
            start=start,
            skipped=skipped,
            shortened=shortened,
            num_processes=processes,
            **options,
        )
    )
    content = list(batches)
    batches.close()
    return content, skipped, shortened


def epoch(_number):
    return np.arange(23)


def test_same_batches_and_lists(records):
    expected, skipped, shortened = load_all(records, processes=0)
    assert skipped.count
    assert shortened.counts["turns"]
    assert {batch.frames.shape[1] for batch in expected} == {4, 7}
    for start, processes, options in ((0, 1, {}), (5, 3, {"num_threads": 0})):
        batches, other_skipped, other_shortened = load_all(
            records, processes=processes, start=start, **options
        )
        assert len(batches) == len(expected) - start
        for batch, other in zip(batches, expected[start:], strict=True):
            for name, x, y in zip(batch._fields, batch, other, strict=True):
                np.testing.assert_array_equal(x, y, err_msg=name)
        if not start:
            assert (other_skipped.count, other_skipped.entries) == (skipped.count, skipped.entries)
            assert (other_shortened.counts, other_shortened.entries) == (shortened.counts, shortened.entries)


def test_user_error_in_a_worker():
    unknown = [Record("t", None, (("who ?", "because"),))] * 23
    with pytest.raises(UserError, match="'who'"):
        load_all(unknown, processes=2)


SCRIPT = """
import time
from tests.data.test_workers import *
if __name__ == "__main__":
    loader = SampleLoader([Record("t", None, TURNS)] * 23, TOKENIZER, TEMPLATES["plain"], MediaReader(8),
        Budget.from_buckets([(1, 20)]), max_query=9)
    batches = iter(make_dataset(loader, BatchOrder(epoch, batch_size=2), num_processes=2))
    next(batches)
    print("ready", flush=True)
    time.sleep(600)
"""


def child_processes(process: int) -> list[int]:
    lists = [path.read_text().split() for path in Path(f"/proc/{process}/task").glob("*/children")]
    return [int(child) for some in lists for child in some]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_with_their_parent(tmp_path):
    """Workers ignore SIGTERM, which the parent handles, and end when the parent is killed."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(file)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        workers = child_processes(process.pid)
        assert len(workers) >= 2
        for worker in workers:
            if "spawn_main" in Path(f"/proc/{worker}/cmdline").read_text():
                os.kill(worker, signal.SIGTERM)
        time.sleep(0.5)
        assert all(map(is_running, workers))
    finally:
        process.kill()
        process.wait()
    limit = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(is_running, workers))
