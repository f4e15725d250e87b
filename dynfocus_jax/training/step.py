"""The train step: one compiled function of state and batch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.batch import Batch
from dynfocus_jax.models.dynfocus import DynFocus
from dynfocus_jax.parallel import mesh as mesh_lib
from dynfocus_jax.training.losses import answer_loss


class TrainState(NamedTuple):
    """step: int32 steps done; trained, frozen: the two parts of the parameters; opt_state: of the trained."""

    step: jax.Array
    trained: dict
    frozen: dict
    opt_state: optax.OptState


def make_train_step(
    model: DynFocus,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    stage: ConfigDict,
    key: jax.Array,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step; the state is donated. Metrics are float32 scalars over the global batch."""

    def step_fn(state: TrainState, batch: Batch):
        def loss_fn(trained):
            output = model.apply(
                {"params": trees.merge(trained, state.frozen)},
                batch,
                train=True,
                random_selection=state.step < stage.random_steps,
                rngs={"selection": jax.random.fold_in(key, state.step)},
            )
            total, count = answer_loss(output.logits, batch)
            return total.sum() / jnp.maximum(count.sum(), 1), output.visual.count

        (loss, visual), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
            "frames": batch.frame_mask.sum(dtype=jnp.float32),
            "tokens": (visual.sum() + batch.length.sum()).astype(jnp.float32),
        }
        return TrainState(state.step + 1, trained, state.frozen, opt_state), metrics

    everywhere = mesh_lib.replicated(mesh)
    return jax.jit(
        step_fn,
        in_shardings=(everywhere, mesh_lib.over_batch(mesh)),
        out_shardings=(everywhere, everywhere),
        donate_argnums=0,
    )
