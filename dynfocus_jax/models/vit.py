"""Vision transformer: frames to patch features (section 3.1 of the paper).

The configuration selects EVA-CLIP ViT-g, CLIP (`pre_norm`, no `patch_bias`, quick GELU) or SigLIP (no class
token, tanh GELU, `final_norm`).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dynfocus_jax.models.layers import (
    AttentionKernel,
    Dtypes,
    FeedForward,
    MultiHeadAttention,
    layer_norm,
    scan_layers,
)
from dynfocus_jax.parallel.sharding import shard


def resize_positions(table: np.ndarray, grid: int, cls_token: bool) -> np.ndarray:
    """Resize the position embeddings of a square patch grid (EVA-CLIP's `interpolate_pos_embed`).

    The interpolation is that of `F.interpolate(mode="bicubic", align_corners=False)` in PyTorch, in float32:
    cubic convolution with a = -0.75 and no smoothing when the target is smaller.

    Args:
      table: `[(1 +) g * g, C]` of any float dtype, the class token's row first if `cls_token`.
      grid: patches per side of the result.
      cls_token: whether the first row belongs to the class token; it is copied.

    Returns:
      `[(1 +) grid * grid, C]` in the table's dtype; the table itself if it has that size.

    Raises:
      ValueError: if the table does not belong to a square grid.
    """
    cls_rows, patches = table[: int(cls_token)], table[int(cls_token) :]
    source = math.isqrt(len(patches))
    if source == 0 or source * source != len(patches):
        raise ValueError(f"position embeddings: {len(patches)} patches do not form a square grid")
    if source == grid:
        return table
    square = np.asarray(patches, np.float32).reshape(source, source, -1)
    resized = jax.image.resize(
        square,
        (grid, grid, square.shape[-1]),
        jax.image.ResizeMethod.CUBIC_PYTORCH,
        antialias=False,
        precision=jax.lax.Precision.HIGHEST,
    )
    resized = np.asarray(resized).reshape(grid * grid, -1)
    return np.concatenate([cls_rows, resized.astype(table.dtype)])


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: x + attention(LN x), then x + MLP(LN x). One layer of a scan."""

    width: int
    heads: int
    mlp_dim: int
    activation: str
    eps: float
    implementation: AttentionKernel | None
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, _xs: None, _unused: None) -> tuple[jax.Array, None]:
        dtypes: Dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = shard(x, "frames", None, None)
        y = layer_norm("attention_norm", self.eps, **dtypes)(x)
        x = x + MultiHeadAttention(self.width, self.heads, self.implementation, name="attention", **dtypes)(y)
        y = layer_norm("mlp_norm", self.eps, **dtypes)(x)
        return x + FeedForward(self.mlp_dim, self.width, self.activation, name="mlp", **dtypes)(y), None


class VisionTransformer(nn.Module):
    """Vision transformer: uint8 frames `[..., H, W, 3]` -> features `[..., N, width]` of N patches.

    Frames are scaled to [0, 1] and normalised by `mean` and `std` here, so that hosts send bytes to devices.
    `cls_token` adds a class token to the sequence. `pre_norm` applies a LayerNorm to the embeddings (CLIP),
    `final_norm` one to the output (SigLIP); EVA-CLIP as the paper uses it has neither. `select_layer` counts
    from the end, as in LLaVA: -1 is the output of the last block, -2 that of the block before it. Blocks
    after the selected one are not built.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    cls_token: bool = True
    patch_bias: bool = True
    pre_norm: bool = False
    select_layer: int = -1
    final_norm: bool = False
    activation: str = "gelu"
    eps: float = 1e-6
    remat: str = "none"
    attention: AttentionKernel | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @nn.compact
    def __call__(self, frames: jax.Array, keep_cls: bool = False) -> jax.Array:
        """Return the features `[..., N, width]`, or `[..., 1 + N, width]` with the class token first.

        keep_cls: whether to return the class token, if there is one.

        Raises:
          ValueError: if the frames are not `image_size` high and wide.
        """
        *lead, height, width, _ = frames.shape
        size = self.image_size
        if (height, width) != (size, size):
            raise ValueError(f"vision tower: frames are {height}x{width} pixels, expected {size}x{size}")
        dtypes: Dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = shard(frames.reshape(-1, height, width, 3), "frames", None, None, None)
        x = x.astype(jnp.float32) / 255
        x = (x - jnp.asarray(self.mean)) / jnp.asarray(self.std)

        # A stride-p convolution is a linear map of each patch: [F, N, p*p*3] -> [F, N, width].
        p, (rows, cols) = self.patch_size, self.grid
        x = x.reshape(-1, rows, p, cols, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * cols, p * p * 3)
        x = nn.Dense(self.width, use_bias=self.patch_bias, name="patch_embedding", **dtypes)(x)

        if self.cls_token:
            cls = self.param("cls", nn.initializers.normal(0.02), (self.width,), self.param_dtype)
            cls = jnp.broadcast_to(cls.astype(x.dtype), (x.shape[0], 1, self.width))
            x = jnp.concatenate([cls, x], axis=1)
        position = self.param(
            "position", nn.initializers.normal(0.02), (x.shape[1], self.width), self.param_dtype
        )
        x = x + position.astype(x.dtype)
        if self.pre_norm:
            x = layer_norm("pre_norm", self.eps, **dtypes)(x)

        blocks = scan_layers(EncoderBlock, self.depth + 1 + self.select_layer, self.remat)
        x, _ = blocks(
            self.width,
            self.heads,
            self.mlp_dim,
            self.activation,
            self.eps,
            self.attention,
            self.dtype,
            self.param_dtype,
            name="blocks",
        )(x, None, None)
        if self.final_norm:
            x = layer_norm("final_norm", self.eps, **dtypes)(x)
        if self.cls_token and not keep_cls:
            x = x[:, 1:]
        return x.reshape(*lead, *x.shape[1:])
