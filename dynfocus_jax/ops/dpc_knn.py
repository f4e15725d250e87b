"""Density-peaks clustering with k nearest neighbours (DPC-KNN): prototypes of frames and of patches.

Source: paper Sec. 3.1 (event prototypes) and 3.2 (spatial prototypes); Du et al. 2016, "Study on density
peaks clustering based on k-nearest neighbors". Nothing is trained here; no gradient flows through a decision.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynfocus_jax.errors import UserError


class Clusters(NamedTuple):
    """The result of a clustering of N points into K slots, in descending order of the centres' importance.

    Slots beyond the number of valid points have `valid` False, a zero prototype, centre index 0, no member.
    """

    prototypes: jax.Array  # [..., K, D], dtype of the features
    assignment: jax.Array  # [..., N] int32 slot of each point, -1 for masked points
    centers: jax.Array  # [..., K] int32 index of each slot's centre point
    density: jax.Array  # [..., N] float32, rho; 0 for masked points
    distance: jax.Array  # [..., N] float32, delta: distance to the nearest denser point; 0 for masked points
    importance: jax.Array  # [..., N] float32, rho * delta
    valid: jax.Array  # [..., K] bool


class Peaks(NamedTuple):
    """Density and distance of every point, before any centre is chosen (all float32)."""

    square_distance: jax.Array  # [..., N, N] ||x_i - x_j||^2, bitwise symmetric; +inf where a point is masked
    log_density: jax.Array  # [..., N], log rho; -inf for masked points
    distance: jax.Array  # [..., N], delta; 0 for masked points
    log_importance: jax.Array  # [..., N], log(rho * delta); -inf where delta is 0 and for masked points


def dpc_knn(
    features: jax.Array,
    num_clusters: int,
    k: int,
    *,
    mask: jax.Array | None = None,
    weighting: str = "importance",
) -> Clusters:
    """Cluster points around the K that are both dense and far from any denser point.

    With d_ij = ||x_i - x_j|| / sqrt(D): density rho_i = exp(-mean of d_ij^2 over the k nearest, i included);
    delta_i = least d_ij to a denser point (for the densest: the greatest distance of all); importance
    w_i = rho_i * delta_i. Centres are the K points of highest importance, every point joins its nearest
    centre, and a prototype is a weighted mean of its members: by w_i / sum w ("importance", the paper) or
    sum / (count + 1e-6) ("mean", the released code).

    Everything that decides is computed in float32 and breaks ties by index; bitwise-equal points tie exactly,
    and masked points, whatever they hold, change no choice. Given the choices, prototypes are linear in the
    features: that is the only path of the gradient.

    Args:
      features: [..., N, D], any float dtype.
      num_clusters: K, may exceed N.
      k: neighbours that define a density; where fewer points are valid, all of them.
      mask: [..., N] bool, True for valid points; None means all.
      weighting: "importance" or "mean".

    Raises:
      UserError: for an unknown weighting, K or k below 1, or a mask whose shape is not [..., N].
    """
    if weighting not in ("importance", "mean"):
        raise UserError(f'dpc_knn: weighting is {weighting!r}; expected "importance" or "mean".')
    if num_clusters < 1:
        raise UserError(f"dpc_knn: num_clusters is {num_clusters}; expected at least 1.")
    features, mask = clean(features, mask)
    peaks = density_peaks(features, k, mask)
    centers, valid = _centers(peaks.log_importance, mask, num_clusters)
    assignment = _assign(peaks.square_distance, centers, valid, mask)

    member = assignment[..., None, :] == jnp.arange(num_clusters)[:, None]  # [..., K, N]
    if weighting == "importance":
        weights = normalize(jnp.where(member, peaks.log_importance[..., None, :], -jnp.inf), member)
    else:
        weights = member / (member.sum(-1, keepdims=True) + 1e-6)
    return Clusters(
        prototypes=mix(weights, features),
        assignment=assignment,
        centers=centers,
        density=jnp.exp(peaks.log_density),
        distance=peaks.distance,
        importance=jnp.exp(peaks.log_importance),
        valid=valid,
    )


def density_peaks(features: jax.Array, k: int, mask: jax.Array) -> Peaks:
    """Density and distance indicator of every point.

    In the log domain, for raw ViT features have d^2 in the hundreds and exp(-d^2) would underflow.

    Args:
      features: [..., N, D], zero where masked (see `clean`).
      k: neighbours that define a density.
      mask: [..., N] bool.
    """
    if k < 1:
        raise UserError(f"dpc_knn: k, the number of neighbours, is {k}; expected at least 1.")
    points = jax.lax.stop_gradient(features).astype(jnp.float32)
    num, width = points.shape[-2:]
    square = square_distances(points, mask)

    nearest = -jax.lax.top_k(-square, min(k, num))[0]  # [..., N, k]
    found = jnp.isfinite(nearest)
    spread = jnp.where(found, nearest, 0.0).sum(-1) / jnp.maximum(found.sum(-1), 1)
    log_density = jnp.where(mask, -spread / width, -jnp.inf)

    # "j is denser than i" orders by density, then by index: exactly one point has none denser.
    index = jnp.arange(num)
    mine, theirs = log_density[..., :, None], log_density[..., None, :]
    denser = (theirs > mine) | ((theirs == mine) & (index[None, :] < index[:, None]))
    nearest_denser = jnp.where(denser, square, jnp.inf).min(-1)
    widest = jnp.where(jnp.isfinite(square), square, 0.0).max((-2, -1))[..., None]
    delta = jnp.sqrt(jnp.where(jnp.isfinite(nearest_denser), nearest_denser, widest) / width)
    delta = jnp.where(mask, delta, 0.0)
    return Peaks(square, log_density, delta, log_density + jnp.log(delta))


def square_distances(points: jax.Array, mask: jax.Array) -> jax.Array:
    """||x_i - x_j||^2 of float32 points [..., N, D] through their Gram matrix: [..., N, N].

    +inf where i or j is masked. Bitwise symmetric, and bitwise-equal points have bitwise-equal rows and a
    distance of exactly 0: the product's rounding depends on where a row lies in it, so every entry is read
    from the first of equal points.
    """
    first = jnp.argmax(mask, -1)[..., None, None]
    # From the first valid point, against cancellation; not from the mean, which would round integers.
    offsets = points - jnp.take_along_axis(points, first, -2)
    product = gram(offsets)
    norm = jnp.diagonal(product, axis1=-2, axis2=-1)
    product = product + jnp.swapaxes(product, -1, -2)
    square = jnp.maximum(norm[..., :, None] + norm[..., None, :] - product, 0.0)
    square = jnp.where(jnp.eye(points.shape[-2], dtype=bool), 0.0, square)
    twin = first_twin(points, mask)
    square = jnp.take_along_axis(square, twin[..., :, None], -2)
    square = jnp.take_along_axis(square, twin[..., None, :], -1)
    return jnp.where(mask[..., :, None] & mask[..., None, :], square, jnp.inf)


def gram(points: jax.Array) -> jax.Array:
    """Inner products of all pairs of points [..., N, D]: [..., N, N].

    The product of the second half with the first is the transpose of that of the first with the second: it is
    computed once, a quarter of the work less.
    """

    def products(one, other):
        return jnp.einsum("...id,...jd->...ij", one, other, precision=jax.lax.Precision.HIGHEST)

    first, second = jnp.array_split(points, 2, axis=-2)
    across = products(first, second)
    upper = jnp.concatenate([products(first, first), across], axis=-1)
    lower = jnp.concatenate([jnp.swapaxes(across, -1, -2), products(second, second)], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def first_twin(points: jax.Array, mask: jax.Array) -> jax.Array:
    """Index of the first valid point that equals each in float32, bit for bit (-0 equals 0): [..., N] int32.

    A masked point is its own twin. Equality is that of two 32-bit multilinear hashes of the float bits;
    integer sums wrap around and so do not depend on the order of summation.
    """
    num, width = points.shape[-2:]
    points = jnp.where(points == 0, 0.0, points).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(points, jnp.uint32)
    bits = bits ^ (bits >> 16)  # bfloat16 values and small integers leave the low half empty
    factors = np.random.RandomState(0).randint(0, 2**31, (2, width), np.uint32) * 2 + 1
    # Both sums in one pass over the features: on a CPU many times faster than two of `jnp.sum`.
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


def clean(features: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Features [..., N, D] with masked points, whatever they hold, set to zero; the mask (None: all True)."""
    if features.ndim < 2 or features.shape[-2] < 1:
        raise UserError(f"clustering: features have shape {features.shape}; expected [..., N, D], N > 0.")
    if mask is None:
        # The barrier keeps XLA from folding reductions of a constant, which takes it seconds.
        return features, jax.lax.optimization_barrier(jnp.ones(features.shape[:-1], bool))
    if mask.shape != features.shape[:-1]:
        raise UserError(f"clustering: mask has shape {mask.shape}; expected {features.shape[:-1]}.")
    return jnp.where(mask[..., None], features, jnp.zeros((), features.dtype)), mask


