"""Q-Former: learned queries read a frame with the question beside them (InstructBLIP's shape, by config)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynfocus_jax.models.layers import FeedForward, MultiHeadAttention, layer_norm, rematerialized
from dynfocus_jax.parallel.sharding import shard


class QFormerBlock(nn.Module):
    """Post-norm BERT block over [queries; text]; the queries may look at the frame; two feed-forwards."""

    width: int
    heads: int
    mlp_dim: int
    cross: bool
    eps: float
    attention: str | None
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, frame: jax.Array, lengths: jax.Array, num_queries: int) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name, y):
            return layer_norm(name, self.eps, **types)(y)

        def attend(name):
            return MultiHeadAttention(self.width, self.heads, self.attention, name=name, **types)

        def feed_forward(name, y):
            return norm(f"{name}_norm", y + FeedForward(self.mlp_dim, self.width, name=name, **types)(y))

        x = shard(x, "frames", None, None)
        x = norm("attention_norm", x + attend("attention")(x, key_lengths=lengths))
        queries, text = x[:, :num_queries], x[:, num_queries:]
        if self.cross:
            queries = norm("cross_attention_norm", queries + attend("cross_attention")(queries, frame))
        queries, text = feed_forward("query_mlp", queries), feed_forward("text_mlp", text)
        return jnp.concatenate([queries, text], axis=1)


class QFormer(nn.Module):
    """Text-guided queries for every frame.

    Cross-attention stands in layers 0, cross_every, 2*cross_every, ... Text is embedded with learned
    positions; queries carry none. `output_width` is the vision width C: the last Linear is the paper's W_q.
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
    attention: str | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def setup(self):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normal = nn.initializers.normal(0.02)
        self.queries = self.param("queries", normal, (self.num_queries, self.width), self.param_dtype)
        self.word_embedding = nn.Embed(self.vocab_size, self.width, embedding_init=normal, **types)
        self.position_embedding = nn.Embed(self.max_text, self.width, embedding_init=normal, **types)
        self.embedding_norm = layer_norm(None, self.eps, **types)
        self.vision_norm = layer_norm(None, self.vision_eps, **types)
        block = rematerialized(QFormerBlock, self.remat, static=(4,))  # the number of queries
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
        self.query_projection = nn.Dense(self.output_width, **types)

    def embed_words(self, tokens: jax.Array) -> jax.Array:
        """Raw word embeddings `[..., width]`: what the question-conditioned score net reads."""
        return self.word_embedding(tokens)

    def __call__(self, tokens: jax.Array, lengths: jax.Array, frames: jax.Array) -> jax.Array:
        """`tokens [B, Lq]`, `lengths [B]`, `frames [B, T, N, C]` -> `[B, T, Q, output_width]`."""
        batch, time = frames.shape[:2]
        text = self.word_embedding(tokens) + self.position_embedding(jnp.arange(tokens.shape[1]))
        queries = jnp.broadcast_to(self.queries.astype(text.dtype), (batch, self.num_queries, self.width))
        # BERT norms the embeddings of queries and text alike. Every frame reads the same question.
        joined = self.embedding_norm(jnp.concatenate([queries, text], axis=1))
        x = jnp.repeat(joined, time, axis=0)  # [B*T, Q + Lq, width]
        lengths = jnp.repeat(lengths + self.num_queries, time, axis=0)
        frames = self.vision_norm(frames.reshape(batch * time, *frames.shape[2:]))
        for block in self.blocks:
            x = block(x, frames, lengths, self.num_queries)
        queries = self.query_projection(x[:, : self.num_queries])
        return queries.reshape(batch, time, self.num_queries, self.output_width)
