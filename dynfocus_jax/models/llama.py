"""Llama-family language model: embeddings in, hidden states and logits out.

By config Llama 1 to 3 and Vicuna, SmolLM2 (tied embeddings), Qwen2 (`qkv_bias`) and Qwen3 (`qk_norm`).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dynfocus_jax.models.layers import LoRA, RMSNorm, attention, attention_after, scan_layers
from dynfocus_jax.parallel.sharding import shard

ROPE_SCALINGS = ("none", "linear", "llama3")
PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")  # linear maps of a block


class Cache(NamedTuple):
    """Static-length `keys, values [layers, B, G, S, h]`, of which the first `lengths [B]` of S are filled.

    So they lie as attention reads them: with S before G they would be turned around for every token.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array


def rope_frequencies(
    head_dim: int,
    theta: float,
    scaling: str = "none",
    factor: float = 1.0,
    low_freq: float = 1.0,
    high_freq: float = 4.0,
    original_length: int = 8192,
) -> np.ndarray:
    """Radians a position by which each pair of a head's channels turns, float32 `[head_dim / 2]`.

    "linear" divides all by the factor. "llama3" divides those that turn fewer than `low_freq` times within
    `original_length`, keeps those that turn more than `high_freq` times and blends between them linearly in
    the number of turns (Hugging Face `modeling_rope_utils`, whose float32 arithmetic this follows).
    """
    frequency = 1 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if scaling == "linear":
        frequency = frequency / factor
    elif scaling == "llama3":
        turns = original_length * frequency / (2 * np.pi)
        kept = np.clip((turns - low_freq) / (high_freq - low_freq), 0, 1)
        frequency = frequency * kept + frequency / factor * (1 - kept)
    return frequency


def rotation(positions: jax.Array, frequency: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine float32 `[B, L, 1, h/2]` at `positions [B, L]`; `frequency [h/2]`: radians each."""
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of `x [B, L, H, h]` by the `rotation` of its positions.

    Halves are rotated as in Hugging Face Llama: channel i with channel i + h/2.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _write(buffer: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Put `new [layers, B, G, L, h]` at `positions [B, L] < S` of `buffer [layers, B, G, S, h]`."""
    rows = jnp.arange(buffer.shape[1])[:, None]
    new = jnp.transpose(new, (1, 3, 0, 2, 4))  # [B, L, layers, G, h], as it is indexed
    return buffer.at[:, rows, :, positions].set(new, mode="drop", unique_indices=True)


class DecoderBlock(nn.Module):
    """Pre-norm decoder block: grouped-query causal attention with RoPE, SwiGLU."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    qkv_bias: bool
    qk_norm: bool
    eps: float
    attention: str | None
    lora: object
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x, cache, context):
        """`x [B, L, width]`; cache: its (keys, values) or None -> `x`, keys and values of these positions.

        context: (positions `[B, L]`, lengths `[B]`, their `rotation`).
        """
        positions, lengths, (cos, sin) = context
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def linear(y, name, features, **options):
            options = {"use_bias": False} | options | types
            if self.lora is None or self.lora.rank == 0 or name not in self.lora.targets:
                return nn.DenseGeneral(features, name=name, **options)(y)
            base = nn.DenseGeneral(features, parent=None, **options)
            return LoRA(base, self.lora.rank, self.lora.alpha, name=name)(y)

        def heads(y, count, name):
            y = linear(y, name, (count, self.head_dim), use_bias=self.qkv_bias)
            return shard(y, "batch", "sequence" if name == "query" else None, "heads", None)

        def turned(y, name):
            if self.qk_norm:
                y = RMSNorm(self.eps, name=f"{name}_norm", **types)(y)
            return rope(y, cos, sin)

        x = shard(x, "batch", "sequence", None)
        y = RMSNorm(self.eps, name="attention_norm", **types)(x)
        # Every device looks with its share of the queries at all keys.
        query = turned(heads(y, self.heads, "query"), "query")
        key = turned(heads(y, self.kv_heads, "key"), "key")
        value = heads(y, self.kv_heads, "value")
        if cache is None or cache[0].shape[2] == 0:
            out = attention(
                query, key, value, causal=True, key_lengths=lengths, implementation=self.attention
            )
        else:
            out = attention_after(query, key, value, cache, positions[:, 0])
        x = shard(x + linear(out, "out", self.width, axis=(-2, -1)), "batch", "sequence", None)

        y = RMSNorm(self.eps, name="mlp_norm", **types)(x)
        gate, up = linear(y, "gate", self.mlp_dim), linear(y, "up", self.mlp_dim)
        y = shard(jax.nn.silu(gate) * up, "batch", "sequence", "hidden")
        x = shard(x + linear(y, "down", self.width), "batch", "sequence", None)
        return x, None if cache is None else (jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))


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
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 1e4
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_freq: float = 1.0
    rope_high_freq: float = 4.0
    rope_original_length: int = 8192
    eps: float = 1e-5
    tied_embeddings: bool = False
    remat: str = "none"
    attention: str | None = None
    lora: object = None  # the section `config.model.language.lora`; None builds no update
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
            self.qkv_bias,
            self.qk_norm,
            self.eps,
            self.attention,
            self.lora,
            self.dtype,
            self.param_dtype,
        )
        self.final_norm = RMSNorm(self.eps, **types)
        if not self.tied_embeddings:
            self.head = nn.Dense(
                self.vocab_size, use_bias=False, kernel_init=nn.initializers.normal(0.02), **types
            )

    def embed(self, tokens: jax.Array) -> jax.Array:
        return shard(self.embedding(tokens), "batch", None, None)

    def __call__(
        self, embeddings: jax.Array, lengths: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the last norm.

        Args:
          embeddings: `[B, L, width]`, right-padded.
          lengths: int32 `[B]`, valid positions in `embeddings`.
          cache: None for a plain causal pass, or a `Cache` that is extended by these positions: row b's
            tokens take positions `cache.lengths[b]...`. The caller sees to it that the valid ones fit (the
            padding need not). Chunks may differ in size from call to call. One without any position
            (`empty_cache(B, 0)`) becomes one of L, by the same computation as without.

        Returns:
          `[B, L, width]` (padding positions hold unspecified values) and the extended cache.
        """
        start = jnp.zeros_like(lengths) if cache is None else cache.lengths
        positions = start[:, None] + jnp.arange(embeddings.shape[1])
        layers = None if cache is None else (cache.keys, cache.values)
        frequency = rope_frequencies(
            self.head_dim,
            self.rope_theta,
            self.rope_scaling,
            self.rope_factor,
            self.rope_low_freq,
            self.rope_high_freq,
            self.rope_original_length,
        )
        x, new = self.blocks(embeddings, layers, (positions, lengths, rotation(positions, frequency)))
        if cache is not None and cache.keys.shape[3] > 0:
            new = (_write(cache.keys, new[0], positions), _write(cache.values, new[1], positions))
        if cache is not None:
            cache = Cache(*new, start + lengths)
        return self.final_norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[B, width]` or `[B, L, width]` -> `[..., vocab]` float32."""
        out = self.embedding.attend(hidden) if self.tied_embeddings else self.head(hidden)
        leading = ("batch", "sequence")[: out.ndim - 1]
        return shard(out.astype(jnp.float32), *leading, "vocab")

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache of `length` positions for `batch` rows."""
        shape = (self.depth, batch, self.kv_heads, length, self.head_dim)
        zeros = jnp.zeros(shape, self.dtype)
        return Cache(zeros, zeros, jnp.zeros((batch,), jnp.int32))
