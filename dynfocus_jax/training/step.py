"""The train step: one compiled function of state and batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.batch import Batch
from dynfocus_jax.parallel.sharding import batch_sharding, on_mesh, replicated
from dynfocus_jax.training.losses import chunked_answer_loss
from dynfocus_jax.training.state import TrainState
from dynfocus_jax.video_language_model import DynFocus


def make_train_step(
    model: DynFocus,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    stage: ConfigDict,
    key: jax.Array,
    shardings: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step; the state is donated. Metrics are float32 scalars over the global batch.

    shardings: of the state (`state_shardings`), on the mesh that the step runs on.
    """
    mesh = shardings.step.mesh

    def loss_and_gradient(state: TrainState, batch: Batch, answers: jax.Array, share=None):
        """The part that these rows have in the mean over all `answers`, their visual tokens, the gradient."""

        def loss_fn(trained):
            variables = {"params": trees.merge(trained, state.frozen)}
            hidden, visual = model.apply(
                variables,
                batch,
                train=True,
                random_selection=state.step < stage.random_steps,
                share=share,
                rngs={"selection": jax.random.fold_in(key, state.step)},
                method=DynFocus.hidden,
            )

            def logits(hidden):
                return model.apply(variables, hidden, method=DynFocus.logits)

            total, _ = chunked_answer_loss(hidden, logits, batch, stage.loss_chunk)
            return total.sum() / answers, visual.count.sum()

        (loss, visual), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trained)
        return loss, visual, jax.lax.with_sharding_constraint(grads, shardings.trained)

    def accumulate(state: TrainState, batch: Batch, answers: jax.Array):
        """The same in `microbatches` parts: part i has every n-th row from i on, so that no row moves."""
        count = stage.microbatches
        layout = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))

        def parts(x):
            x = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
            return jax.lax.with_sharding_constraint(x, layout)

        def add(sums, part):
            index, rows = part
            return jax.tree.map(jnp.add, sums, loss_and_gradient(state, rows, answers, (index, count))), None

        grads = jax.tree.map(jnp.zeros_like, state.trained)
        sums = jnp.float32(0), jnp.int32(0), jax.lax.with_sharding_constraint(grads, shardings.trained)
        return jax.lax.scan(add, sums, (jnp.arange(count), jax.tree.map(parts, batch)))[0]

    def step_fn(state: TrainState, batch: Batch):
        answers = jnp.maximum(batch.loss_mask.sum(dtype=jnp.float32), 1)
        with on_mesh(mesh):
            whole = loss_and_gradient if stage.microbatches == 1 else accumulate
            loss, visual, grads = whole(state, batch, answers)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
            "frames": batch.frame_mask.sum(dtype=jnp.float32),
            "tokens": (visual + batch.length.sum()).astype(jnp.float32),
        }
        return TrainState(state.step + 1, trained, state.frozen, opt_state), metrics

    return jax.jit(
        step_fn,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
