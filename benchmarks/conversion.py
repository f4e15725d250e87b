"""Measure memory and time of converting a language model of 7 B parameters, and of exporting it again.

    python benchmarks/conversion.py --folder DIR

Steps:

1. Write random bfloat16 weights under the published names of the language model of configs/align_7b.py, in
   shards of --shard_gib with an index.
2. Convert them with `python -m dynfocus_jax.convert`.
3. Export the checkpoint, and compare the exported weights with the first ones bit for bit.

The folder needs three times the size of the weights (40 GiB) and is removed at the end. Memory is the peak
resident memory of the command, which includes pages of mapped files.
"""

import argparse
import datetime
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs in any folder

from benchmarks.reporting import REPOSITORY, add_output_argument, command_environment, write_report
from configs.common import eva_vicuna_7b
from dynfocus_jax import trees
from dynfocus_jax.weights.conversion import abstract_params
from dynfocus_jax.weights.export import write_safetensors
from dynfocus_jax.weights.files import open_weights
from dynfocus_jax.weights.merge import published_arrays
from dynfocus_jax.weights.tables import FAMILIES

CONFIG = REPOSITORY / "configs" / "align_7b.py"


def write_random(folder: Path, shard_bytes: int) -> int:
    """Write small random weights in the published format and return their size, bytes."""
    shapes = trees.flatten(abstract_params(eva_vicuna_7b())["language"])
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(2**24, np.float32) / 50).astype(ml_dtypes.bfloat16)

    def random(count: int) -> np.ndarray:
        shift = rng.integers(len(noise))  # so that no two tensors are equal
        return np.resize(np.roll(noise, shift), count)

    params = {path: random(math.prod(leaf.shape)).reshape(leaf.shape) for path, leaf in shapes.items()}
    folder.mkdir(parents=True)
    arrays = published_arrays(trees.unflatten(params), FAMILIES["llama"])
    write_safetensors(folder, arrays, shard_bytes)
    return sum(array.nbytes for array in arrays.values())


def convert(*arguments: str) -> tuple[float, float]:
    """Run `convert` and return its time, seconds, and its peak resident memory, GiB."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dynfocus_jax.convert", f"--config={CONFIG}", *arguments],
        env=command_environment(),
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: dynfocus_jax.convert {' '.join(arguments)} failed with exit status {status}.")
    return time.perf_counter() - started, usage.ru_maxrss / 2**20


def same_weights(first: Path, second: Path) -> bool:
    """Return whether two folders contain the same bfloat16 weights, bit for bit."""
    unmatched = {name: shard for shard in open_weights(second).shards() for name in shard}
    for shard in open_weights(first).shards():
        for name in shard:
            if name not in unmatched:
                return False
            if not np.array_equal(shard[name].view(np.uint16), unmatched.pop(name)[name].view(np.uint16)):
                return False
    return not unmatched


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="new folder for the weights, removed at the end"
    )
    parser.add_argument("--shard_gib", type=float, default=2.0, help="size of the published shards, GiB")
    add_output_argument(parser)
    options = parser.parse_args()
    folder = options.folder
    if folder.exists():
        sys.exit(f"error: --folder {folder} exists already; name a new folder.")
    try:
        size = write_random(folder / "published", int(options.shard_gib * 2**30))
        other_parts = ("--config.weights.vision=", "--config.weights.text_encoder=")
        language = f"--config.weights.language={folder}/published"
        paths = (f"--checkpoint={folder}/converted", f"--export={folder}/exported")
        imported = convert(*other_parts, language, f"--output={folder}/converted")
        exported = convert(*other_parts, language, *paths)
        same = same_weights(folder / "published", folder / "exported/language")
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    text = (
        "| command | weights, GiB | peak resident memory, GiB | seconds |\n|---|---|---|---|\n"
        f"| convert | {size / 2**30:.2f} | {imported[1]:.2f} | {imported[0]:.0f} |\n"
        f"| export | {size / 2**30:.2f} | {exported[1]:.2f} | {exported[0]:.0f} |\n\n"
        f"The published weights, in shards of {options.shard_gib:g} GiB, and the exported ones are "
        f"{'equal bit for bit' if same else 'DIFFERENT'}. {datetime.date.today()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, jax {version('jax')}, orbax-checkpoint {version('orbax-checkpoint')}.\n"
    )
    print(text)
    record = {"weights_gib": size / 2**30, "equal": same}
    for name, (seconds, memory) in {"convert": imported, "export": exported}.items():
        record[name] = {"seconds": seconds, "peak_resident_gib": memory}
    write_report(options.output, text, record)


if __name__ == "__main__":
    main()
