"""Building blocks shared by the towers: attention, feed-forward, norms, stacked (scanned) layers."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from dynfocus_jax.errors import UserError

Dtype = str | jnp.dtype

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}

# Remat policies by name: what a layer keeps for its backward pass. "none" keeps everything (no remat).
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool = False,
    mask: jax.Array | None = None,
    key_lengths: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Scaled dot-product attention, softmax in float32.

    Args:
      query: `[B, L, H, h]`; key, value: `[B, S, G, h]` with H a multiple of G (grouped-query).
      causal: position i sees keys 0..i (only for L == S).
      mask: boolean `[B or 1, H or 1, L, S]`, True where a query may look.
      key_lengths: int32 `[B]`; keys from there on are padding.
      implementation: None (XLA) or "cudnn"; asking for cuDNN where there is none is an error.

    Returns:
      `[B, L, H, h]` in the query's dtype. A query without any key to look at gives zeros.
    """
    if key_lengths is not None:
        # A row without keys would be NaN in some implementations: let it see one, then zero it.
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            is_causal=causal,
            key_value_seq_lengths=jnp.maximum(key_lengths, 1).astype(jnp.int32),
            implementation=implementation,
        )
        return jnp.where((key_lengths > 0)[:, None, None, None], out, 0)
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, implementation=implementation
    )


def attention_after(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    filled: jax.Array,
) -> jax.Array:
    """`attention` of positions that come after others: over keys and values of a cache, then causal.

    The cache is only read; put together with the new keys it would be copied for every token.

    Args:
      query: `[B, L, H, h]`; key, value: `[B, L, G, h]`.
      cached: keys and values `[B, G, S, h]`, of which row b sees the first `filled[b]`; filled: int32 `[B]`.
    """
    batch, length, heads, head_dim = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, head_dim)

    def scores(keys, seen):  # [B, G, H / G, L, keys]
        out = jnp.einsum("blgrh,bgsh->bgrls", query, keys, preferred_element_type=jnp.float32)
        return jnp.where(seen, out * head_dim**-0.5, jnp.finfo(jnp.float32).min)

    def summed(weights, values):
        return jnp.einsum("bgrls,bgsh->blgrh", weights, values, preferred_element_type=jnp.float32)

    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        # Left to itself XLA turns all layers' cache around for every token on a GPU; among several devices it
        # does not, and would gather the cache for the constraint.
        cached = tuple(with_layout_constraint(x, Layout((0, 1, 2, 3))) for x in cached)
    size = cached[0].shape[2]
    before = jnp.arange(size) < filled[:, None, None, None, None]
    causal = jnp.tri(length, dtype=bool)
    weights = jnp.concatenate([scores(cached[0], before), scores(key, causal)], axis=-1)
    weights = jax.nn.softmax(weights, axis=-1).astype(value.dtype)
    out = summed(weights[..., :size], cached[1]) + summed(weights[..., size:], value)
    return out.reshape(batch, length, heads, head_dim).astype(value.dtype)


class MultiHeadAttention(nn.Module):
    """Bidirectional multi-head attention with biased projections (ViT, Q-Former).

    `inputs [B, L, width]` attends to `context [B, S, *]` (itself when None) -> `[B, L, width]`.
    """

    width: int
    heads: int
    implementation: str | None = None
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        context: jax.Array | None = None,
        *,
        key_lengths: jax.Array | None = None,
    ) -> jax.Array:
        context = inputs if context is None else context
        head_dim = self.width // self.heads

        def project(x, name):
            return nn.DenseGeneral(
                (self.heads, head_dim), name=name, dtype=self.dtype, param_dtype=self.param_dtype
            )(x)

        out = attention(
            project(inputs, "query"),
            project(context, "key"),
            project(context, "value"),
            key_lengths=key_lengths,
            implementation=self.implementation,
        )
        return nn.DenseGeneral(
            self.width, axis=(-2, -1), name="out", dtype=self.dtype, param_dtype=self.param_dtype
        )(out)


class FeedForward(nn.Module):
    """Linear(hidden) -> activation -> Linear(width), biased."""

    hidden: int
    width: int
    activation: str = "gelu"
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.hidden, name="up", dtype=self.dtype, param_dtype=self.param_dtype)(x)
        x = ACTIVATIONS[self.activation](x)
        return nn.Dense(self.width, name="down", dtype=self.dtype, param_dtype=self.param_dtype)(x)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32, result in `dtype`."""

    eps: float = 1e-5
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale.astype(jnp.float32)).astype(self.dtype)


class LoRA(nn.Module):
    """A linear map and a low-rank update of it (Hu et al. 2021): `W x + alpha / rank * B A x`.

    Its parameters stand beside those of the map: `lora_a [*in, rank]`, and `lora_b [rank, *out]`, which
    starts at zero, so that the update does. Kernel and bias are named and shaped as without it.
    """

    base: nn.DenseGeneral
    rank: int
    alpha: float

    def setup(self):
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.base(x)
        inputs = x.shape[x.ndim - np.size(self.base.axis) :]
        every = tuple(range(len(inputs)))
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=every)
        features = np.atleast_1d(self.base.features)
        zeros, dtype = nn.initializers.zeros, self.base.param_dtype
        down = self.param("lora_a", uniform, (*inputs, self.rank), dtype).astype(out.dtype)
        up = self.param("lora_b", zeros, (self.rank, *features), dtype).astype(out.dtype)
        low = jnp.tensordot(x.astype(out.dtype), down, len(inputs))
        return out + jnp.tensordot(low, up, 1) * (self.alpha / self.rank)


def layer_norm(name: str, eps: float, dtype: Dtype, param_dtype: Dtype) -> nn.LayerNorm:
    """LayerNorm computed in float32 (flax does so for lower input dtypes), result in `dtype`.

    The two-pass variance: the fast E[x^2] - E[x]^2 loses digits on activations with a large mean.
    """
    return nn.LayerNorm(epsilon=eps, name=name, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False)


def rematerialized(
    block: type[nn.Module], remat: str, static: tuple[int, ...] = (), prevent_cse: bool = True
) -> type[nn.Module]:
    """A block that keeps for its backward pass what the policy of that name says.

    static: numbers of its static arguments; prevent_cse: False within a scan, where nothing merges the two
    computations of it.
    """
    if remat not in REMAT_POLICIES:
        raise UserError(f"remat policy {remat!r} is unknown; choose one of {', '.join(REMAT_POLICIES)}.")
    if remat == "none":
        return block
    return nn.remat(block, prevent_cse=prevent_cse, policy=REMAT_POLICIES[remat], static_argnums=static)


def scan_layers(block: type[nn.Module], depth: int, remat: str = "none") -> type[nn.Module]:
    """A module class that applies `block` `depth` times, parameters stacked on axis 0.

    `block.__call__(carry, xs, *broadcast) -> (carry, ys)`: `xs` and `ys` are per-layer inputs and outputs
    stacked on axis 0 (None when there are none), the rest is the same for every layer. Remat by policy name.
    """
    return nn.scan(
        rematerialized(block, remat, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=depth,
    )
