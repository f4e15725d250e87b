"""Vision transformer: frames to patch features (section 3.1 of the paper).

By config EVA-CLIP ViT-g, CLIP (`pre_norm`, no `patch_bias`, quick GELU) and SigLIP (no class token, tanh
GELU, `final_norm`).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dynfocus_jax.models.layers import FeedForward, MultiHeadAttention, layer_norm, scan_layers
from dynfocus_jax.parallel.sharding import shard


def _bicubic(source: int, target: int) -> np.ndarray:
    """Weights `[target, source]`, float32: one axis of PyTorch's bicubic interpolation.

    `F.interpolate(mode="bicubic", align_corners=False)`: cubic convolution with a = -0.75, pixel centres
    aligned, the border repeated, and no smoothing when the target is smaller.
    """
    a = -0.75
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    taps = np.floor(centre)[:, None] + np.arange(-1, 3)  # [target, 4]
    x = np.abs(centre[:, None] - taps)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    weights = np.zeros((target, source))
    rows = np.arange(target)[:, None]
    np.add.at(weights, (rows, np.clip(taps, 0, source - 1).astype(int)), np.where(x <= 1, near, far))
    return weights.astype(np.float32)


def resize_positions(table: np.ndarray, grid: int, cls_token: bool) -> np.ndarray:
    """Learned positions of a square patch grid for another resolution (EVA-CLIP's `interpolate_pos_embed`).

    Args:
      table: `[(1 +) g * g, C]` of any float dtype, the class token's row first when `cls_token`.
      grid: patches a side of the result.
      cls_token: whether the first row belongs to the class token; it is kept as it is.

    Returns:
      `[(1 +) grid * grid, C]` in the table's dtype, interpolated bicubically in float32; the table itself
      when it has that size.

    Raises:
      ValueError: the table is not of a square grid.
    """
    first, patches = table[: int(cls_token)], table[int(cls_token) :]
    source = math.isqrt(len(patches))
    if source == 0 or source * source != len(patches):
        raise ValueError(f"{len(patches)} positions of patches do not form a square grid")
    if source == grid:
        return table
    weights = _bicubic(source, grid)
    square = np.asarray(patches, np.float32).reshape(source, source, -1)
    resized = np.einsum("ru,cv,uvd->rcd", weights, weights, square, optimize=True).reshape(grid * grid, -1)
    return np.concatenate([first, resized.astype(table.dtype)])


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: x + attention(LN x), then x + MLP(LN x)."""

    width: int
    heads: int
    mlp_dim: int
    activation: str
    eps: float
    attention: str | None
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, _xs: None, _unused: None) -> tuple[jax.Array, None]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = shard(x, "frames", None, None)
        y = layer_norm("attention_norm", self.eps, **types)(x)
        x = x + MultiHeadAttention(self.width, self.heads, self.attention, name="attention", **types)(y)
        y = layer_norm("mlp_norm", self.eps, **types)(x)
        return x + FeedForward(self.mlp_dim, self.width, self.activation, name="mlp", **types)(y), None


class VisionTransformer(nn.Module):
    """ViT: uint8 frames `[..., H, W, 3]` -> features `[..., N, width]` (the CLS token first when it is kept).

    Frames are scaled to [0, 1] and normalised by `mean`/`std` here, so that they travel as bytes.
    `cls_token` adds the class token to the sequence; `keep_cls` returns it before the N patches.
    `pre_norm` applies a LayerNorm to the embeddings (CLIP), `final_norm` one to the output (SigLIP); EVA-CLIP
    as used by the paper has neither. `select_layer` counts from the end as in LLaVA: -1 is the output of the
    last block, -2 of the last but one, and the blocks behind the selected one are not built.
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
    attention: str | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.image_size // self.patch_size,) * 2

    @nn.compact
    def __call__(self, frames: jax.Array, keep_cls: bool = False) -> jax.Array:
        *lead, height, width, _ = frames.shape
        if (height, width) != (self.image_size,) * 2:
            raise ValueError(f"frames are {height}x{width}, the vision tower takes {self.image_size} squared")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = shard(frames.reshape(-1, height, width, 3), "frames", None, None, None)
        x = x.astype(jnp.float32) / 255
        x = (x - jnp.asarray(self.mean)) / jnp.asarray(self.std)

        # A stride-p convolution is a linear map of each patch: [F, N, p*p*3] -> [F, N, width].
        p, (rows, cols) = self.patch_size, self.grid
        x = x.reshape(-1, rows, p, cols, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * cols, p * p * 3)
        x = nn.Dense(self.width, use_bias=self.patch_bias, name="patch_embedding", **types)(x)

        if self.cls_token:
            cls = self.param("cls", nn.initializers.normal(0.02), (self.width,), self.param_dtype)
            cls = jnp.broadcast_to(cls.astype(x.dtype), (x.shape[0], 1, self.width))
            x = jnp.concatenate([cls, x], axis=1)
        position = self.param(
            "position", nn.initializers.normal(0.02), (x.shape[1], self.width), self.param_dtype
        )
        x = x + position.astype(x.dtype)
        if self.pre_norm:
            x = layer_norm("pre_norm", self.eps, **types)(x)

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
            x = layer_norm("final_norm", self.eps, **types)(x)
        if self.cls_token and not keep_cls:
            x = x[:, 1:]
        return x.reshape(*lead, *x.shape[1:])
