"""The training loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dynfocus_jax.batch import Batch


def answer_loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return the cross-entropy of the answer tokens.

    Args:
      logits: float32 `[B, Lt, V]`, of which row i predicts text token i.
      batch: `tokens` and `loss_mask` are used.

    Returns:
      The sum of the losses of each sample and its number of answer tokens, float32 `[B]` each.
    """
    return _sums(logits, batch.tokens, batch.loss_mask)


def chunked_answer_loss(
    hidden: jax.Array, logits: Callable[[jax.Array], jax.Array], batch: Batch, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Return `answer_loss`, with the logits of only `chunk` text tokens per sample in memory at a time.

    The backward pass computes the logits of each chunk again.

    Args:
      hidden: `[B, Lt, D]`, of which row i predicts text token i.
      logits: maps rows of `hidden` to logits, `[B, n, D] -> [B, n, V]` float32.
      batch: `tokens` and `loss_mask` are used.
      chunk: text tokens per chunk; 0, or Lt and more, takes all at once.
    """
    rows, length = batch.tokens.shape
    if not 0 < chunk < length:
        return answer_loss(logits(hidden), batch)
    padding = -length % chunk

    def chunks(x):  # [B, Lt, ...] -> [chunks, B, chunk, ...]; padding has no loss
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def add(sums, parts):
        hidden, tokens, mask = parts
        return jax.tree.map(jnp.add, sums, _sums(logits(hidden), tokens, mask)), None

    nothing = jnp.zeros(rows, jnp.float32), jnp.zeros(rows, jnp.float32)
    sums, _ = jax.lax.scan(add, nothing, (chunks(hidden), chunks(batch.tokens), chunks(batch.loss_mask)))
    return sums


def _sums(logits: jax.Array, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    mask = mask.astype(jnp.float32)
    return jnp.sum(losses * mask, axis=1), jnp.sum(mask, axis=1)
