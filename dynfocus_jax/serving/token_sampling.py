"""Sampling of the next token, greedy or by temperature, top-k and top-p; each row has its own settings.

The rules and their order are those of Hugging Face's `generate`: the logits are divided by the temperature,
then top-k keeps the k largest, then top-p keeps the smallest set of those whose probabilities reach p.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from dynfocus_jax.sections import Field, Section, check_value


class SamplingParams(NamedTuple):
    """Sampling settings of one answer.

    An answer depends on its own seed and prompt, not on the other requests of its batch.
    """

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # most likely tokens that are kept; 0 keeps all
    top_p: float = 1.0  # probability mass that is kept, in (0, 1]; 1 keeps all
    seed: int = 0


GREEDY = SamplingParams()

SAMPLING: Section = {
    "temperature": Field(0.0, "sampling temperature; 0: greedy decoding", at_least=0, below=float("inf")),
    "top_k": Field(0, "sample from the k most likely tokens; 0: from all tokens", at_least=0),
    "top_p": Field(
        1.0, "sample from the most likely tokens that together have probability p", above=0, at_most=1
    ),
}
_SEED = Field(0, "seed for sampling", at_least=0, below=2**32)


class RowSampling(NamedTuple):
    """`SamplingParams` of the rows of a batch."""

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    seed: UInt32[Array, " B"]


def check_sampling(params: SamplingParams, where: str) -> None:
    """Check that every setting is in its range; raise UserError, which begins with `where`, otherwise."""
    for name, field in {**SAMPLING, "seed": _SEED}.items():
        check_value(getattr(params, name), field, f"{where}: {name}")


def stack_sampling(params: Sequence[SamplingParams]) -> RowSampling:
    """Return the settings of each row as numpy arrays."""
    dtypes = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "seed": np.uint32}
    columns: dict[str, Any] = {
        name: np.asarray([getattr(row, name) for row in params], dtype) for name, dtype in dtypes.items()
    }
    return RowSampling(**columns)


def filter_logits(logits: Float32[Array, "B V"], sampling: RowSampling) -> Float32[Array, "B V"]:
    """Return the logits over the temperature, with -inf for tokens that top-k or top-p leaves out.

    Tokens that tie with the last one kept are kept too. The values of greedy rows are unspecified.
    """
    vocab = logits.shape[-1]
    scaled = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
    ranked = -jnp.sort(-scaled, axis=-1)  # [B, V], descending
    count = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    least = jnp.take_along_axis(ranked, count[:, None] - 1, axis=-1)
    ranked = jnp.where(ranked >= least, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # mass of all likelier tokens
    top_p = sampling.top_p[:, None]
    inside = ((before < top_p) | (top_p >= 1)) & (ranked > -jnp.inf)
    least = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= least, scaled, -jnp.inf)


def sample_tokens(
    logits: Float32[Array, "B V"], sampling: RowSampling, num_generated: Int32[Array, " B"]
) -> Int32[Array, " B"]:
    """Sample the next token of each row, of whose answer there are `num_generated` tokens already."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sample():
        def sample_row(seed, num_generated, logits):
            return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), num_generated), logits)

        sampled = jax.vmap(sample_row)(sampling.seed, num_generated, filter_logits(logits, sampling))
        return jnp.where(sampling.temperature > 0, sampled.astype(jnp.int32), greedy)

    # Most batches are greedy, and sorting the vocabulary costs more than everything else here.
    return jax.lax.cond(jnp.any(sampling.temperature > 0), sample, lambda: greedy)
