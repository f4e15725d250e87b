"""Load a trained model from its checkpoint into the engine."""

import json
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from dynfocus_jax.config import CONFIG, from_dict
from dynfocus_jax.data.prepare import make_tokenizer
from dynfocus_jax.errors import UserError
from dynfocus_jax.sections import check_section
from dynfocus_jax.serving.engine import Engine, serving_layout
from dynfocus_jax.text.tokenizers import Tokenizer
from dynfocus_jax.training.checkpoints import read_params


class TrainedRun(NamedTuple):
    """Configuration and tokenizer of a training run, and the folder of a checkpoint's parameters."""

    config: ConfigDict
    tokenizer: Tokenizer
    folder: Path


def load_run(checkpoint: Path) -> TrainedRun:
    """Load a training run's configuration and tokenizer, without its parameters.

    Args:
      checkpoint: the workdir of a finished run, or one checkpoint, WORKDIR/checkpoints/STAGE/STEP.

    Raises:
      UserError: the path is neither, or the run is not finished.
    """
    checkpoint = checkpoint.expanduser().absolute()
    workdir, step = checkpoint, None
    if not (workdir / "config.json").is_file() and len(checkpoint.parents) > 2:
        workdir, step = checkpoint.parents[2], checkpoint
    if not (workdir / "config.json").is_file():
        raise UserError(
            f"--checkpoint {checkpoint} has no config.json; set it to the workdir of a training run, "
            "or to WORKDIR/checkpoints/STAGE/STEP."
        )
    config = from_dict(json.loads((workdir / "config.json").read_text(encoding="utf-8")))
    config.initial = None  # the checkpoint that training started from may be gone
    config.data.features = None  # questions are about pixels
    if step is not None:
        config.stages = _stages_ending_with(config, step)
    check_section(config, CONFIG, "config")
    stage = config.stages[-1]
    folder = step or workdir / "checkpoints" / stage.name / str(stage.steps)
    if not folder.is_dir():
        raise UserError(
            f"{folder.parent} has no checkpoint of step {folder.name}, the last of stage {stage.name!r}; "
            "finish the training run, or set --checkpoint to one of its checkpoints."
        )
    return TrainedRun(config, make_tokenizer(config, workdir / "vocabulary.json", strict=False), folder)


def load_engine(run: TrainedRun, mesh: Mesh) -> Engine:
    """Load the engine of a run's checkpoint; each process reads only the parameters of its own devices."""
    return Engine(run.config, read_params(run.folder, serving_layout(run.config, mesh)), run.tokenizer, mesh)


def _stages_ending_with(config: ConfigDict, folder: Path) -> tuple[ConfigDict, ...]:
    """Return the stages with the one that wrote checkpoint `folder` last, as the engine uses the last stage.

    The other stages stay, because the parameters that any stage trains have `param_dtype`.
    """
    names = [stage.name for stage in config.stages]
    if folder.parent.name not in names:
        raise UserError(
            f"--checkpoint {folder} is not a checkpoint of the run's stages {', '.join(names)}; set it to "
            "the workdir, or to WORKDIR/checkpoints/STAGE/STEP."
        )
    others = [stage for stage in config.stages if stage.name != folder.parent.name]
    return (*others, config.stages[names.index(folder.parent.name)])
