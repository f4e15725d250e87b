"""Building blocks shared by the backbones: attention, projections, feed-forward, norms, scanned layers."""

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from ml_collections import FrozenConfigDict

from dynfocus_jax.errors import UserError

Dtype = str | jnp.dtype
AttentionKernel = Literal["xla", "cudnn"]


class Dtypes(TypedDict):
    """Keyword arguments of a module: dtype of its computation and of its parameters."""

    dtype: Dtype
    param_dtype: Dtype


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}

# Rematerialization policies: the intermediates that a layer keeps for its backward pass. "none" keeps all.
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
    implementation: AttentionKernel | None = None,
) -> jax.Array:
    """Compute scaled dot-product attention with the softmax in float32.

    Args:
      query: `[B, L, H, h]`; key, value: `[B, S, G, h]` with H a multiple of G (grouped-query attention).
      causal: whether position i attends to keys 0..i only (requires L == S).
      mask: bool `[B or 1, H or 1, L, S]`, True where a query attends to a key.
      key_lengths: int32 `[B]`, number of valid keys of each row; later keys are padding.
      implementation: None (XLA) or "cudnn", which raises an error where cuDNN is not available.

    Returns:
      `[B, L, H, h]` in the query's dtype; zeros in rows without any valid key.
    """
    if key_lengths is not None:
        # A row without keys is NaN in some implementations: give it one key, then set the output to zero.
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


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    cached_lengths: jax.Array,
) -> jax.Array:
    """Compute attention of new positions over cached keys and values, and causally over their own.

    The cache is only read: concatenating the new keys to it would copy it for every token.

    Args:
      query: `[B, L, H, h]`; key, value: `[B, L, G, h]` of the new positions.
      cached: keys and values `[B, G, S, h]`.
      cached_lengths: int32 `[B]`, number of valid cached positions of each row.

    Returns:
      `[B, L, H, h]` in the values' dtype.
    """
    batch, length, heads, head_dim = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, head_dim)

    def masked_scores(keys, visible):  # [B, G, H / G, L, keys]
        scores = jnp.einsum("blgrh,bgsh->bgrls", query, keys, preferred_element_type=jnp.float32)
        return jnp.where(visible, scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)

    def weighted_sum(weights, values):
        return jnp.einsum("bgrls,bgsh->blgrh", weights, values, preferred_element_type=jnp.float32)

    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    cached_keys, cached_values = cached
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        # Without the constraint, XLA transposes the cache of all layers for every token on a GPU. On several
        # devices it does not, and the constraint would make it gather the cache.
        cached_keys = with_layout_constraint(cached_keys, Layout((0, 1, 2, 3)))
        cached_values = with_layout_constraint(cached_values, Layout((0, 1, 2, 3)))
    size = cached_keys.shape[2]
    valid = jnp.arange(size) < cached_lengths[:, None, None, None, None]
    causal = jnp.tri(length, dtype=bool)
    scores = jnp.concatenate([masked_scores(cached_keys, valid), masked_scores(key, causal)], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = weighted_sum(weights[..., :size], cached_values) + weighted_sum(weights[..., size:], value)
    return out.reshape(batch, length, heads, head_dim).astype(value.dtype)


class MultiHeadAttention(nn.Module):
    """Bidirectional multi-head attention with biased projections (ViT, Q-Former).

    `inputs [B, L, width]` attend to `context [B, S, *]` (to themselves if None); returns `[B, L, width]`.
    Parameters are those of `nn.MultiHeadDotProductAttention`, which takes a `[B, 1, L, S]` mask instead of
    key lengths and cannot use cuDNN.
    """

    width: int
    heads: int
    implementation: AttentionKernel | None = None
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
    """Two-layer MLP with biases: Linear(hidden), activation, Linear(width)."""

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
    """Root-mean-square norm over the last axis, computed in float32, result in `dtype`.

    `nn.RMSNorm` multiplies the scale into 1 / rms first: a third of its results differ in the last place.
    """

    eps: float = 1e-5
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale.astype(jnp.float32)).astype(self.dtype)


class Projection(nn.Module):
    """Linear map, with a low-rank update if `lora` names it: `W x + alpha / rank * B A x`.

    Parameters: `kernel [*in, *out]`, `bias [*out]` if `use_bias`, and with an update `lora_a [*in, rank]` and
    `lora_b [rank, *out]`, which starts at zero.

    features: size of the output, or sizes of its axes; axis: input axes that are contracted.
    lora: the section `config.model.language.lora`, whose `targets` are names of modules; None for no update.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """

    features: int | tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    use_bias: bool = False
    lora: FrozenConfigDict | None = None
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    def setup(self):
        self.dense = nn.DenseGeneral(
            self.features,
            self.axis,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        nn.share_scope(self, self.dense)  # its parameters are this module's own

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.dense(x)
        if self.lora is None or self.lora.rank == 0 or self.name not in self.lora.targets:
            return out
        rank, out_sizes = self.lora.rank, np.atleast_1d(self.features)
        in_sizes = x.shape[x.ndim - np.size(self.axis) :]
        uniform = nn.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=tuple(range(len(in_sizes)))
        )
        zeros = nn.initializers.zeros
        lora_a = self.param("lora_a", uniform, (*in_sizes, rank), self.param_dtype).astype(out.dtype)
        lora_b = self.param("lora_b", zeros, (rank, *out_sizes), self.param_dtype).astype(out.dtype)
        update = jnp.tensordot(jnp.tensordot(x.astype(out.dtype), lora_a, len(in_sizes)), lora_b, 1)
        return out + update * (self.lora.alpha / rank)


def layer_norm(name: str | None, eps: float, dtype: Dtype, param_dtype: Dtype) -> nn.LayerNorm:
    """Return a LayerNorm computed in float32 (as flax does for lower input dtypes), result in `dtype`.

    It uses the two-pass variance: the fast E[x^2] - E[x]^2 loses digits when the mean is large.
    """
    return nn.LayerNorm(epsilon=eps, name=name, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False)


def rematerialized(
    block: type[nn.Module],
    remat: str,
    *,
    static: tuple[int, ...] = (),
    prevent_cse: bool = True,
    methods: Sequence[str] = ("__call__",),
) -> type[nn.Module]:
    """Return the module class with a rematerialization policy applied to its methods.

    Args:
      remat: name of the policy, see `REMAT_POLICIES`.
      static: argument numbers that are static, counted from self = 0.
      prevent_cse: whether to keep XLA from merging the recomputation with the first computation; needed
        outside a scan only.

    Raises:
      UserError: if there is no such policy.
    """
    if remat not in REMAT_POLICIES:
        raise UserError(f"the remat policy is {remat!r}, expected one of {', '.join(REMAT_POLICIES)}.")
    if remat == "none":
        return block
    policy = REMAT_POLICIES[remat]
    return nn.remat(block, prevent_cse=prevent_cse, policy=policy, static_argnums=static, methods=methods)


def scan_layers(
    block: type[nn.Module], depth: int, remat: str = "none", methods: Sequence[str] = ("__call__",)
) -> type[nn.Module]:
    """Return a module class that applies `block` `depth` times, with parameters stacked on axis 0.

    Args:
      block: its methods have the form `(carry, xs, broadcast) -> (carry, ys)`: `xs` and `ys` are inputs and
        outputs of a layer, stacked on axis 0 (None if there are none); `broadcast` is the same for all.
      remat: name of the rematerialization policy, see `REMAT_POLICIES`.
      methods: names of the methods that are applied so.
    """
    return nn.scan(
        rematerialized(block, remat, prevent_cse=False, methods=methods),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
        length=depth,
        methods=methods,
    )
