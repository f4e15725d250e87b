"""Grid pooling, compared with loops and in low precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynfocus_jax.errors import UserError
from dynfocus_jax.ops.pooling import pool_grid


@pytest.mark.parametrize(
    ("grid", "output"), [((4, 6), (2, 3)), ((4, 6), (4, 1)), ((3, 5), (3, 5)), ((16, 16), (4, 4))]
)
def test_pool_grid(grid, output):
    features = np.random.default_rng(0).normal(size=(2, 3, grid[0] * grid[1], 5)).astype(np.float32)
    image = features.reshape(2, 3, *grid, 5)
    rows, columns = grid[0] // output[0], grid[1] // output[1]
    expected = [
        image[:, :, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].mean((2, 3))
        for i in range(output[0])
        for j in range(output[1])
    ]
    pooled = jax.jit(pool_grid, static_argnums=(1, 2))(features, grid, output)
    np.testing.assert_allclose(pooled, np.stack(expected, 2), rtol=1e-5, atol=1e-6)


def assert_rounded_once(actual, exact):
    """Check that bfloat16 values are within half a unit in the last place of the exact ones."""
    assert actual.dtype == jnp.bfloat16
    half = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 8)
    assert (np.abs(np.asarray(actual, np.float64) - exact) <= 1.001 * half).all()


def test_pool_grid_rounds_once():
    features = jnp.asarray(np.random.default_rng(2).normal(size=(256, 200)), jnp.bfloat16)
    pooled = pool_grid(features, (16, 16), (1, 1))
    assert_rounded_once(pooled[0], np.asarray(features, np.float64).mean(0))


def test_pool_grid_errors():
    with pytest.raises(UserError, match="15 patches, expected 16 for a grid of 4x4"):
        pool_grid(jnp.zeros((15, 2)), (4, 4), (2, 2))
    for output in [(3, 2), (2, 3), (0, 2), (8, 8)]:
        with pytest.raises(UserError, match="does not divide"):
            pool_grid(jnp.zeros((16, 2)), (4, 4), output)
