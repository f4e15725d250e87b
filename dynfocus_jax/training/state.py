"""The state of training: what it holds, in which dtypes, and how it lies on the mesh."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.parallel.sharding import param_shardings, replicated
from dynfocus_jax.training.optimizer import make_optimizer
from dynfocus_jax.video_language_model import DynFocus, build_model, make_init


class TrainState(NamedTuple):
    """step: int32 steps done; trained, frozen: the two parts of the parameters; opt_state: of the trained."""

    step: jax.Array
    trained: dict
    frozen: dict
    opt_state: optax.OptState


def init_params(
    model: DynFocus, key: jax.Array, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Initial values of the wanted parameters {path: shape, dtype and layout}, made where they are to lie."""
    init, data = make_init(model), np.asarray(jax.random.key_data(key))

    def make(data):
        params = init(jax.random.wrap_key_data(data))
        return {path: params[path].astype(like.dtype) for path, like in wanted.items()}

    return jax.jit(make, out_shardings={path: like.sharding for path, like in wanted.items()})(data)


def trained_paths(stage: ConfigDict, paths: Iterable[str]) -> Callable[[str], bool]:
    """Whether a stage trains a parameter of these paths.

    Raises:
      UserError: one of its patterns matches no path.
    """
    return trees.matcher(stage.trainable, list(paths), f"stage {stage.name!r}, trainable")


def param_shapes(config: ConfigDict, index: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter of stage `index`, {path: shape}; nothing is allocated.

    What some stage of the configuration trains is held in the model's `param_dtype`, from the first stage to
    the last, so that nothing learned is rounded; what no stage trains, in the `dtype` of the computation.
    """
    init = make_init(build_model(config, config.stages[index].connector))
    patterns = [re.compile(pattern) for stage in config.stages for pattern in stage.trainable]

    def held(path: str) -> str:
        trained = any(pattern.fullmatch(path) for pattern in patterns)
        return config.model.param_dtype if trained else config.model.dtype

    shapes = jax.eval_shape(init, jax.random.key(0))
    return {path: jax.ShapeDtypeStruct(leaf.shape, held(path)) for path, leaf in shapes.items()}


def abstract_params(config: ConfigDict, index: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """`param_shapes` with their layout on the mesh.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    shapes = param_shapes(config, index)
    shardings = param_shardings(shapes, mesh)
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in shapes.items()
    }


def abstract_state(config: ConfigDict, index: int, mesh: Mesh) -> TrainState:
    """The state of stage `index` as shapes, dtypes and layouts on the mesh; nothing is allocated.

    The optimizer's state follows the parameters it belongs to.

    Raises:
      UserError: a pattern of the stage (`trainable`, `lr_scale`) matches no parameter, or the mesh does not
        divide one.
    """
    params = abstract_params(config, index, mesh)
    is_trained = trained_paths(config.stages[index], params)
    trained, frozen = trees.split(trees.unflatten(params), is_trained)
    optimizer = make_optimizer(config.stages[index], trained)

    def scalar(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh))

    opt_state = optax.tree.map_params(
        optimizer,
        lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
        jax.eval_shape(optimizer.init, trained),
        trained,
        transform_non_params=scalar,
    )
    return TrainState(scalar(jax.ShapeDtypeStruct((), jnp.int32)), trained, frozen, opt_state)


def state_shardings(state: TrainState) -> TrainState:
    """The layouts of a state, abstract or not."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)
