"""Q-Former: learned queries that attend to the question and to a frame (as in InstructBLIP)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynfocus_jax.models.layers import (
    AttentionKernel,
    Dtypes,
    FeedForward,
    MultiHeadAttention,
    layer_norm,
    rematerialized,
)
from dynfocus_jax.parallel.sharding import shard


class QFormerBlock(nn.Module):
    """Post-norm BERT block over [queries; text], with a feed-forward each for queries and text.

    If `cross`, the queries also attend to the frame.
    """

    width: int
    heads: int
    mlp_dim: int
    cross: bool
    eps: float
    implementation: AttentionKernel | None
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, frame: jax.Array, lengths: jax.Array, num_queries: int) -> jax.Array:
        """Transform `x [F, Q + Lq, width]`, its first Q = `num_queries` positions the queries.

        frame: `[F, N, C]`; lengths: int32 `[F]`, valid positions of `x`, queries included.
        """
        dtypes: Dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name, y):
            return layer_norm(name, self.eps, **dtypes)(y)

        def attend(name):
            return MultiHeadAttention(self.width, self.heads, self.implementation, name=name, **dtypes)

        def feed_forward(name, y):
            return norm(f"{name}_norm", y + FeedForward(self.mlp_dim, self.width, name=name, **dtypes)(y))

        x = shard(x, "frames", None, None)
        x = norm("attention_norm", x + attend("attention")(x, key_lengths=lengths))
        queries, text = x[:, :num_queries], x[:, num_queries:]
        if self.cross:
            queries = norm("cross_attention_norm", queries + attend("cross_attention")(queries, frame))
        queries, text = feed_forward("query_mlp", queries), feed_forward("text_mlp", text)
        return jnp.concatenate([queries, text], axis=1)


class QFormer(nn.Module):
    """Text-guided queries of every frame.

    Layers 0, `cross_every`, 2 * `cross_every`, ... have cross-attention to the frame. Text has learned
    position embeddings, queries have none. `output_width` is the vision width C: the last Linear is the
    paper's W_q.
    """

    vocab_size: int
    max_text: int
    num_queries: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    cross_every: int
    output_width: int
    eps: float = 1e-12
    vision_eps: float = 1e-5
    remat: str = "none"
    attention: AttentionKernel | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def setup(self):
        dtypes: Dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normal = nn.initializers.normal(0.02)
        self.queries = self.param("queries", normal, (self.num_queries, self.width), self.param_dtype)
        self.word_embedding = nn.Embed(self.vocab_size, self.width, embedding_init=normal, **dtypes)
        self.position_embedding = nn.Embed(self.max_text, self.width, embedding_init=normal, **dtypes)
        self.embedding_norm = layer_norm(None, self.eps, **dtypes)
        self.vision_norm = layer_norm(None, self.vision_eps, **dtypes)
        block = rematerialized(QFormerBlock, self.remat, static=(4,))  # num_queries
        self.blocks = [
            block(
                self.width,
                self.heads,
                self.mlp_dim,
                index % self.cross_every == 0,
                self.eps,
                self.attention,
                self.dtype,
                self.param_dtype,
            )
            for index in range(self.depth)
        ]
        self.query_projection = nn.Dense(self.output_width, **dtypes)

    def embed_words(self, tokens: jax.Array) -> jax.Array:
        """Return raw word embeddings `[..., width]`, the input of the question-conditioned score net."""
        return self.word_embedding(tokens)

    def __call__(self, tokens: jax.Array, lengths: jax.Array, frames: jax.Array) -> jax.Array:
        """Return the queries `[B, T, Q, output_width]` of every frame.

        Args:
          tokens: int32 `[B, Lq]`, the question, right-padded to at most `max_text` tokens.
          lengths: int32 `[B]`, valid tokens of each question.
          frames: `[B, T, N, C]`, features of the vision tower.
        """
        batch, time = frames.shape[:2]
        text = self.word_embedding(tokens) + self.position_embedding(jnp.arange(tokens.shape[1]))
        queries = jnp.broadcast_to(self.queries.astype(text.dtype), (batch, self.num_queries, self.width))
        # As in BERT, one norm serves the embeddings of queries and text. All frames share the question.
        joined = self.embedding_norm(jnp.concatenate([queries, text], axis=1))
        x = jnp.repeat(joined, time, axis=0)  # [B*T, Q + Lq, width]
        lengths = jnp.repeat(lengths + self.num_queries, time, axis=0)
        frames = self.vision_norm(frames.reshape(batch * time, *frames.shape[2:]))
        for block in self.blocks:
            x = block(x, frames, lengths, self.num_queries)
        queries = self.query_projection(x[:, : self.num_queries])
        return queries.reshape(batch, time, self.num_queries, self.output_width)
