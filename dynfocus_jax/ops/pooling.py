"""Average pooling of patch grids."""

import jax
import jax.numpy as jnp

from dynfocus_jax.errors import UserError


def pool_grid(features: jax.Array, grid: tuple[int, int], output: tuple[int, int]) -> jax.Array:
    """Average-pool a row-major grid of patches: [..., h*w, C] -> [..., oh*ow, C] in the same dtype.

    Args:
      features: [..., h*w, C]; sums are accumulated in float32.
      grid: (h, w), rows and columns of patches.
      output: (oh, ow), rows and columns of the result, which must divide (h, w).

    Raises:
      UserError: if the number of patches is not h*w, or the output does not divide the grid.
    """
    (height, width), (out_height, out_width) = grid, output
    *lead, num, channels = features.shape
    if num != height * width:
        raise UserError(
            f"pool_grid: {num} patches, expected {height * width} for a grid of {height}x{width}."
        )
    if min(output) < 1 or height % out_height or width % out_width:
        raise UserError(f"pool_grid: output {output} does not divide grid {grid}; use divisors of its sides.")
    cells = features.reshape(*lead, out_height, height // out_height, out_width, width // out_width, channels)
    pooled = cells.mean((-4, -2), dtype=jnp.float32)
    return pooled.reshape(*lead, out_height * out_width, channels).astype(features.dtype)
