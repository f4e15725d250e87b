"""The state of training: what it holds, in which dtypes, and how it lies on the mesh."""

from typing import NamedTuple

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
    """step: int32 steps done; trained, frozen: the two parts of the parameters; opt_state: of the trained."""

    step: jax.Array
    trained: dict
    frozen: dict
    opt_state: optax.OptState


def abstract_state(config: ConfigDict, index: int, mesh: Mesh) -> TrainState:
    """The state of stage `index` as shapes, dtypes and layouts on the mesh; nothing is allocated.

    The optimizer's state follows the parameters it belongs to.

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
    """The layouts of a state, abstract or not."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)
