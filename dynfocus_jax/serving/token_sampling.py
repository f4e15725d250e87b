"""Sampling of the next token: greedy, or by temperature, top-k and top-p, each row by its own settings.

The rules and their order are those of Hugging Face's `generate`: the temperature divides the logits, top-k
keeps the k largest, top-p of the rest the smallest set whose probabilities reach p.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynfocus_jax.errors import UserError


class SamplingParams(NamedTuple):
    """Sampling settings of one answer.

    temperature: 0 is greedy; top_k: so many candidates, 0 for all; top_p: in (0, 1], 1 for all.
    seed: an answer depends on its own seed and prompt, not on what is answered beside it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


GREEDY = SamplingParams()


class Rows(NamedTuple):
    """`SamplingParams` of the rows of a batch: float32, int32, float32 and uint32, each `[B]`."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array


def check_sampling(params: SamplingParams, where: str) -> None:
    """Check the settings; raise UserError if one is out of range.

    Raises:
      UserError: they do not.
    """
    if not 0 <= params.temperature < float("inf"):
        raise UserError(f"{where}: temperature is {params.temperature}, expected 0 (greedy) or more.")
    if params.top_k < 0:
        raise UserError(f"{where}: top_k is {params.top_k}, expected 0 (all tokens) or more.")
    if not 0 < params.top_p <= 1:
        raise UserError(f"{where}: top_p is {params.top_p}, expected more than 0 and at most 1.")
    if not 0 <= params.seed < 2**32:
        raise UserError(f"{where}: seed is {params.seed}, expected 0 to 2**32 - 1.")


def as_rows(params: Sequence[SamplingParams]) -> Rows:
    """The settings of each row, as numpy arrays."""
    columns = zip(*params, strict=True)
    dtypes = (np.float32, np.int32, np.float32, np.uint32)
    return Rows(*(np.asarray(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)))


def kept_logits(logits: jax.Array, rows: Rows) -> jax.Array:
    """Logits float32 `[B, V]` over the temperature; those that top-k and top-p leave out are -inf.

    Tokens that tie with the last one kept are kept too. Greedy rows hold unspecified values.
    """
    vocab = logits.shape[-1]
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
    ranked = -jnp.sort(-scaled, axis=-1)  # [B, V], descending
    count = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab)
    least = jnp.take_along_axis(ranked, count[:, None] - 1, axis=-1)
    ranked = jnp.where(ranked >= least, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # of all tokens that are likelier
    inside = ((before < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1)) & (ranked > -jnp.inf)
    least = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= least, scaled, -jnp.inf)


def choose(logits: jax.Array, rows: Rows, number: jax.Array) -> jax.Array:
    """The next token of each row, int32 `[B]`.

    logits: float32 `[B, V]`; number: int32 `[B]`, how many tokens of the answer there are already.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw():
        def one(seed, number, logits):
            return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), number), logits)

        drawn = jax.vmap(one)(rows.seed, number, kept_logits(logits, rows))
        return jnp.where(rows.temperature > 0, drawn.astype(jnp.int32), greedy)

    # Sorting the vocabulary costs more than all else here, and most batches are greedy.
    return jax.lax.cond(jnp.any(rows.temperature > 0), draw, lambda: greedy)
