"""The digest of parameters: equal on every mesh, different for any other bit, order, name, shape or dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dynfocus_jax.parallel.digest import params_digest
from tests.tiny import mesh_of

SHAPE = (4, 6, 8)
GOLDEN = "62688f0f1ea2e819"  # digest of `params()`


def params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {"a/kernel": rng.standard_normal(SHAPE).astype(dtype), "a/bias": np.zeros(8, dtype)}


def digest_of(arrays, spec=(), **axes):
    """Return the digest of arrays on a mesh; `spec` is the sharding of those with three dimensions."""
    mesh = mesh_of(**axes)
    placed = {
        path: jax.device_put(
            jnp.asarray(array), NamedSharding(mesh, PartitionSpec(*(spec if array.ndim == 3 else ())))
        )
        for path, array in arrays.items()
    }
    return params_digest(placed, mesh)


def test_every_sharding_has_the_same_digest():
    """The golden value must not change, because digests are stored on disk."""
    expected = digest_of(params())
    assert digest_of(params(), (None, "fsdp", "data"), fsdp=2, data=4) == expected
    assert digest_of(params(), ("fsdp",), fsdp=4) == expected
    assert digest_of(dict(reversed(params().items()))) == expected
    assert expected == GOLDEN


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.int32])
def test_every_change_changes_the_digest(dtype):
    before = {digest_of(params(dtype))}
    rng = np.random.default_rng(1)
    for _ in range(40):  # flip a random bit
        changed = params(dtype)
        bits = changed["a/kernel"].reshape(-1).view(f"u{changed['a/kernel'].itemsize}")
        bits[rng.integers(bits.size)] ^= 1 << int(rng.integers(8 * bits.itemsize))
        before.add(digest_of(changed))
    assert len(before) == 41
    swapped = params(dtype)
    swapped["a/kernel"][[0, 1]] = swapped["a/kernel"][[1, 0]]
    renamed = {path.replace("a/", "b/"): array for path, array in params(dtype).items()}
    reshaped = {path: array.reshape(4, -1, 4) for path, array in params(dtype).items() if array.ndim == 3}
    reshaped["a/bias"] = params(dtype)["a/bias"]
    zeros = params(dtype)
    zeros["a/bias"] = np.zeros(9, dtype)
    for other in (swapped, renamed, reshaped, zeros):
        before.add(digest_of(other))
    assert len(before) == 45


def test_swapped_elements_change_the_digest():
    """Two equal changes in opposite directions do not cancel."""
    one, other = params(), params()
    other["a/kernel"][0, 0, 0], other["a/kernel"][0, 0, 1] = (
        one["a/kernel"][0, 0, 1],
        one["a/kernel"][0, 0, 0],
    )
    assert digest_of(one) != digest_of(other)
