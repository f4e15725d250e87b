"""Measure the input pipeline without a train step: its throughput, and its memory over many samples.

    python benchmarks/data_records.py records
    python benchmarks/data_records.py memory --samples 50000

`records` turns text conversations of about --words words into batches, by threads and by worker processes,
and compares with the tokenizer alone. `memory` reports the resident memory, worker processes included, while
reading epochs of 1,000 records: images, videos and texts, a few of them broken.
"""

import argparse
import datetime
import functools
import gc
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs in any folder

from benchmarks.reporting import add_output_argument, markdown_table, write_report
from dynfocus_jax.data.budget import Budget
from dynfocus_jax.data.lengths import SampleLengths
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.order import BatchOrder
from dynfocus_jax.data.pipeline import make_dataset
from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.data.skipped import SkippedSamples
from dynfocus_jax.data.synthetic_frames import write_video
from dynfocus_jax.records.records import Record
from dynfocus_jax.text.conversation import TEMPLATES, encode_conversation
from dynfocus_jax.text.tokenizer_files import read_tokenizer
from dynfocus_jax.text.tokenizers import PublishedTokenizer

BATCH = 32


def random_words(rng: np.random.Generator, count: int) -> list[str]:
    """Return random words of two to nine letters."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(count)]


def make_tokenizer(folder: Path, texts: list[str]) -> PublishedTokenizer:
    """Train a byte-pair tokenizer on the texts, in Qwen's format, with at most 32,000 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32000, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return read_tokenizer(folder)


