"""The comparison table of the toy: every variant of configs/toy.py on several seeds.

    python benchmarks/toy_ablation.py --workdir runs/ablation

Each seed is pretrained once (by the plain toy run) and its variants start from there. Runs that are finished
are not repeated, so the script can be stopped and started again; --jobs runs several at a time. Prints the
table of README and writes it to --output as markdown, with the single results in a json file beside it.
"""

import argparse
import datetime
import json
import os
import platform
import queue
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np

BASE = "dynfocus"  # the plain run


def train(workdir: Path, option: str, seed: int, extra: list[str], cores: set[int]) -> dict:
    """Results of one training run on some of the cores; its output goes to train.log in its folder."""
    results = workdir / "eval.json"
    if not results.exists():
        command = [sys.executable, "-m", "dynfocus_jax.train"]
        command += [
            f"--config=configs/toy.py{option}",
            f"--config.seed={seed}",
            f"--workdir={workdir}",
            *extra,
        ]
        print(" ".join(command[2:]), flush=True)
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "train.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            os.sched_setaffinity(process.pid, cores)
            if process.wait():
                raise RuntimeError(f"{' '.join(command[1:])} failed; see {log.name}.")
    return json.loads(results.read_text(encoding="utf-8"))


def train_all(runs: list[tuple], jobs: int) -> list[dict]:
    """Results of runs (workdir, option, seed, extra), `jobs` at a time, each on its share of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    shares = queue.SimpleQueue()
    for job in range(jobs):
        shares.put({core for index, core in enumerate(cores) if index % jobs == job % len(cores)})

    def one(run: tuple) -> dict:
        share = shares.get()
        try:
            return train(*run, share)
        finally:
            shares.put(share)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, runs))


def cell(values: list[float | None], scale: float = 100) -> str:
    """Mean and spread (half the range) of the seeds."""
    if any(value is None for value in values):
        return "-"
    values = np.asarray(values) * scale
    return f"{values.mean():.1f} ± {(values.max() - values.min()) / 2:.1f}"


def table(results: dict[str, list[dict]]) -> str:
    """Markdown rows, a variant each."""
    kinds = sorted(next(iter(results.values()))[0]["accuracy_by_type"])
    lines = [
        f"| variant | visual tokens | accuracy | {' | '.join(kinds)} | needle recall | at random |",
        "|---" * (5 + len(kinds)) + "|",
    ]
    for name, runs in results.items():
        cells = [
            cell([run["visual_tokens"] for run in runs], 1),
            cell([run["accuracy"] for run in runs]),
            *(cell([run["accuracy_by_type"][kind] for run in runs]) for kind in kinds),
            cell([run["needle_recall"] for run in runs]),
            cell([run["selection_chance"] for run in runs]),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    variants = list(runpy.run_path("configs/toy.py")["VARIANTS"])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=variants, choices=variants, metavar="NAME")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; two on one core each end sooner than in turn"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/toy_ablation.md"))
    parser.add_argument("overrides", nargs="*", help="further flags of the train command, after --")
    arguments = parser.parse_args()

    def workdir(name: str, seed: int) -> Path:
        return arguments.workdir / f"{name}-{seed}"

    seeds, extra = arguments.seeds, arguments.overrides
    results = {BASE: train_all([(workdir(BASE, seed), "", seed, extra) for seed in seeds], arguments.jobs)}
    runs = [
        (workdir(name, seed), f":variant={name},pretrained={workdir(BASE, seed)}", seed, extra)
        for name in arguments.variants
        for seed in seeds
    ]
    done = train_all(runs, arguments.jobs)
    for index, name in enumerate(arguments.variants):
        results[name] = done[index * len(seeds) : (index + 1) * len(seeds)]

    where = (
        f"{datetime.date.today()}, {platform.machine()} CPU, jax {version('jax')}, seeds {arguments.seeds}"
    )
    text = f"{table(results)}\n\nMean ± half the range over the seeds, in %. {where}.\n"
    print(text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text, encoding="utf-8")
    arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
