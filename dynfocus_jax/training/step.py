"""The train step: one compiled function of state and batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.batch import Batch
from dynfocus_jax.connectors.interface import Randomness
from dynfocus_jax.parallel.sharding import batch_sharding, on_mesh, replicated
from dynfocus_jax.training.losses import chunked_answer_loss
from dynfocus_jax.training.state import TrainState
from dynfocus_jax.video_language_model import VideoLanguageModel, row_randomness


def make_train_step(
    model: VideoLanguageModel,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    stage: ConfigDict,
    key: jax.Array,
    shardings: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Return the jitted step from (state, batch) to (new state, metrics); it donates the state.

    Args:
      model: the model of the stage.
      optimizer: see `make_optimizer`.
      learning_rate: schedule, reported in the metrics.
      stage: the section of the stage.
      key: PRNG key that the randomness of every step is derived from.
      shardings: shardings of the state (`state_shardings`), on the mesh that the step runs on.

    The metrics are float32 scalars over the global batch: loss, grad_norm, learning_rate, frames, tokens.
    """
    mesh = shardings.step.mesh

    def loss_and_gradient(state: TrainState, batch: Batch, answers: jax.Array, randomness: Randomness):
        """Return these rows' part of the mean loss over all `answers`, their visual tokens and gradients."""

        def loss_fn(trained):
            variables = {"params": trees.merge(trained, state.frozen)}

            def apply(*inputs, method: Callable, **options) -> Any:
                return model.apply(variables, *inputs, method=method, **options)

            hidden, visual = apply(batch, train=True, randomness=randomness, method=VideoLanguageModel.hidden)
            logits = functools.partial(apply, method=VideoLanguageModel.logits)
            total, _ = chunked_answer_loss(hidden, logits, batch, stage.loss_chunk)
            return total.sum() / answers, visual.count.sum()

        (loss, visual), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trained)
        return loss, visual, jax.lax.with_sharding_constraint(grads, shardings.trained)

    def accumulate(state: TrainState, batch: Batch, answers: jax.Array, randomness: Randomness):
        """Return the same, computed in n microbatches one after the other.

        Microbatch i has every n-th row from row i on: each device then has the same part of every microbatch,
        and no row moves between devices.
        """
        count = stage.microbatches
        layout = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))

        def split(x):
            x = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
            return jax.lax.with_sharding_constraint(x, layout)

        def add(sums, microbatch):
            rows, keys = microbatch
            contribution = loss_and_gradient(state, rows, answers, randomness._replace(keys=keys))
            return jax.tree.map(jnp.add, sums, contribution), None

        grads = jax.tree.map(jnp.zeros_like, state.trained)
        sums = jnp.float32(0), jnp.int32(0), jax.lax.with_sharding_constraint(grads, shardings.trained)
        return jax.lax.scan(add, sums, (jax.tree.map(split, batch), split(randomness.keys)))[0]

    def step_fn(state: TrainState, batch: Batch):
        answers = jnp.maximum(batch.loss_mask.sum(dtype=jnp.float32), 1)
        with on_mesh(mesh):
            # One key per row of the global batch: a row draws the same in any microbatch and on any mesh
            step_key, rows = jax.random.fold_in(key, state.step), len(batch.index)
            randomness = row_randomness(step_key, rows, state.step < stage.random_steps)
            compute = loss_and_gradient if stage.microbatches == 1 else accumulate
            loss, num_visual, grads = compute(state, batch, answers, randomness)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        trained: Any = optax.apply_updates(state.trained, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
            "frames": batch.frame_mask.sum(dtype=jnp.float32),
            "tokens": (num_visual + batch.length.sum()).astype(jnp.float32),
        }
        return TrainState(state.step + 1, trained, state.frozen, opt_state), metrics

    return jax.jit(
        step_fn,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
