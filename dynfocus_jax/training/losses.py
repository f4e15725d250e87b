"""The training loss."""

from collections.abc import Callable

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
    return _sums(logits, batch.tokens, batch.loss_mask)


def chunked_answer_loss(
    hidden: jax.Array, logits: Callable[[jax.Array], jax.Array], batch: Batch, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`answer_loss` that holds the logits of `chunk` text tokens a sample at a time, backwards too.

    Args:
      hidden: `[B, Lt, D]`, row i predicting text token i.
      logits: a function of some of its rows, `[B, n, D] -> [B, n, V]` float32.
      batch: its `tokens` and `loss_mask`.
      chunk: 0, or a number of Lt or more, takes all tokens at once.
    """
    rows, length = batch.tokens.shape
    if not 0 < chunk < length:
        return answer_loss(logits(hidden), batch)
    padding = -length % chunk

    def chunks(x):  # [B, Lt, ...] -> [chunks, B, chunk, ...], padded with what has no loss
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
