"""The training loss."""

import jax
import jax.numpy as jnp
import optax

from dynfocus_jax.batch import Batch


def answer_loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the answer tokens.

    Args:
      logits: float32 `[B, Lt, V]`, row i predicting text token i.
      batch: its `tokens` and `loss_mask`.

    Returns:
      Sum of the losses of each sample `[B]` float32, and its number of answer tokens `[B]` float32.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens)
    mask = batch.loss_mask.astype(jnp.float32)
    return jnp.sum(losses * mask, axis=1), jnp.sum(mask, axis=1)
