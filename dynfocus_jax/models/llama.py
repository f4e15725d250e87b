"""Llama-family language model (Vicuna by config): embeddings in, hidden states and logits out."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynfocus_jax.models.layers import RMSNorm, attention, scan_layers


class Cache(NamedTuple):
    """Static-length `keys, values [layers, B, S, G, h]`, of which the first `lengths [B]` are filled."""

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding of `x [B, L, H, h]` at `positions [B, L]`; halves rotated as in Hugging Face Llama."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency  # [B, L, 1, h/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _append(buffer: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Write `new [B, L, G, h]` into `buffer [B, S, G, h]` from each row's `start [B]` on."""
    return jax.vmap(lambda b, n, s: jax.lax.dynamic_update_slice_in_dim(b, n.astype(b.dtype), s, 0))(
        buffer, new, start
    )


class DecoderBlock(nn.Module):
    """Pre-norm decoder block: grouped-query causal attention with RoPE, SwiGLU."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float
    eps: float
    attention: str | None
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x, cache, context):
        """`x [B, L, width]`; cache: its (keys, values) or None; context: (positions, lengths, start)."""
        positions, lengths, start = context
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def heads(y, count, name):
            return nn.DenseGeneral((count, self.head_dim), use_bias=False, name=name, **types)(y)

        y = RMSNorm(self.eps, name="attention_norm", **types)(x)
        query = rope(heads(y, self.heads, "query"), positions, self.rope_theta)
        key = rope(heads(y, self.kv_heads, "key"), positions, self.rope_theta)
        value = heads(y, self.kv_heads, "value")
        if cache is None:
            out = attention(
                query, key, value, causal=True, key_lengths=lengths, implementation=self.attention
            )
        else:
            key, value = _append(cache[0], key, start), _append(cache[1], value, start)
            cache = (key, value)
            visible = jnp.arange(key.shape[1]) <= positions[:, None, :, None]  # [B, 1, L, S]
            out = attention(query, key, value, mask=visible, implementation=self.attention)
        x = x + nn.DenseGeneral(self.width, axis=(-2, -1), use_bias=False, name="out", **types)(out)

        y = RMSNorm(self.eps, name="mlp_norm", **types)(x)
        gate = nn.Dense(self.mlp_dim, use_bias=False, name="gate", **types)(y)
        up = nn.Dense(self.mlp_dim, use_bias=False, name="up", **types)(y)
        x = x + nn.Dense(self.width, use_bias=False, name="down", **types)(jax.nn.silu(gate) * up)
        return x, cache


class Llama(nn.Module):
    """Decoder-only language model over embeddings.

    Three uses: `embed(tokens [B, L]) -> [B, L, width]`; calling it on embeddings; `logits(hidden)`.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_dim: int
    head_dim: int
    rope_theta: float = 1e4
    eps: float = 1e-5
    tied_embeddings: bool = False
    remat: str = "none"
    attention: str | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def setup(self):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embedding = nn.Embed(
            self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.02), **types
        )
        self.blocks = scan_layers(DecoderBlock, self.depth, self.remat)(
            self.width,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.mlp_dim,
            self.rope_theta,
            self.eps,
            self.attention,
            self.dtype,
            self.param_dtype,
        )
        self.final_norm = RMSNorm(self.eps, **types)
        if not self.tied_embeddings:
            self.head = nn.Dense(
                self.vocab_size, use_bias=False, kernel_init=nn.initializers.normal(0.02), **types
            )

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding(tokens)

    def __call__(
        self, embeddings: jax.Array, lengths: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the last norm.

        Args:
          embeddings: `[B, L, width]`, right-padded.
          lengths: int32 `[B]`, valid positions in `embeddings`.
          cache: None for a plain causal pass, or a `Cache` that is extended by these positions: row b's
            tokens take positions `cache.lengths[b]...`. The caller sees to it that they fit.

        Returns:
          `[B, L, width]` (padding positions hold unspecified values) and the extended cache.
        """
        start = jnp.zeros_like(lengths) if cache is None else cache.lengths
        positions = start[:, None] + jnp.arange(embeddings.shape[1])
        layers = None if cache is None else (cache.keys, cache.values)
        x, layers = self.blocks(embeddings, layers, (positions, lengths, start))
        if cache is not None:
            cache = Cache(*layers, start + lengths)
        return self.final_norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., width] -> [..., vocab]` float32."""
        out = self.embedding.attend(hidden) if self.tied_embeddings else self.head(hidden)
        return out.astype(jnp.float32)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache of `length` positions for `batch` rows."""
        shape = (self.depth, batch, length, self.kv_heads, self.head_dim)
        zeros = jnp.zeros(shape, self.dtype)
        return Cache(zeros, zeros, jnp.zeros((batch,), jnp.int32))
