"""Compare the variants of configs/toy.py over several seeds.

    python benchmarks/toy_ablation.py --workdir runs/ablation

Each seed is pretrained once, by the plain toy run, and its variants start from that. Finished runs are not
repeated, so the script can be stopped and started again. It prints the table in README.
"""

import argparse
import datetime
import json
import os
import platform
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs in any folder

from benchmarks.reporting import (
    REPOSITORY,
    add_output_argument,
    command_environment,
    markdown_table,
    write_report,
)
from configs import toy
from dynfocus_jax.errors import RunError

BASE = "dynfocus"  # the plain run


class Run(NamedTuple):
    """A training run.

    Attributes:
      workdir: its folder.
      options: options of configs/toy.py, "variant=NAME,..."; may be empty.
      seed: config.seed.
      flags: further flags of the train command.
    """

    workdir: Path
    options: str
    seed: int
    flags: Sequence[str]


def train(run: Run, cores: set[int]) -> dict:
    """Train on the given CPU cores, unless the run is finished, and return its results (eval.json).

    The output of the command goes to train.log in the run's folder.

    Raises:
      RunError: if the command fails.
    """
    results = run.workdir / "eval.json"
    if not results.exists():
        config = ":".join(filter(None, [f"{REPOSITORY}/configs/toy.py", run.options]))
        command = [sys.executable, "-m", "dynfocus_jax.train", f"--config={config}"]
        command += [f"--config.seed={run.seed}", f"--workdir={run.workdir}", *run.flags]
        print(" ".join(command[2:]), flush=True)
        run.workdir.mkdir(parents=True, exist_ok=True)
        with (run.workdir / "train.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=command_environment()
            )
            os.sched_setaffinity(process.pid, cores)
            if process.wait():
                raise RunError(f"{' '.join(command[1:])} failed; see {log.name}.")
    return json.loads(results.read_text(encoding="utf-8"))


def train_all(runs: Sequence[Run], jobs: int) -> list[dict]:
    """Return the results of all runs, `jobs` of them at a time, with the CPU cores divided among them."""
    cores = sorted(os.sched_getaffinity(0))
    free_cores: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for job in range(jobs):
        free_cores.put({core for index, core in enumerate(cores) if index % jobs == job % len(cores)})

    def train_one(run: Run) -> dict:
        own_cores = free_cores.get()
        try:
            return train(run, own_cores)
        finally:
            free_cores.put(own_cores)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(train_one, runs))


def cell(values: list[float | None], scale: float = 100) -> str:
    """Return mean ± half the range over the seeds, or "-" where a value is missing."""
    if any(value is None for value in values):
        return "-"
    scaled = np.asarray(values, float) * scale
    return f"{scaled.mean():.1f} ± {(scaled.max() - scaled.min()) / 2:.1f}"


def table(results: dict[str, list[dict]]) -> str:
    """Return a Markdown table with a row per variant."""
    kinds = sorted(next(iter(results.values()))[0]["accuracy_by_type"])
    rows = [["variant", "visual tokens", "accuracy", *kinds, "needle recall", "at random"]]
    for name, runs in results.items():
        cells = [
            cell([run["visual_tokens"] for run in runs], 1),
            cell([run["accuracy"] for run in runs]),
            *(cell([run["accuracy_by_type"][kind] for run in runs]) for kind in kinds),
            cell([run["needle_recall"] for run in runs]),
            cell([run["selection_chance"] for run in runs]),
        ]
        rows.append([name, *cells])
    return markdown_table(rows)


def main() -> None:
    variants = list(toy.VARIANTS)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdir",
        type=Path,
        default=Path("runs/ablation"),
        help="folder of the runs (default: runs/ablation)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=variants,
        choices=variants,
        metavar="NAME",
        help=f"variants (default: all): {', '.join(variants)}",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="number of runs at a time, which divide the cores; two runs on a core each take less time than "
        "one after the other on both",
    )
    add_output_argument(parser)
    parser.add_argument("flags", nargs="*", help="further flags of the train command, after --")
    arguments = parser.parse_args()

    def workdir(name: str, seed: int) -> Path:
        return arguments.workdir / f"{name}-{seed}"

    seeds = arguments.seeds
    base_runs = [Run(workdir(BASE, seed), "", seed, arguments.flags) for seed in seeds]
    results = {BASE: train_all(base_runs, arguments.jobs)}
    runs = [
        Run(
            workdir(name, seed),
            f"variant={name},pretrained={workdir(BASE, seed)}",
            seed,
            arguments.flags,
        )
        for name in arguments.variants
        for seed in seeds
    ]
    finished = train_all(runs, arguments.jobs)
    for index, name in enumerate(arguments.variants):
        results[name] = finished[index * len(seeds) : (index + 1) * len(seeds)]

    about = f"{datetime.date.today()}, {platform.machine()} CPU, jax {version('jax')}, seeds {seeds}"
    text = f"{table(results)}\n\nMean ± half the range over the seeds, in %. {about}.\n"
    print(text)
    write_report(arguments.output, text, results)


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"error: {error}")
