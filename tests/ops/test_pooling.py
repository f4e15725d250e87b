"""Pooling against loops, in low precision, and with nothing to average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynfocus_jax.errors import UserError
from dynfocus_jax.ops.pooling import masked_mean, pool_grid


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
    """bfloat16 values no further from the exact ones than half a unit in their last place."""
    assert actual.dtype == jnp.bfloat16
    half = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 8)
    assert (np.abs(np.asarray(actual, np.float64) - exact) <= 1.001 * half).all()


def test_pool_grid_rounds_once():
    features = jnp.asarray(np.random.default_rng(2).normal(size=(256, 200)), jnp.bfloat16)
    pooled = pool_grid(features, (16, 16), (1, 1))
    assert_rounded_once(pooled[0], np.asarray(features, np.float64).mean(0))


def test_pool_grid_errors():
    with pytest.raises(UserError, match="15 patches; expected 16, the grid 4x4"):
        pool_grid(jnp.zeros((15, 2)), (4, 4), (2, 2))
    for output in [(3, 2), (2, 3), (0, 2), (8, 8)]:
        with pytest.raises(UserError, match="does not divide"):
            pool_grid(jnp.zeros((16, 2)), (4, 4), output)


@pytest.mark.parametrize("axis", [0, 1])
def test_masked_mean(axis):
    rng = np.random.default_rng(1)
    values, mask = rng.normal(size=(4, 5, 3)).astype(np.float32), rng.random((4, 5)) < 0.5
    mask[2], mask[:, 1] = False, False
    expected = (
        np.ma.masked_array(values, ~np.broadcast_to(mask[..., None], values.shape)).mean(axis).filled(0)
    )
    values[~mask] = np.nan
    np.testing.assert_allclose(
        jax.jit(masked_mean, static_argnums=2)(values, mask, axis), expected, rtol=1e-5
    )
    gradient = jax.grad(lambda x: masked_mean(x, mask, axis).sum())(values)
    share = mask / np.maximum(mask.sum(axis, keepdims=True), 1)
    np.testing.assert_allclose(gradient, np.broadcast_to(share[..., None], values.shape), rtol=1e-6)


def test_masked_mean_rounds_once():
    values = jnp.asarray(np.random.default_rng(3).normal(size=(7, 200)), jnp.bfloat16)
    mean = masked_mean(values, jnp.ones(7, bool), 0)
    assert_rounded_once(mean, np.asarray(values, np.float64).mean(0))
