"""Parameters of a model: which of them a stage trains, their shapes, dtypes, layout and initial values."""

import re
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.connectors.registry import find_connector
from dynfocus_jax.parallel.sharding import param_shardings
from dynfocus_jax.video_language_model import VideoLanguageModel, build_model, make_init, stage_section


def trainable_patterns(config: ConfigDict, index: int) -> tuple[str, ...]:
    """Return the regular expressions of what stage `index` trains; by default, what its connector names."""
    stage = config.stages[index]
    if stage.trainable is not None:
        return tuple(stage.trainable)
    return find_connector(stage_section(config, index).connector.kind).TRAINABLE


def trained_paths(config: ConfigDict, index: int, paths: Iterable[str]) -> Callable[[str], bool]:
    """Return the predicate of the parameter paths that stage `index` trains.

    Raises:
      UserError: one of the stage's patterns matches no path.
    """
    where = f"stage {config.stages[index].name!r}, trainable"
    return trees.matcher(trainable_patterns(config, index), list(paths), where)


def param_shapes(config: ConfigDict, index: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every parameter of stage `index`, {path: shape}; nothing is allocated.

    Parameters that some stage trains are held in the model's `param_dtype` in all stages, so that nothing
    learned is rounded; those that no stage trains, in the `dtype` of the computation.
    """
    init = make_init(build_model(config, index))
    numbers = range(len(config.stages))
    patterns = [re.compile(pattern) for number in numbers for pattern in trainable_patterns(config, number)]

    def held(path: str) -> str:
        trained = any(pattern.fullmatch(path) for pattern in patterns)
        return config.model.param_dtype if trained else config.model.dtype

    shapes = jax.eval_shape(init, jax.random.key(0))
    return {path: jax.ShapeDtypeStruct(leaf.shape, held(path)) for path, leaf in shapes.items()}


def sharded_shapes(config: ConfigDict, index: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return `param_shapes` with the layout of each parameter on the mesh.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    shapes = param_shapes(config, index)
    connector = find_connector(stage_section(config, index).connector.kind)
    shardings = param_shardings(shapes, mesh, connector.SHARDING)
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in shapes.items()
    }


def init_params(
    model: VideoLanguageModel, key: jax.Array, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Return initial values of the wanted parameters, {path: array}, each created in its place on the mesh.

    wanted: {path: shape, dtype and layout}.
    """
    init, data = make_init(model), np.asarray(jax.random.key_data(key))

    def make(data):
        params = init(jax.random.wrap_key_data(data))
        return {path: params[path].astype(like.dtype) for path, like in wanted.items()}

    return jax.jit(make, out_shardings={path: like.sharding for path, like in wanted.items()})(data)
