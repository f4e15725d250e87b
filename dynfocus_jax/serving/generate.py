"""Greedy answers: prefill once, then decode with a cache of static length."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dynfocus_jax.batch import Batch
from dynfocus_jax.models.connectors import VisualTokens
from dynfocus_jax.models.dynfocus import DynFocus


class Answers(NamedTuple):
    """tokens: int32 `[B, n]`, from the end token on filled with it; visual: what the model looked at."""

    tokens: jax.Array
    visual: VisualTokens


def make_greedy(model: DynFocus, max_new_tokens: int, eos_id: int) -> Callable[[dict, Batch], Answers]:
    """A jitted function of parameters and a batch of prompts."""

    @jax.jit
    def greedy(params: dict, batch: Batch) -> Answers:
        variables = {"params": params}
        logits, cache, visual = model.apply(variables, batch, max_new_tokens, method=DynFocus.prefill)

        def pick(logits, done):
            token = jnp.where(done, eos_id, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
            return token, done | (token == eos_id)

        def body(carry, _):
            token, done, cache = carry
            logits, cache = model.apply(variables, token, cache, method=DynFocus.decode)
            token, done = pick(logits, done)
            return (token, done, cache), token

        first, done = pick(logits, jnp.zeros(logits.shape[0], bool))
        _, rest = jax.lax.scan(body, (first, done, cache), length=max_new_tokens - 1)
        return Answers(jnp.concatenate([first[:, None], rest.T], axis=1), visual)

    return greedy
