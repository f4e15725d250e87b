"""Density-peaks clustering with k nearest neighbours (DPC-KNN): prototypes of frames and of patches.

Source: paper Sec. 3.1 (event prototypes) and 3.2 (spatial prototypes); Du et al. 2016, "Study on density
peaks clustering based on k-nearest neighbors". There are no parameters, and no gradient flows through the
choice of centres or the assignment.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from dynfocus_jax.errors import UserError


class Clusters(NamedTuple):
    """Result of clustering N points into K slots, in descending order of the centres' importance.

    Slots beyond the number of valid points are unused: `valid` is False, the prototype zero, the centre index
    0, and no point is assigned to them.
    """

    prototypes: Float[Array, "*batch K D"]  # in the dtype of the features
    assignment: Int32[Array, "*batch N"]  # slot of each point, -1 for masked points
    centers: Int32[Array, "*batch K"]  # index of each slot's centre point
    density: Float32[Array, "*batch N"]  # rho; 0 for masked points
    distance: Float32[Array, "*batch N"]  # delta: distance to the nearest denser point; 0 for masked points
    importance: Float32[Array, "*batch N"]  # rho * delta
    valid: Bool[Array, "*batch K"]  # whether the slot is used


class Peaks(NamedTuple):
    """Density and distance of every point, from which DPC-KNN chooses the centres."""

    square_distance: Float32[Array, "*batch N N"]  # ||x_i - x_j||^2, bitwise symmetric; +inf where masked
    log_density: Float32[Array, "*batch N"]  # log rho; -inf for masked points
    distance: Float32[Array, "*batch N"]  # delta; 0 for masked points
    log_importance: Float32[Array, "*batch N"]  # log(rho * delta); -inf where delta is 0 and where masked


def dpc_knn(
    features: jax.Array,
    num_clusters: int,
    k: int,
    *,
    mask: jax.Array | None = None,
    weighting: str = "importance",
) -> Clusters:
    """Cluster points around the K points that are both dense and far from any denser point.

    With d_ij = ||x_i - x_j|| / sqrt(D): density rho_i = exp(-mean of d_ij^2 over the k nearest, i included);
    delta_i = least d_ij to a denser point (for the densest point: the largest distance of any pair);
    importance w_i = rho_i * delta_i. Centres are the K points of highest importance, and every point is
    assigned to its nearest centre.

    Choices are made in float32 and break ties by index. Bitwise-equal points tie exactly, and the contents of
    masked points change no choice. Given the choices, prototypes are linear in the features: the gradient
    flows through this sum alone.

    Args:
      features: [..., N, D], any float dtype.
      num_clusters: K; may exceed N, in which case the extra slots are marked invalid.
      k: neighbours that define a density; where fewer points are valid, all of them.
      mask: bool [..., N], True for valid points. None means all points are valid.
      weighting: prototypes are weighted means of the points assigned to them, with weights w_i / sum w
        ("importance", the paper) or 1 / (count + 1e-6) ("mean", the released code).

    Returns:
      Clusters, sorted by descending importance.

    Raises:
      UserError: if the weighting is unknown, K or k is smaller than 1, or the mask has another shape.
    """
    if weighting not in ("importance", "mean"):
        raise UserError(f'dpc_knn: weighting is {weighting!r}, expected "importance" or "mean".')
    if num_clusters < 1:
        raise UserError(f"dpc_knn: num_clusters is {num_clusters}, expected at least 1.")
    features, mask = zero_masked(features, mask)
    peaks = density_peaks(features, k, mask)
    centers, valid = _centers(peaks.log_importance, mask, num_clusters)
    assignment = _assign(peaks.square_distance, centers, valid, mask)

    member = assignment[..., None, :] == jnp.arange(num_clusters)[:, None]  # [..., K, N]
    if weighting == "importance":
        weights = normalize_weights(jnp.where(member, peaks.log_importance[..., None, :], -jnp.inf), member)
    else:
        weights = member / (member.sum(-1, keepdims=True) + 1e-6)
    return Clusters(
        prototypes=weighted_sum(weights, features),
        assignment=assignment,
        centers=centers,
        density=jnp.exp(peaks.log_density),
        distance=peaks.distance,
        importance=jnp.exp(peaks.log_importance),
        valid=valid,
    )


def density_peaks(features: jax.Array, k: int, mask: jax.Array) -> Peaks:
    """Compute density rho and distance delta of every point, see `dpc_knn`.

    Densities are kept as logarithms: d^2 of raw ViT features is in the hundreds, and exp(-d^2) underflows.

    Args:
      features: [..., N, D], zero where masked (see `zero_masked`).
      k: neighbours that define a density.
      mask: bool [..., N].

    Raises:
      UserError: if k is smaller than 1.
    """
    if k < 1:
        raise UserError(f"dpc_knn: k, the number of neighbours, is {k}, expected at least 1.")
    points = jax.lax.stop_gradient(features).astype(jnp.float32)
    num, width = points.shape[-2:]
    square = square_distances(points, mask)

    nearest = -jax.lax.top_k(-square, min(k, num))[0]  # [..., N, k]
    found = jnp.isfinite(nearest)
    mean_square = jnp.where(found, nearest, 0.0).sum(-1) / jnp.maximum(found.sum(-1), 1)
    log_density = jnp.where(mask, -mean_square / width, -jnp.inf)

    # denser[i, j]: j is denser than i, ties by index, so that exactly one point has no denser one.
    index = jnp.arange(num)
    density_i, density_j = log_density[..., :, None], log_density[..., None, :]
    denser = (density_j > density_i) | ((density_j == density_i) & (index[None, :] < index[:, None]))
    nearest_denser = jnp.where(denser, square, jnp.inf).min(-1)
    largest = jnp.where(jnp.isfinite(square), square, 0.0).max((-2, -1))[..., None]
    delta = jnp.sqrt(jnp.where(jnp.isfinite(nearest_denser), nearest_denser, largest) / width)
    delta = jnp.where(mask, delta, 0.0)
    return Peaks(square, log_density, delta, log_density + jnp.log(delta))


def square_distances(points: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute ||x_i - x_j||^2 of float32 points [..., N, D] from their Gram matrix: [..., N, N].

    Entries are +inf where i or j is masked. The result is bitwise symmetric, and bitwise-equal points have
    bitwise-equal rows and a distance of exactly 0. The rounding of a matrix product depends on the position
    of a row in it, so the entries of equal points are all taken from the first of them.
    """
    first = jnp.argmax(mask, -1)[..., None, None]
    # Relative to the first valid point, against cancellation. The mean would make integer features inexact.
    offsets = points - jnp.take_along_axis(points, first, -2)
    product = gram(offsets)
    norm = jnp.diagonal(product, axis1=-2, axis2=-1)
    product = product + jnp.swapaxes(product, -1, -2)
    square = jnp.maximum(norm[..., :, None] + norm[..., None, :] - product, 0.0)
    square = jnp.where(jnp.eye(points.shape[-2], dtype=bool), 0.0, square)
    duplicate = first_duplicate(points, mask)
    square = jnp.take_along_axis(square, duplicate[..., :, None], -2)
    square = jnp.take_along_axis(square, duplicate[..., None, :], -1)
    return jnp.where(mask[..., :, None] & mask[..., None, :], square, jnp.inf)


