r"""Compute the features of the frozen vision tower once, for training to read instead of pixels.

    python -m dynfocus_jax.extract --config configs/align_7b.py --config.initial=DIR --config.data.root=DATA \
        --output FEATURES
    python -m dynfocus_jax.train --config configs/align_7b.py --config.initial=DIR --config.data.root=DATA \
        --config.data.features=FEATURES --workdir RUN

The command reads the media of all stages and of the evaluation in the same way as training, and runs the
frames that the buckets need through the vision tower in config.initial. --stage NAME limits it to one stage,
or to "evaluation". Training from the features is equivalent to training from pixels. Features are stored in
the dtype of the model, bfloat16 by default.

--movie_features FOLDER converts LLaMA-VID's movie features (.pkl files, read without executing them) instead,
and needs no vision tower. Records of the stages that name .pkl files are converted as well.

Rerunning the command, also with other stages or data, adds the features that are missing. If a run is killed,
its finished shards are kept. FEATURES/skipped.jsonl lists the media that could not be read.

To extract with several processes, set config.distributed and start each process with the same arguments, as
in training. `features/store.py` describes the files of the folder.
"""

import itertools
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tqdm
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dynfocus_jax.command import CONFIG_FLAG, run_command
from dynfocus_jax.data.prepare import check_initial_checkpoint, make_media_reader, prepare_data_root
from dynfocus_jax.data.skipped import SkippedSamples
from dynfocus_jax.errors import UserError
from dynfocus_jax.features.compatibility import check_vision_frozen
from dynfocus_jax.features.extraction import ExtractionCounts, run_extraction
from dynfocus_jax.features.media_list import FrameReader, missing_requests, movie_requests, stage_requests
from dynfocus_jax.features.shards import ShardWriter, next_shard_number, prepare_folder
from dynfocus_jax.features.store import (
    check_storable,
    describe_features,
    feature_dtype,
    feature_shape,
    read_index,
)
from dynfocus_jax.features.vision_tower import VisionTower, frame_parallel_mesh
from dynfocus_jax.parallel.processes import (
    connect_processes,
    is_process_zero,
    print_once,
    process_file_name,
    process_zero_first,
)
from dynfocus_jax.parameters import param_shapes, trained_paths
from dynfocus_jax.validation import validate
from dynfocus_jax.version import code_version

_OUTPUT = flags.DEFINE_string("output", None, "Folder for the features; it may already hold some.")
_STAGE = flags.DEFINE_string(
    "stage",
    None,
    "Stage to extract the features of, or 'evaluation'; by default, all stages and the evaluation.",
)
_MOVIE_FEATURES = flags.DEFINE_string(
    "movie_features", None, "Folder with LLaMA-VID's .pkl files to convert instead."
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Frames that each device runs through the vision tower at a time.", lower_bound=1
)

_SHARD_BYTES = 2**30
_SHARD_SECONDS = 600.0  # a killed run loses at most the work of this time


def main() -> None:
    config = CONFIG_FLAG.require("configs/align_7b.py")
    if _OUTPUT.value is None:
        raise UserError("--output is missing; set it to a folder for the features.")
    connect_processes(config.distributed)
    movies = _MOVIE_FEATURES.value
    extract_features(
        config,
        Path(_OUTPUT.value).expanduser(),
        stage=_STAGE.value,
        movies=Path(movies).expanduser() if movies is not None else None,
        batch_size=_BATCH_SIZE.value,
    )


