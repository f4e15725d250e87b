"""The parameters that a stage starts from: the stage before, an initial checkpoint, or random values."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.errors import UserError
from dynfocus_jax.parallel.processes import print_once
from dynfocus_jax.parallel.sharding import place_like
from dynfocus_jax.parameters import init_params
from dynfocus_jax.training.checkpoints import read_params, saved_shapes
from dynfocus_jax.video_language_model import VideoLanguageModel
from dynfocus_jax.weights.conversion import belongs_to_connector, check_params

Shapes = Mapping[str, jax.ShapeDtypeStruct]  # {parameter path: shape, dtype and layout}


def initial_params(
    config: ConfigDict,
    stage: ConfigDict,
    model: VideoLanguageModel,
    key: jax.Array,
    shapes: Shapes,
    previous: dict | None,
) -> dict[str, jax.Array]:
    """Return the parameters that a stage starts from, {path: array}.

    A parameter comes from the stage before, else from the checkpoint `config.initial`, else from random
    initialisation; the copies of `stage.copy` come last. No device ever holds a whole parameter that the
    mesh splits.

    Args:
      config: the configuration.
      stage: the section of the stage.
      model: the model of the stage.
      key: PRNG key of the random values.
      shapes: the parameters of the stage; the result has their dtypes and layouts.
      previous: parameters of the stage before as nested dicts, None for the first stage.

    Raises:
      UserError: a parameter has another shape in the stage before.
    """
    source = {path: leaf for path, leaf in trees.flatten(previous or {}).items() if path in shapes}
    for path, leaf in source.items():
        if leaf.shape != shapes[path].shape:
            raise UserError(
                f"stage {stage.name!r}: parameter {path} has shape {shapes[path].shape}, expected "
                f"{leaf.shape} as in the previous stage; use the same sizes in all stages."
            )
    shared = set(source)  # arrays that the result shares with `previous` or within itself
    if config.initial is not None:
        missing = {path: shape for path, shape in shapes.items() if path not in source}
        source |= trees.flatten(read_params(Path(config.initial), missing))
    new = shapes.keys() - source.keys()
    params = init_params(model, key, {path: shapes[path] for path in new}) | source
    for line in stage.copy:
        copies = _copies(line, params)
        params |= {destination: params[path] for path, destination in copies}
        shared |= {destination for _, destination in copies}
    if source and new:
        names = ", ".join(trees.prefixes(new, shapes))
        print_once(f"stage {stage.name}: new parameters, randomly initialised: {names}")
    # The train step donates its state, so each parameter needs memory of its own
    return {path: place_like(leaf, shapes[path]) if path in shared else leaf for path, leaf in params.items()}


def check_copies(stage: ConfigDict, shapes: Shapes) -> None:
    """Check that each entry of `stage.copy` names parameters of equal shapes; raise UserError otherwise."""
    for line in stage.copy:
        copies = _copies(line, shapes)
        wrong = [new for old, new in copies if new not in shapes or shapes[new].shape != shapes[old].shape]
        if not copies or wrong:
            problem = f"{', '.join(wrong)} has another shape or does not exist" if wrong else "no such source"
            raise UserError(
                f"stage {stage.name!r}: copy {line!r} does not fit the parameters ({problem}), expected "
                "'destination <- source' with parameter paths of this model."
            )


def _copies(line: str, paths: Iterable[str]) -> list[tuple[str, str]]:
    """Return the (source, destination) parameter paths of a copy "destination <- source"."""
    destination, _, source = (part.strip() for part in line.partition("<-"))
    return [(p, destination + p.removeprefix(source)) for p in paths if p.startswith(source + "/")]


class StageParams(Protocol):
    """The part of `loop.StageRun` that `check_initial` needs."""

    @property
    def shapes(self) -> Shapes: ...

    def is_trained(self, path: str, /) -> bool: ...


def check_initial(folder: str | None, stages: Sequence[StageParams]) -> None:
    """Check that the initial checkpoint fits, and that no frozen backbone stays randomly initialised.

    The checkpoint `folder` (`config.initial`) must have every parameter that no stage trains, except those of
    the connector.

    Raises:
      UserError: a parameter is missing, or has another shape (`check_params`).
    """
    shapes = {path: shape for stage in stages for path, shape in stage.shapes.items()}
    trained = {path for stage in stages for path in stage.shapes if stage.is_trained(path)}
    needed = [path for path in shapes if path not in trained and not belongs_to_connector(path)]
    if folder is None and needed:
        raise UserError(
            f"{', '.join(trees.prefixes(needed, shapes))} would stay randomly initialised, because no stage "
            "trains it; set config.initial to a checkpoint that has it, such as the --output of python -m "
            "dynfocus_jax.convert."
        )
    if folder is not None:
        check_params(saved_shapes(Path(folder)), shapes, needed, f"config.initial {folder!r}")
