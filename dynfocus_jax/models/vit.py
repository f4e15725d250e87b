"""Vision transformer: frames to patch features (EVA-CLIP ViT-g by config; spec of the paper, section 3.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynfocus_jax.models.layers import FeedForward, MultiHeadAttention, layer_norm, scan_layers


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
        y = layer_norm("attention_norm", self.eps, **types)(x)
        x = x + MultiHeadAttention(self.width, self.heads, self.attention, name="attention", **types)(y)
        y = layer_norm("mlp_norm", self.eps, **types)(x)
        return x + FeedForward(self.mlp_dim, self.width, self.activation, name="mlp", **types)(y), None


class VisionTransformer(nn.Module):
    """ViT: uint8 frames `[..., H, W, 3]` -> features `[..., N, width]` (the CLS token first when it is kept).

    Frames are scaled to [0, 1] and normalised by `mean`/`std` here, so that they travel as bytes.
    `cls_token` adds the class token to the sequence; `keep_cls` returns it before the N patches.
    `final_norm` applies a LayerNorm to the output (EVA-CLIP as used by the paper: no).
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
        x = frames.reshape(-1, height, width, 3).astype(jnp.float32) / 255
        x = (x - jnp.asarray(self.mean)) / jnp.asarray(self.std)

        # A stride-p convolution is a linear map of each patch: [F, N, p*p*3] -> [F, N, width].
        p, (rows, cols) = self.patch_size, self.grid
        x = x.reshape(-1, rows, p, cols, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * cols, p * p * 3)
        x = nn.Dense(self.width, name="patch_embedding", **types)(x)

        if self.cls_token:
            cls = self.param("cls", nn.initializers.normal(0.02), (self.width,), self.param_dtype)
            cls = jnp.broadcast_to(cls.astype(x.dtype), (x.shape[0], 1, self.width))
            x = jnp.concatenate([cls, x], axis=1)
        position = self.param(
            "position", nn.initializers.normal(0.02), (x.shape[1], self.width), self.param_dtype
        )
        x = x + position.astype(x.dtype)

        blocks = scan_layers(EncoderBlock, self.depth, self.remat)
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
