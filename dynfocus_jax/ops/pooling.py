"""Averages: over cells of a patch grid, and over the valid entries of an axis."""

import jax
import jax.numpy as jnp

from dynfocus_jax.errors import UserError


def pool_grid(features: jax.Array, grid: tuple[int, int], output: tuple[int, int]) -> jax.Array:
    """Average-pool a row-major grid of patches exactly: [..., h*w, C] -> [..., oh*ow, C], same dtype.

    Args:
      features: [..., h*w, C]; sums are accumulated in float32.
      grid: (h, w) of the patches.
      output: (oh, ow), which must divide (h, w).

    Raises:
      UserError: when the grid does not have that many patches or the output does not divide it.
    """
    (height, width), (out_height, out_width) = grid, output
    *lead, num, channels = features.shape
    if num != height * width:
        raise UserError(f"pool_grid: {num} patches; expected {height * width}, the grid {height}x{width}.")
    if min(output) < 1 or height % out_height or width % out_width:
        raise UserError(
            f"pool_grid: output {output} does not divide grid {grid}; choose divisors of its sides."
        )
    cells = features.reshape(*lead, out_height, height // out_height, out_width, width // out_width, channels)
    pooled = cells.mean((-4, -2), dtype=jnp.float32)
    return pooled.reshape(*lead, out_height * out_width, channels).astype(features.dtype)


def masked_mean(x: jax.Array, mask: jax.Array, axis: int) -> jax.Array:
    """Mean of x over the entries of `axis` where the mask is True; zero where there is none.

    Args:
      x: any shape, any float dtype; sums are accumulated in float32. Masked entries may hold anything.
      mask: bool, of the shape of x's leading dimensions (trailing ones are broadcast).
      axis: dimension of x, one that the mask has.
    """
    mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    total = jnp.where(mask, x, jnp.zeros((), x.dtype)).sum(axis, dtype=jnp.float32)
    return (total / jnp.maximum(mask.sum(axis), 1)).astype(x.dtype)
