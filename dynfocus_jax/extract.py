"""Compute the features of the frozen vision tower once, for training to read in place of pixels.

    python -m dynfocus_jax.extract --config configs/align_7b.py --config.initial=DIR --config.data.root=DATA \
        --output FEATURES
    python -m dynfocus_jax.train --config configs/align_7b.py --config.initial=DIR --config.data.root=DATA \
        --config.data.features=FEATURES --workdir RUN

Every medium of the stages and of the evaluation (--stage NAME: of that stage, or "evaluation") is read as
training would read it, and the frames that its buckets ask for go through the tower of config.initial.
Training computes the same from the features as from pixels; they are kept in the dtype of the model, bfloat16
by default.
--movie_features FOLDER converts LLaMA-VID's movie features (.pkl, read without executing them) instead; no
tower is needed for them. Records of the stages that name .pkl files are converted without it too.

Started again, with other stages or data too, it adds what is missing: of a run that was killed whole shards
are kept. Media that cannot be read are listed in FEATURES/skipped.jsonl.
Several processes share the work when each is started with the same arguments and config.distributed says how
they find each other, as for training. `features/store.py` says what the folder holds.
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
from dynfocus_jax.data.prepare import check_weights, make_media_reader, prepare
from dynfocus_jax.data.skipped import Skipped
from dynfocus_jax.errors import UserError
from dynfocus_jax.features.compatibility import check_frozen
from dynfocus_jax.features.extraction import Done, extract
from dynfocus_jax.features.media_list import Looker, movies_of, remaining, wanted_media
from dynfocus_jax.features.shards import ShardWriter, begin_folder, first_free_number
from dynfocus_jax.features.store import check_storable, describe, feature_dtype, feature_shape, read_index
from dynfocus_jax.features.tower import Tower, frames_mesh
from dynfocus_jax.parallel.start import first_goes_ahead, is_first, own_name, say, start
from dynfocus_jax.parameters import param_shapes, trained_paths
from dynfocus_jax.validation import validate
from dynfocus_jax.version import code_version

_OUTPUT = flags.DEFINE_string("output", None, "Folder of the features; may hold some already.")
_STAGE = flags.DEFINE_string("stage", None, "Only the media of this stage, or of 'evaluation'.")
_MOVIES = flags.DEFINE_string("movie_features", None, "Folder whose .pkl files are converted instead.")
_FRAMES = flags.DEFINE_integer(
    "batch_size", 32, "Frames that go through the tower at once on each device.", lower_bound=1
)

_SHARD_BYTES = 2**30
_SHARD_SECONDS = 600.0  # a killed run loses no more


def main() -> None:
    for name, flag in (("config", CONFIG_FLAG), ("output", _OUTPUT)):
        if flag.value is None:
            raise UserError(f"--{name} is missing; see --help.")
    start(CONFIG_FLAG.value.distributed)
    extract_features(
        CONFIG_FLAG.value,
        Path(_OUTPUT.value).expanduser(),
        stage=_STAGE.value,
        movies=_MOVIES.value and Path(_MOVIES.value).expanduser(),
        batch_size=_FRAMES.value,
    )


def extract_features(
    config: ConfigDict,
    output: Path,
    *,
    stage: str | None = None,
    movies: Path | None = None,
    batch_size: int = 32,
) -> Done:
    """Write the features that `output` does not have yet; returns what all processes have done.

    stage: whose media, None for all; movies: folder of movie features that are converted instead.
    batch_size: frames that go through the tower at once on each device.

    Raises:
      UserError: settings do not fit each other, the data or `output`; too many media cannot be read.
      RunError: features cannot be written.
    """
    # --- Settings -------------------------------------------------------------------------------------
    output = output.absolute()
    config = _settings(config)
    mesh = frames_mesh(config.mesh, jax.device_count())
    validate(config)
    check_storable(config)

    # --- Media ----------------------------------------------------------------------------------------
    with first_goes_ahead():
        data_root = prepare(config.data)
    if movies is not None:
        wanted = movies_of(movies, config, data_root, stage)
    else:
        check_weights(config)
        for index, each in enumerate(config.stages):
            paths = param_shapes(config, index)
            check_frozen(each.name, paths, trained_paths(config, index, paths))
        wanted = wanted_media(config, data_root, stage)
    looker = Looker(make_media_reader(config), config)

    # --- Tower ----------------------------------------------------------------------------------------
    tower = Tower(config, mesh, batch_size) if movies is None else None
    description = describe(config) | {"weights": tower and tower.weights, "code": code_version()}
    with first_goes_ahead():
        if is_first():
            begin_folder(output, description)
    work = remaining(wanted, read_index(output))
    number = first_free_number(output)
    say(f"{len(wanted)} media, {len(wanted) - len(work)} of them with features already")
    if is_first():
        _check_room(looker.estimate(work), config, output)

    # --- Extraction -----------------------------------------------------------------------------------
    process, processes = jax.process_index(), jax.process_count()
    share = work[process::processes]
    skipped = Skipped(output / own_name("skipped.jsonl"), max_share=config.data.max_skip_share)
    numbers = itertools.count(number + process, processes)
    shards = ShardWriter(output, numbers, max_bytes=_SHARD_BYTES, max_seconds=_SHARD_SECONDS)
    began = time.perf_counter()
    hidden = not (is_first() and sys.stderr.isatty())
    with tqdm.tqdm(total=len(share), desc="extracting", unit="file", disable=hidden) as bar:

        def progress(done: Done) -> None:
            bar.update(done.media + done.skipped - bar.n)
            bar.set_postfix_str(f"{done.frames} frames, {done.skipped} skipped", refresh=False)

        threads = config.data.threads
        done = extract(share, looker.look, tower, shards, skipped, threads=threads, progress=progress)
    done, seconds = _total(done), time.perf_counter() - began
    say(f"{done.media} media with {done.frames} frames extracted in {seconds:.1f} s, {done.skipped} skipped")
    return done


def _settings(config: ConfigDict) -> ConfigDict:
    """A configuration that reads pixels, each file once."""
    config = config.copy_and_resolve_references()
    config.data.features = None
    config.data.cache_gib = 0.0
    return config


def _check_room(frames: int, config: ConfigDict, output: Path) -> None:
    """Print how much will be written, about.

    Raises:
      UserError: there is not that much room.
    """
    size = frames * int(np.prod(feature_shape(config))) * feature_dtype(config).itemsize
    free = shutil.disk_usage(output).free
    gib = f"{size / 2**30:.3g} GiB"
    say(f"about {frames} frames to extract, {gib}; {free / 2**30:.3g} GiB are free in {output}")
    if size > free:
        raise UserError(
            f"--output {str(output)!r} has {free / 2**30:.3g} GiB free, but the features will have about "
            f"{gib}; choose a larger disk, or extract fewer stages or frames."
        )


def _total(done: Done) -> Done:
    """That of all processes."""
    if jax.process_count() == 1:
        return done
    return Done(*multihost_utils.process_allgather(np.asarray(done)).sum(axis=0).tolist())


if __name__ == "__main__":
    run_command(main)