def gram(points: jax.Array) -> jax.Array:
    """Compute the inner products of all pairs of points [..., N, D]: [..., N, N].

    The block of the second half with the first is the transpose of that of the first with the second. It is
    computed once, which saves a quarter of the work.
    """

    def products(one, other):
        return jnp.einsum("...id,...jd->...ij", one, other, precision=jax.lax.Precision.HIGHEST)

    first, second = jnp.array_split(points, 2, axis=-2)
    across = products(first, second)
    upper = jnp.concatenate([products(first, first), across], axis=-1)
    lower = jnp.concatenate([jnp.swapaxes(across, -1, -2), products(second, second)], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def first_duplicate(points: jax.Array, mask: jax.Array) -> jax.Array:
    """Return for each point the index of the first valid point equal to it: int32 [..., N].

    Points [..., N, D] are compared bit for bit in float32 (-0 equals 0); a masked point gets its own index.
    They count as equal if two 32-bit multilinear hashes of their bits are equal. The hashes are integer sums
    that wrap around, so they do not depend on the order of summation.
    """
    num, width = points.shape[-2:]
    points = jnp.where(points == 0, 0.0, points).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(points, jnp.uint32)
    bits = bits ^ (bits >> 16)  # bfloat16 values and small integers leave the low half empty
    factors = np.random.RandomState(0).randint(0, 2**31, (2, width), np.uint32) * 2 + 1
    # Both sums in one pass over the features: many times faster on a CPU than two calls of `jnp.sum`.
    one, two = jax.lax.reduce(  # each [..., N]
        (bits * factors[0], bits * factors[1]),
        (jnp.uint32(0), jnp.uint32(0)),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        (points.ndim - 1,),
    )
    index = jnp.arange(num, dtype=jnp.int32)
    same = (one[..., :, None] == one[..., None, :]) & (two[..., :, None] == two[..., None, :])
    same &= mask[..., None, :]
    return jnp.where(mask, jnp.where(same, index, num).min(-1), index)


def zero_masked(features: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return features [..., N, D] with masked points set to zero, and the mask (all True if None).

    Raises:
      UserError: if there are no points, or the mask is not of shape [..., N].
    """
    if features.ndim < 2 or features.shape[-2] < 1:
        raise UserError(f"clustering: features have shape {features.shape}, expected [..., N, D] with N > 0.")
    if mask is None:
        # The barrier keeps XLA from folding reductions of a constant, which takes it seconds.
        return features, jax.lax.optimization_barrier(jnp.ones(features.shape[:-1], bool))
    if mask.shape != features.shape[:-1]:
        raise UserError(f"clustering: mask has shape {mask.shape}, expected {features.shape[:-1]}.")
    return jnp.where(mask[..., None], features, jnp.zeros((), features.dtype)), mask


def normalize_weights(log_weights: jax.Array, member: jax.Array) -> jax.Array:
    """Return weights [..., K, N] that sum to one over each slot's members.

    If all logarithms of a slot are -inf, its first member has weight 1: its members are then duplicates of
    one point, and prototypes of duplicates must be equal bit for bit.
    """
    highest = log_weights.max(-1, keepdims=True)
    leader = jnp.arange(member.shape[-1]) == jnp.argmax(member, -1)[..., None]
    relative = jnp.where(jnp.isfinite(highest), jnp.exp(log_weights - highest), leader)
    weights = jnp.where(member, relative, 0.0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def weighted_sum(weights: jax.Array, features: jax.Array) -> jax.Array:
    """Compute weights [..., K, N] @ features [..., N, D] in float32: [..., K, D] in the features' dtype."""
    total = jnp.einsum(
        "...kn,...nd->...kd",
        weights,
        features.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return total.astype(features.dtype)


def _centers(log_importance: jax.Array, mask: jax.Array, num_clusters: int) -> tuple[jax.Array, jax.Array]:
    """Choose the K valid points of highest importance, ties by index.

    Returns:
      centers int32 [..., K], valid bool [..., K].
    """
    num = mask.shape[-1]
    # A valid point of importance 0 (a duplicate) still ranks above all masked points.
    key = jnp.where(mask, jnp.maximum(log_importance, jnp.finfo(jnp.float32).min), -jnp.inf)
    best, centers = jax.lax.top_k(key, min(num_clusters, num))
    unused = [(0, 0)] * (key.ndim - 1) + [(0, max(num_clusters - num, 0))]
    valid = jnp.pad(best > -jnp.inf, unused)
    return jnp.where(valid, jnp.pad(centers, unused), 0), valid


def _assign(square: jax.Array, centers: jax.Array, valid: jax.Array, mask: jax.Array) -> jax.Array:
    """Assign points to the nearest valid centre, ties to the lower slot, and centres to their own slots.

    Returns:
      slots int32 [..., N], -1 for masked points.
    """
    to_center = jnp.take_along_axis(square, centers[..., None], -2)  # [..., K, N]
    own = centers[..., None] == jnp.arange(mask.shape[-1])
    to_center = jnp.where(valid[..., None], jnp.where(own, -1.0, to_center), jnp.inf)
    return jnp.where(mask, jnp.argmin(to_center, -2).astype(jnp.int32), -1)
