"""Llama-family language model: embeddings in, hidden states and logits out.

The configuration selects Llama 1 to 3 and Vicuna, SmolLM2 (tied embeddings), Qwen2 (`qkv_bias`) or Qwen3
(`qk_norm`).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32
from ml_collections import FrozenConfigDict

from dynfocus_jax.models.layers import (
    AttentionKernel,
    Dtypes,
    Projection,
    RMSNorm,
    attention,
    cached_attention,
    scan_layers,
)
from dynfocus_jax.parallel.sharding import shard

ROPE_SCALINGS = ("none", "linear", "llama3")
PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")  # linear maps of a block

Rotation = tuple[jax.Array, jax.Array]  # cosine and sine, float32 [B, L, 1, h / 2]
KeysAndValues = tuple[jax.Array, jax.Array]  # of one layer, [B, G, L, h] each


class Cache(NamedTuple):
    """KV cache of static length S, of which the first `lengths` positions of each row are valid.

    G (key and value heads) stands before S, as attention reads it: in the other order XLA would transpose
    the cache for every token.
    """

    keys: Float[Array, "layers B G S h"]
    values: Float[Array, "layers B G S h"]
    lengths: Int32[Array, " B"]


def rope_frequencies(
    head_dim: int,
    theta: float,
    scaling: str = "none",
    factor: float = 1.0,
    low_freq: float = 1.0,
    high_freq: float = 4.0,
    original_length: int = 8192,
) -> np.ndarray:
    """Return the rotary frequency of each pair of a head's channels in radians per position.

    Args:
      head_dim: h, channels of a head.
      theta: base of the frequencies.
      scaling: "none"; "linear" divides all frequencies by `factor`; "llama3" divides those with fewer than
        `low_freq` turns in `original_length` positions, keeps those with more than `high_freq` turns, and
        interpolates linearly in the number of turns between them.

    Returns:
      float32 `[h / 2]`.

    Source: the float32 arithmetic follows Hugging Face's `modeling_rope_utils`.
    """
    frequencies = 1 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if scaling == "linear":
        frequencies = frequencies / factor
    elif scaling == "llama3":
        turns = original_length * frequencies / (2 * np.pi)
        kept = np.clip((turns - low_freq) / (high_freq - low_freq), 0, 1)
        frequencies = frequencies * kept + frequencies / factor * (1 - kept)
    return frequencies


def rope_rotation(positions: jax.Array, frequencies: np.ndarray) -> Rotation:
    """Return cosine and sine `[B, L, 1, h / 2]` of the angles at `positions [B, L]`, float32."""
    angle = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotate queries or keys `x [B, L, H, h]` by their positions.

    Channel i is paired with channel i + h / 2, as in Hugging Face's Llama.
    """
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _write_cache(buffer: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Write `new [layers, B, G, L, h]` to `positions [B, L]` of `buffer [layers, B, G, S, h]`.

    Positions from S on are dropped.
    """
    rows = jnp.arange(buffer.shape[1])[:, None]
    new = jnp.transpose(new, (1, 3, 0, 2, 4))  # [B, L, layers, G, h], the order of the indexed result
    return buffer.at[:, rows, :, positions].set(new, mode="drop", unique_indices=True)


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary embedding of queries and keys.

    `implementation` is the attention kernel of whole sequences. Inputs are `x [B, L, width]` and the
    `rotation` of their positions; outputs are `[B, L, width]` and the keys and values of these positions.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    qk_norm: bool
    eps: float
    implementation: AttentionKernel | None
    lora: FrozenConfigDict | None
    dtype: str
    param_dtype: str

    def setup(self):
        dtypes: Dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def to_heads(count: int) -> Projection:
            return Projection((count, self.head_dim), use_bias=self.qkv_bias, lora=self.lora, **dtypes)

        self.query = to_heads(self.heads)
        self.key = to_heads(self.kv_heads)
        self.value = to_heads(self.kv_heads)
        if self.qk_norm:
            self.query_norm = RMSNorm(self.eps, **dtypes)
            self.key_norm = RMSNorm(self.eps, **dtypes)
        self.out = Projection(self.width, axis=(-2, -1), lora=self.lora, **dtypes)

    def __call__(
        self, x: jax.Array, lengths: jax.Array, rotation: Rotation
    ) -> tuple[jax.Array, KeysAndValues]:
        """Attend within whole sequences, of which the first `lengths [B]` positions are valid."""
        query, key, value = self._project(x, rotation)
        out = attention(
            query, key, value, causal=True, key_lengths=lengths, implementation=self.implementation
        )
        return self.out(out), (jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))

    def extend(
        self, x: jax.Array, cached: KeysAndValues, cached_lengths: jax.Array, rotation: Rotation
    ) -> tuple[jax.Array, KeysAndValues]:
        """Attend to the first `cached_lengths [B]` positions of the layer's cache, then causally to `x`."""
        query, key, value = self._project(x, rotation)
        out = cached_attention(query, key, value, cached, cached_lengths)
        return self.out(out), (jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))

    def _project(self, x: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries `[B, L, H, h]`, keys and values `[B, L, G, h]`."""
        # Over devices on the sequence axis only the queries are split: each device has all keys.
        query = shard(self.query(x), "batch", "sequence", "heads", None)
        key = shard(self.key(x), "batch", None, "heads", None)
        value = shard(self.value(x), "batch", None, "heads", None)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return apply_rope(query, rotation), apply_rope(key, rotation), value


class SwiGLU(nn.Module):
    """Gated feed-forward `[B, L, width] -> [B, L, width]`: down(silu(gate(x)) * up(x))."""

    width: int
    mlp_dim: int
    lora: FrozenConfigDict | None
    dtype: str
    param_dtype: str

    def setup(self):
        dtypes: Dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.gate = Projection(self.mlp_dim, lora=self.lora, **dtypes)
        self.up = Projection(self.mlp_dim, lora=self.lora, **dtypes)
        self.down = Projection(self.width, lora=self.lora, **dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = shard(jax.nn.silu(self.gate(x)) * self.up(x), "batch", "sequence", "hidden")
        return self.down(hidden)


class DecoderBlock(nn.Module):
    """Pre-norm decoder block: x + attention(norm x), then x + SwiGLU(norm x).

    Its three methods are bodies of a scan over layers (`scan_layers`). The parameters of attention and SwiGLU
    lie directly under the block, as query/kernel, gate/kernel and so on.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    qkv_bias: bool
    qk_norm: bool
    eps: float
    implementation: AttentionKernel | None
    lora: FrozenConfigDict | None
    dtype: str
    param_dtype: str

    def setup(self):
        dtypes: Dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.attention_norm = RMSNorm(self.eps, **dtypes)
        self.attention = Attention(
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            eps=self.eps,
            implementation=self.implementation,
            lora=self.lora,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        self.mlp_norm = RMSNorm(self.eps, **dtypes)
        self.mlp = SwiGLU(self.width, self.mlp_dim, self.lora, self.dtype, self.param_dtype)
        nn.share_scope(self, self.attention)
        nn.share_scope(self, self.mlp)

    def __call__(self, x: jax.Array, _: None, context: tuple[jax.Array, Rotation]) -> tuple[jax.Array, None]:
        """Process whole sequences `x [B, L, width]`; context: lengths `[B]` and the positions' rotation."""
        return self.prefill(x, _, context)[0], None

    def prefill(
        self, x: jax.Array, _: None, context: tuple[jax.Array, Rotation]
    ) -> tuple[jax.Array, KeysAndValues]:
        """Process whole sequences as `__call__` does, and return their keys and values too."""
        lengths, rotation = context
        x = shard(x, "batch", "sequence", None)
        out, new = self.attention(self.attention_norm(x), lengths, rotation)
        return self._feed_forward(x + out), new

    def extend(
        self, x: jax.Array, cached: KeysAndValues, context: tuple[jax.Array, Rotation]
    ) -> tuple[jax.Array, KeysAndValues]:
        """Process positions that follow those in the cache; context: cached lengths `[B]` and rotation."""
        cached_lengths, rotation = context
        x = shard(x, "batch", "sequence", None)
        out, new = self.attention.extend(self.attention_norm(x), cached, cached_lengths, rotation)
        return self._feed_forward(x + out), new

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        x = shard(x, "batch", "sequence", None)
        return shard(x + self.mlp(self.mlp_norm(x)), "batch", "sequence", None)


class Llama(nn.Module):
    """Decoder-only language model: tokens to embeddings, embeddings to hidden states, those to logits.

    `embed` gives embeddings. Hidden states are computed without a KV cache by calling the module, with a new
    one by `prefill`, and from an existing one by `extend`. `logits` takes hidden states.
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
    attention: AttentionKernel | None = None
    lora: FrozenConfigDict | None = None  # the section `config.model.language.lora`; None for no updates
    dtype: str = "float32"
    param_dtype: str = "float32"

    def setup(self):
        dtypes: Dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normal = nn.initializers.normal(0.02)
        self.embedding = nn.Embed(self.vocab_size, self.width, embedding_init=normal, **dtypes)
        block = scan_layers(DecoderBlock, self.depth, self.remat, methods=("__call__", "prefill", "extend"))
        self.blocks = block(
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            eps=self.eps,
            implementation=self.attention,
            lora=self.lora,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        self.final_norm = RMSNorm(self.eps, **dtypes)
        if not self.tied_embeddings:
            self.head = nn.Dense(self.vocab_size, use_bias=False, kernel_init=normal, **dtypes)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Return the embeddings `[B, L, width]` of `tokens [B, L]`."""
        return shard(self.embedding(tokens), "batch", None, None)

    def __call__(self, embeddings: jax.Array, lengths: jax.Array) -> jax.Array:
        """Return the hidden states after the last norm, without a cache.

        Args:
          embeddings: `[B, L, width]`, right-padded.
          lengths: int32 `[B]`, valid positions of each row.

        Returns:
          `[B, L, width]`; padding positions hold unspecified values.
        """
        positions = self._positions(embeddings, jnp.zeros_like(lengths))
        x, _ = self.blocks(embeddings, None, (lengths, self._rotation(positions)))
        return self.final_norm(x)

    def prefill(self, embeddings: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Cache]:
        """Return hidden states as `__call__` does, and a cache of length L that holds these positions."""
        positions = self._positions(embeddings, jnp.zeros_like(lengths))
        x, (keys, values) = self.blocks.prefill(embeddings, None, (lengths, self._rotation(positions)))
        return self.final_norm(x), Cache(keys, values, jnp.asarray(lengths))

    def extend(self, embeddings: jax.Array, lengths: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Return the hidden states of positions that follow those in the cache, and the extended cache.

        Args:
          embeddings: `[B, L, width]`, right-padded; row b takes positions `cache.lengths[b]` and following.
            L may differ from call to call; a decode step has L = 1.
          lengths: int32 `[B]`, valid positions of each row. They must fit into the cache, which the caller
            ensures; padding need not.
          cache: keys, values and lengths of the positions before.

        Returns:
          `[B, L, width]` (padding positions hold unspecified values) and the cache, in the same shapes.
        """
        positions = self._positions(embeddings, cache.lengths)
        context = (cache.lengths, self._rotation(positions))
        x, (keys, values) = self.blocks.extend(embeddings, (cache.keys, cache.values), context)
        keys = _write_cache(cache.keys, keys, positions)
        values = _write_cache(cache.values, values, positions)
        return self.final_norm(x), Cache(keys, values, cache.lengths + lengths)

    def _positions(self, embeddings: jax.Array, start: jax.Array) -> jax.Array:
        """Return the positions `[B, L]` of embeddings whose rows begin at `start [B]`."""
        return start[:, None] + jnp.arange(embeddings.shape[1])

    def _rotation(self, positions: jax.Array) -> Rotation:
        frequencies = rope_frequencies(
            self.head_dim,
            self.rope_theta,
            self.rope_scaling,
            self.rope_factor,
            self.rope_low_freq,
            self.rope_high_freq,
            self.rope_original_length,
        )
        return rope_rotation(positions, frequencies)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return logits `[..., vocab_size]`, float32, of hidden states `[B, width]` or `[B, L, width]`."""
        out = self.embedding.attend(hidden) if self.tied_embeddings else self.head(hidden)
        leading = ("batch", "sequence")[: out.ndim - 1]
        return shard(out.astype(jnp.float32), *leading, "vocab")

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Return a cache without valid positions: `batch` rows of `length` positions."""
        shape = (self.depth, batch, self.kv_heads, length, self.head_dim)
        zeros = jnp.zeros(shape, self.dtype)
        return Cache(zeros, zeros, jnp.zeros((batch,), jnp.int32))