def normalize(log_weights: jax.Array, member: jax.Array) -> jax.Array:
    """Weights [..., K, N] summing to one over each slot's members.

    Where all their logs are -inf the first member takes it all: they are duplicates of one point, and its
    prototype must equal that of its other duplicates bit for bit.
    """
    highest = log_weights.max(-1, keepdims=True)
    leader = jnp.arange(member.shape[-1]) == jnp.argmax(member, -1)[..., None]
    relative = jnp.where(jnp.isfinite(highest), jnp.exp(log_weights - highest), leader)
    weights = jnp.where(member, relative, 0.0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def mix(weights: jax.Array, features: jax.Array) -> jax.Array:
    """weights [..., K, N] @ features [..., N, D] in float32: [..., K, D] in the features' dtype."""
    mixed = jnp.einsum(
        "...kn,...nd->...kd",
        weights,
        features.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return mixed.astype(features.dtype)


def _centers(log_importance: jax.Array, mask: jax.Array, num_clusters: int) -> tuple[jax.Array, jax.Array]:
    """The K valid points of highest importance, ties by index: centers [..., K] int32, valid [..., K]."""
    num = mask.shape[-1]
    # A valid point of importance 0 (a duplicate) still goes before any masked point.
    key = jnp.where(mask, jnp.maximum(log_importance, jnp.finfo(jnp.float32).min), -jnp.inf)
    best, centers = jax.lax.top_k(key, min(num_clusters, num))
    absent = [(0, 0)] * (key.ndim - 1) + [(0, max(num_clusters - num, 0))]
    valid = jnp.pad(best > -jnp.inf, absent)
    return jnp.where(valid, jnp.pad(centers, absent), 0), valid


def _assign(square: jax.Array, centers: jax.Array, valid: jax.Array, mask: jax.Array) -> jax.Array:
    """Slot of the nearest valid centre (ties: the lower; a centre: its own): [..., N] int32, -1 if masked."""
    to_center = jnp.take_along_axis(square, centers[..., None], -2)  # [..., K, N]
    own = centers[..., None] == jnp.arange(mask.shape[-1])
    to_center = jnp.where(valid[..., None], jnp.where(own, -1.0, to_center), jnp.inf)
    return jnp.where(mask, jnp.argmin(to_center, -2).astype(jnp.int32), -1)
