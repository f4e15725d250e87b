"""Scores of events: the score net of the paper (Eq. 6), and an extension that reads the question."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynfocus_jax.models.layers import Dtype, layer_norm


class ScoreNet(nn.Module):
    """Three-layer MLP with a global half: `[B, K, 2C]` -> unnormalised scores `[B, K]` (Eq. 6)."""

    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        def dense(width, name):
            return nn.Dense(width, name=name, dtype=self.dtype, param_dtype=self.param_dtype)

        width = x.shape[-1] // 2
        x = layer_norm("in_norm", 1e-5, self.dtype, self.param_dtype)(x)
        x = jax.nn.gelu(dense(2 * width, "in_dense")(x), approximate=False)
        own, pooled = jnp.split(x, 2, axis=-1)
        weights = valid / jnp.maximum(valid.sum(axis=-1, keepdims=True), 1)  # mean over valid prototypes
        pooled = jnp.einsum("bk,bkc->bc", weights.astype(x.dtype), pooled)
        x = jnp.concatenate([own, jnp.broadcast_to(pooled[:, None], own.shape)], axis=-1)
        x = jax.nn.gelu(dense(width, "out_dense_0")(x), approximate=False)
        x = jax.nn.gelu(dense(width // 2, "out_dense_1")(x), approximate=False)
        return dense(1, "out_dense_2")(x)[..., 0].astype(jnp.float32)


class QuestionScore(nn.Module):
    """Extension (not in the paper): bilinear match of the question with a prototype, zero at the start.

    `sum over question tokens of max over P of emb(token)^T W LN(E)`: words `[B, Lq, E]` with their
    `lengths [B]`, events `[B, K, P, C]` -> `[B, K]` float32.
    """

    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, words: jax.Array, lengths: jax.Array, events: jax.Array) -> jax.Array:
        events = layer_norm("event_norm", 1e-5, self.dtype, self.param_dtype)(events)
        words = nn.Dense(
            events.shape[-1],
            use_bias=False,
            kernel_init=nn.initializers.zeros,
            name="bilinear",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )(words)
        match = jnp.einsum("bqc,bkpc->bkqp", words, events).max(axis=-1).astype(jnp.float32)
        mask = jnp.arange(words.shape[1]) < lengths[:, None]
        return jnp.einsum("bkq,bq->bk", match, mask.astype(jnp.float32))