def extract_features(
    config: ConfigDict,
    output: Path,
    *,
    stage: str | None = None,
    movies: Path | None = None,
    batch_size: int = 32,
) -> ExtractionCounts:
    """Write the features that a folder does not have yet.

    Args:
      config: the configuration.
      output: folder for the features.
      stage: the only stage whose media are extracted, or "evaluation"; None is all.
      movies: folder of movie features to convert instead.
      batch_size: frames that each device runs through the vision tower at a time.

    Returns:
      The counts of all processes together.

    Raises:
      UserError: if settings do not fit each other, the data or `output`, or too many media cannot be read.
      RunError: if features cannot be written.
    """
    # --- Settings -------------------------------------------------------------------------------------
    output = output.absolute()
    config = _pixel_config(config)
    mesh = frame_parallel_mesh(config.mesh, jax.device_count())
    validate(config)
    check_storable(config)

    # --- Media ----------------------------------------------------------------------------------------
    with process_zero_first():
        data_root = prepare_data_root(config.data)
    if movies is not None:
        requests = movie_requests(movies, config, data_root, stage)
    else:
        check_initial_checkpoint(config)
        for index, each in enumerate(config.stages):
            paths = param_shapes(config, index)
            check_vision_frozen(each.name, paths, trained_paths(config, index, paths))
        requests = stage_requests(config, data_root, stage)
    reader = FrameReader(make_media_reader(config), config)

    # --- Vision tower and output ----------------------------------------------------------------------
    tower = VisionTower(config, mesh, batch_size) if movies is None else None
    weights = None if tower is None else tower.weights_digest
    description = describe_features(config) | {"weights": weights, "code": code_version()}
    with process_zero_first():
        if is_process_zero():
            prepare_folder(output, description)
    work = missing_requests(requests, read_index(output))
    number = next_shard_number(output)
    print_once(f"{len(requests)} media, {len(requests) - len(work)} of them with features already")
    if is_process_zero():
        _check_disk_space(reader.estimate_frames(work), config, output)

    # --- Extraction -----------------------------------------------------------------------------------
    process, processes = jax.process_index(), jax.process_count()
    own_work = work[process::processes]
    skipped = SkippedSamples(
        output / process_file_name("skipped.jsonl"), max_share=config.data.max_skip_share
    )
    numbers = itertools.count(number + process, processes)
    shards = ShardWriter(output, numbers, max_bytes=_SHARD_BYTES, max_seconds=_SHARD_SECONDS)
    began = time.perf_counter()
    hidden = not (is_process_zero() and sys.stderr.isatty())
    with tqdm.tqdm(total=len(own_work), desc="extracting", unit="file", disable=hidden) as bar:

        def progress(counts: ExtractionCounts) -> None:
            bar.update(counts.media + counts.skipped - bar.n)
            bar.set_postfix_str(f"{counts.frames} frames, {counts.skipped} skipped", refresh=False)

        threads = config.data.threads
        counts = run_extraction(
            own_work, reader.read, tower, shards, skipped, threads=threads, progress=progress
        )
    total, seconds = _sum_over_processes(counts), time.perf_counter() - began
    print_once(
        f"{total.media} media with {total.frames} frames extracted in {seconds:.1f} s, {total.skipped} "
        "skipped"
    )
    return total


def _pixel_config(config: ConfigDict) -> ConfigDict:
    """Return a copy of the configuration that reads pixels, and each file once."""
    config = config.copy_and_resolve_references()
    config.data.features = None
    config.data.cache_gib = 0.0
    return config


def _check_disk_space(frames: int, config: ConfigDict, output: Path) -> None:
    """Print an estimate of the size of the features, and check that there is space for them.

    Raises:
      UserError: if there is not.
    """
    size = frames * int(np.prod(feature_shape(config))) * feature_dtype(config).itemsize
    free = shutil.disk_usage(output).free
    gib = f"{size / 2**30:.3g} GiB"
    print_once(f"about {frames} frames to extract, {gib}; {free / 2**30:.3g} GiB are free in {output}")
    if size > free:
        raise UserError(
            f"--output {str(output)!r} has {free / 2**30:.3g} GiB free, but the features need about "
            f"{gib}; use a larger disk, or extract fewer stages or frames."
        )


def _sum_over_processes(counts: ExtractionCounts) -> ExtractionCounts:
    if jax.process_count() == 1:
        return counts
    return ExtractionCounts(*multihost_utils.process_allgather(np.asarray(counts)).sum(axis=0).tolist())


if __name__ == "__main__":
    run_command(main)
