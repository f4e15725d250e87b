"""The digest of parameters: the same on any mesh, another for any other bit, place, name, shape or dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dynfocus_jax.parallel.digest import params_digest
from tests.tiny import mesh_of

SHAPE = (4, 6, 8)
GOLDEN = "62688f0f1ea2e819"  # of `params()`


def params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {"a/kernel": rng.standard_normal(SHAPE).astype(dtype), "a/bias": np.zeros(8, dtype)}


def of(arrays, spec=(), **axes):
    mesh = mesh_of(**axes)
    placed = {
        path: jax.device_put(
            jnp.asarray(array), NamedSharding(mesh, PartitionSpec(*(spec if array.ndim == 3 else ())))
        )
        for path, array in arrays.items()
    }
    return params_digest(placed, mesh)


def test_any_layout():
    """Golden: what is kept on disk must be recognised by later versions."""
    expected = of(params())
    assert of(params(), (None, "fsdp", "data"), fsdp=2, data=4) == expected
    assert of(params(), ("fsdp",), fsdp=4) == expected
    assert of(dict(reversed(params().items()))) == expected
    assert expected == GOLDEN


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.int32])
def test_any_change(dtype):
    before = {of(params(dtype))}
    rng = np.random.default_rng(1)
    for _ in range(40):  # a bit somewhere
        changed = params(dtype)
        bits = changed["a/kernel"].reshape(-1).view(f"u{changed['a/kernel'].itemsize}")
        bits[rng.integers(bits.size)] ^= 1 << int(rng.integers(8 * bits.itemsize))
        before.add(of(changed))
    assert len(before) == 41
    swapped = params(dtype)
    swapped["a/kernel"][[0, 1]] = swapped["a/kernel"][[1, 0]]
    renamed = {path.replace("a/", "b/"): array for path, array in params(dtype).items()}
    reshaped = {path: array.reshape(4, -1, 4) for path, array in params(dtype).items() if array.ndim == 3}
    reshaped["a/bias"] = params(dtype)["a/bias"]
    zeros = params(dtype)
    zeros["a/bias"] = np.zeros(9, dtype)
    for other in (swapped, renamed, reshaped, zeros):
        before.add(of(other))
    assert len(before) == 45


def test_sums_of_elements_that_trade_places():
    """Two equal changes in opposite directions do not cancel."""
    one, other = params(), params()
    other["a/kernel"][0, 0, 0], other["a/kernel"][0, 0, 1] = (
        one["a/kernel"][0, 0, 1],
        one["a/kernel"][0, 0, 0],
    )
    assert of(one) != of(other)
