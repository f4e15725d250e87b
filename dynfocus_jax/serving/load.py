"""A trained model from its checkpoint, ready to answer."""

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
from dynfocus_jax.training.checkpoints import read_params


class Run(NamedTuple):
    """A training run: its configuration, tokenizer, and the folder of a checkpoint's parameters."""

    config: ConfigDict
    tokenizer: object
    folder: Path


def load_run(checkpoint: Path) -> Run:
    """Read a run's configuration and tokenizer, without its parameters.

    Args:
      checkpoint: the workdir of a finished run, or WORKDIR/checkpoints/STAGE/STEP of any.

    Raises:
      UserError: it is neither, or the run is not finished.
    """
    checkpoint = checkpoint.expanduser().absolute()
    workdir, step = checkpoint, None
    if not (workdir / "config.json").is_file() and len(checkpoint.parents) > 2:
        workdir, step = checkpoint.parents[2], checkpoint
    if not (workdir / "config.json").is_file():
        raise UserError(
            f"--checkpoint {checkpoint} has no config.json; name the workdir of a training run, or "
            "WORKDIR/checkpoints/STAGE/STEP."
        )
    config = from_dict(json.loads((workdir / "config.json").read_text(encoding="utf-8")))
    config.initial = None  # what training started from may be gone
    config.data.features = None  # a question is about pixels
    if step is not None:
        config.stages = _ending_with(config, step)
    check_section(config, CONFIG, "config")
    stage = config.stages[-1]
    folder = step or workdir / "checkpoints" / stage.name / str(stage.steps)
    if not folder.is_dir():
        raise UserError(
            f"{folder.parent} has no checkpoint of step {folder.name}, the end of stage {stage.name!r}; "
            "finish the training run, or name one of its checkpoints."
        )
    return Run(config, make_tokenizer(config, workdir / "vocabulary.json", strict=False), folder)


def load_engine(run: Run, mesh: Mesh) -> Engine:
    """The engine of a run's checkpoint; each process reads its share of the parameters."""
    return Engine(run.config, read_params(run.folder, serving_layout(run.config, mesh)), run.tokenizer, mesh)


def _ending_with(config: ConfigDict, folder: Path) -> tuple[ConfigDict, ...]:
    """The stages, last the one whose checkpoint a folder is; all together say what is in which dtype."""
    names = [stage.name for stage in config.stages]
    if folder.parent.name not in names:
        raise UserError(
            f"--checkpoint {folder} is not a checkpoint of the run's stages {', '.join(names)}; name its "
            "workdir, or WORKDIR/checkpoints/STAGE/STEP."
        )
    others = [stage for stage in config.stages if stage.name != folder.parent.name]
    return (*others, config.stages[names.index(folder.parent.name)])
