"""A digest of parameters that does not depend on their sharding."""

import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynfocus_jax.parallel.sharding import replicated


def params_digest(params: Mapping[str, jax.Array], mesh: Mesh) -> str:
    """Return 16 hexadecimal digits that depend on the paths, shapes, dtypes and all bits of {path: array}.

    They are the same on every mesh, because they are sums of integers: the bits of each element, mixed with
    its position.
    """
    sums = jax.jit(lambda arrays: jax.tree.map(_sums, arrays), out_shardings=replicated(mesh))(dict(params))
    about = [
        f"{path} {leaf.shape} {leaf.dtype} {np.asarray(sums[path]).tolist()}"
        for path, leaf in sorted(params.items())
    ]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]


def _sums(array: jax.Array) -> jax.Array:
    """Return two sums, modulo 2^32, over the mixed elements: uint32 [2]."""
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    position = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    mixed = _mix(bits.astype(jnp.uint32) ^ _mix(position))
    return jnp.stack([mixed.sum(dtype=jnp.uint32), _mix(mixed + np.uint32(1)).sum(dtype=jnp.uint32)])


def _mix(x: jax.Array) -> jax.Array:
    """Apply the finalizer of MurmurHash3, in which every bit of the result depends on every bit of x."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