def text_turns(rng: np.random.Generator, vocabulary: list[str], count: int) -> tuple[tuple[str, str], ...]:
    """Return three turns of `count` words in total."""
    parts = [" ".join(rng.choice(vocabulary, max(1, count // 6))) for _ in range(6)]
    return tuple(zip(parts[::2], parts[1::2], strict=True))


def all_samples(count: int, _epoch: int) -> np.ndarray:
    """Return the samples of an epoch: all of them."""
    return np.arange(count)


# --- Throughput ---------------------------------------------------------------------------------------


def measure_records(options: argparse.Namespace, folder: Path) -> dict:
    """Measure records per second of the tokenizer and of the pipeline; medians of interleaved runs."""
    rng = np.random.default_rng(0)
    vocabulary = random_words(rng, 5000)
    records = [Record(str(i), None, text_turns(rng, vocabulary, options.words)) for i in range(2000)]
    tokenizer = make_tokenizer(folder, [" ".join(sum(record.turns, ())) for record in records[:500]])
    template = TEMPLATES["chatml"]
    load = SampleLoader(
        records, tokenizer, template, MediaReader(8), Budget.from_buckets([(1, 4096)]), max_query=256
    )

    def tokenize() -> float:
        started = time.perf_counter()
        for record in records[: options.batches * BATCH]:
            encode_conversation(tokenizer, record.turns, template)
        return min(len(records), options.batches * BATCH) / (time.perf_counter() - started)

    def pipeline(threads: int, processes: int) -> float:
        order = BatchOrder(functools.partial(all_samples, len(records)), batch_size=BATCH)
        batches = iter(make_dataset(load, order, num_threads=threads, num_processes=processes))
        for _ in range(4):  # the first batches include start-up; the next were prefetched during it
            next(batches)
        started = time.perf_counter()
        for _ in range(options.batches):
            next(batches)
        seconds = time.perf_counter() - started
        batches.close()
        return options.batches * BATCH / seconds

    runs = {"tokenizer alone": tokenize}
    for threads, processes in ((0, 0), (1, 0), (2, 0), (1, 1), (1, 2)):
        name = f"{threads} threads" + (f" in each of {processes} processes" if processes else "")
        runs[name] = functools.partial(pipeline, threads, processes)
    speeds = {name: [] for name in runs}
    for _ in range(options.repeats):  # interleaved, so that other load on the machine affects all of them
        for name, run in runs.items():
            speeds[name].append(run())
    tokens = np.mean([load.text_ends(index)[-1] for index in range(200)])
    return {
        "tokens_per_record": round(float(tokens), 1),
        "records_per_second": {name: round(float(np.median(values)), 1) for name, values in speeds.items()},
    }


def records_table(result: dict) -> str:
    """Return the results in Markdown."""
    rows = [[name, f"{value:.0f}"] for name, value in result["records_per_second"].items()]
    table = markdown_table([["program", "records/s"], *rows])
    return f"{table}\n\nRecords of {result['tokens_per_record']:.0f} text tokens. "


# --- Memory -------------------------------------------------------------------------------------------


def make_records(folder: Path, rng: np.random.Generator) -> list[Record]:
    """Return 1,000 records of texts, images and short videos, one in forty broken; write their media."""
    for number in range(20):
        frames = rng.integers(0, 255, (4 + number, 48, 64, 3), dtype=np.uint8)
        Image.fromarray(frames[0]).save(folder / f"{number}.png")
        write_video(folder / f"{number}.mp4", frames)
    (folder / "broken.mp4").write_bytes((folder / "19.mp4").read_bytes()[:2000])
    vocabulary, records = random_words(rng, 1000), []
    for number in range(1000):
        name = (None, f"{number % 20}.png", f"{number % 20}.mp4", None)[number % 4]
        name = "broken.mp4" if number % 40 == 1 else name
        turns = text_turns(rng, vocabulary, int(rng.integers(12, 120)))
        records.append(Record(str(number), None if name is None else folder / name, turns))
    return records


def resident_memory(process: str = "self") -> float:
    """Return the resident memory of a process and its descendants, MiB (Linux only)."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        lists = [path.read_text().split() for path in Path(f"/proc/{process}/task").glob("*/children")]
    except FileNotFoundError:  # the process has ended
        return 0.0
    size = status.partition("VmRSS:")[2].split()  # empty if the process is a zombie
    return (int(size[0]) / 2**10 if size else 0.0) + sum(
        resident_memory(child) for children in lists for child in children
    )


def measure_memory(options: argparse.Namespace, folder: Path) -> dict:
    """Measure the resident memory at about 25 points while reading `options.samples` samples."""
    rng = np.random.default_rng(0)
    records = make_records(folder, rng)
    tokenizer = make_tokenizer(folder, [" ".join(sum(record.turns, ())) for record in records])
    budget = Budget.from_buckets([(1, 512), (8, 512)], lambda frames: frames)
    media = MediaReader(48, cache_bytes=2**20)  # small, so that it fills early and evicts all the time
    load = SampleLoader(records, tokenizer, TEMPLATES["chatml"], media, budget, max_query=64)
    order = BatchOrder(
        functools.partial(all_samples, len(records)), SampleLengths().assign_buckets(load), batch_size=BATCH
    )
    skipped = SkippedSamples(folder / "skipped.jsonl", max_share=0.5)
    batches = iter(make_dataset(load, order, skipped=skipped, num_processes=options.processes))
    samples, sizes, every = 0, {}, max(1, options.samples // 25)
    while samples < options.samples:
        rows = next(batches).index
        samples += len(rows)
        if samples // every > (samples - len(rows)) // every:
            gc.collect()
            sizes[samples] = round(resident_memory(), 1)
    batches.close()
    positions, values = np.array(list(sizes)), np.array(list(sizes.values()))
    later = positions > options.samples // 5  # the first epochs fill caches and memory pools
    slope = np.polyfit(positions[later], values[later], 1)[0]
    return {
        "processes": options.processes,
        "skipped": skipped.count,
        "mib_by_samples": sizes,
        "mib_per_10000_samples": round(float(slope * 10_000), 2),
    }


def memory_table(result: dict) -> str:
    """Return the results in Markdown."""
    sizes = result["mib_by_samples"]
    shown = list(sizes)[:: max(1, len(sizes) // 10)]
    rows = [[str(samples), f"{sizes[samples]:.0f}"] for samples in shown]
    table = markdown_table([["samples", "resident, MiB"], *rows])
    return (
        f"{table}\n\nGrowth after the first fifth: {result['mib_per_10000_samples']:.2f} MiB per 10,000 "
        f"samples; {result['processes']} worker processes. "
    )


# --- Command ------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measurement", choices=("records", "memory"))
    parser.add_argument("--words", type=int, default=240, help="words per record (records)")
    parser.add_argument("--batches", type=int, default=60, help="batches of 32 records per run (records)")
    parser.add_argument("--repeats", type=int, default=5, help="number of runs (records)")
    parser.add_argument("--samples", type=int, default=50_000, help="samples to read (memory)")
    parser.add_argument("--processes", type=int, default=0, help="worker processes (memory)")
    add_output_argument(parser)
    options = parser.parse_args()
    measure, table = {
        "records": (measure_records, records_table),
        "memory": (measure_memory, memory_table),
    }[options.measurement]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores; grain {version('grain')}, tokenizers "
        f"{version('tokenizers')}, numpy {version('numpy')}; {datetime.date.today()}"
    )
    text = table(result) + machine + ".\n"
    print(text)
    write_report(options.output, text, result | {"machine": machine})


if __name__ == "__main__":
    main()
