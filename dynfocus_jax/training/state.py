"""The state of training, its dtypes and its layout on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.parallel.sharding import replicated
from dynfocus_jax.parameters import sharded_shapes, trained_paths
from dynfocus_jax.training.optimizer import make_optimizer


class TrainState(NamedTuple):
    """State that a train step updates; its leaves are arrays, or stand for them (shapes, shardings)."""

    step: Any  # int32 [], completed steps
    trained: dict  # parameters that the stage trains, nested dicts
    frozen: dict  # all other parameters
    opt_state: optax.OptState  # of the trained parameters


def abstract_state(config: ConfigDict, index: int, mesh: Mesh) -> TrainState:
    """Return the state of stage `index` as shapes, dtypes and layouts on the mesh; nothing is allocated.

    Each part of the optimizer state has the layout of its parameter.

    Raises:
      UserError: a pattern of the stage (`trainable`, `lr_scale`) matches no parameter, or the mesh does not
        divide one.
    """
    params = sharded_shapes(config, index, mesh)
    is_trained = trained_paths(config, index, params)
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
    """Return the shardings of a state, of arrays or of shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)
