"""Memory and time of converting a language model of 7 B parameters, and of writing it back.

    python benchmarks/conversion.py --folder DIR

Writes random bfloat16 weights under the published names of configs/align_7b.py's language model, in shards
of --shard_gib with an index; converts them with `python -m dynfocus_jax.convert`; exports the checkpoint;
and compares the exported files with the first ones, bit for bit. The folder needs three times the weights
(40 GiB) and is removed in the end. Memory is the largest resident set of the command, which counts pages of
the files that it has mapped.
"""

import argparse
import datetime
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.common import eva_vicuna_7b
from dynfocus_jax import trees
from dynfocus_jax.weights.conversion import abstract_params
from dynfocus_jax.weights.export import write_safetensors
from dynfocus_jax.weights.files import open_weights
from dynfocus_jax.weights.merge import published_arrays
from dynfocus_jax.weights.tables import FAMILIES

CONFIG = "configs/align_7b.py"


def write_random(folder: Path, shard_bytes: int) -> int:
    """Published weights of small random numbers; returns their bytes."""
    shapes = trees.flatten(abstract_params(eva_vicuna_7b())["language"])
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(2**24, np.float32) / 50).astype(ml_dtypes.bfloat16)

    def random(count: int) -> np.ndarray:
        start = rng.integers(len(noise))  # so that no two tensors are equal
        return np.resize(np.roll(noise, start), count)

    params = {path: random(np.prod(leaf.shape)).reshape(leaf.shape) for path, leaf in shapes.items()}
    folder.mkdir(parents=True)
    arrays = published_arrays(trees.unflatten(params), FAMILIES["llama"])
    write_safetensors(folder, arrays, shard_bytes)
    return sum(array.nbytes for array in arrays.values())


def run(*arguments: str) -> tuple[float, float]:
    """Seconds and largest resident set (GiB) of the command."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dynfocus_jax.convert", f"--config={CONFIG}", *arguments]
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: dynfocus_jax.convert {' '.join(arguments)} failed.")
    return time.perf_counter() - started, usage.ru_maxrss / 2**20


def equal(first: Path, second: Path) -> bool:
    """Whether two folders hold the same weights, bit for bit."""
    ours = {name: shard for shard in open_weights(second).shards() for name in shard}
    for shard in open_weights(first).shards():
        for name in shard:
            if not np.array_equal(shard[name].view(np.uint16), ours.pop(name)[name].view(np.uint16)):
                return False
    return not ours


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="to be made, and removed in the end")
    parser.add_argument("--shard_gib", type=float, default=2.0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/conversion.md"))
    options = parser.parse_args()
    folder = options.folder
    if folder.exists():
        sys.exit(f"error: {folder} exists; name a folder that does not.")
    try:
        size = write_random(folder / "published", int(options.shard_gib * 2**30))
        only = ("--config.weights.vision=", "--config.weights.text_encoder=")
        language = f"--config.weights.language={folder}/published"
        there = run(*only, language, f"--output={folder}/converted")
        back = run(*only, language, f"--checkpoint={folder}/converted", f"--export={folder}/exported")
        same = equal(folder / "published", folder / "exported/language")
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    text = (
        "| command | weights, GiB | largest resident set, GiB | seconds |\n|---|---|---|---|\n"
        f"| to a checkpoint | {size / 2**30:.2f} | {there[1]:.2f} | {there[0]:.0f} |\n"
        f"| and back | {size / 2**30:.2f} | {back[1]:.2f} | {back[0]:.0f} |\n\n"
        f"Published, in shards of {options.shard_gib:g} GiB, and exported weights are "
        f"{'equal bit for bit' if same else 'DIFFERENT'}. {datetime.date.today()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, jax {version('jax')}, orbax-checkpoint {version('orbax-checkpoint')}.\n"
    )
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
