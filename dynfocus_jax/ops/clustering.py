"""One face for the clusterings that the paper compares (Table 11): DPC-KNN, k-means and weighted k-means."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dynfocus_jax.errors import UserError
from dynfocus_jax.ops.dpc_knn import Clusters, clean, density_peaks, dpc_knn
from dynfocus_jax.ops.kmeans import kmeans

METHODS = ("dpc_knn", "kmeans", "weighted_kmeans")
CPU_PIECE = 2**21  # numbers: about 20 MiB with what their clustering allocates


def cluster(
    features: jax.Array,
    num_clusters: int,
    k: int,
    *,
    method: str,
    weighting: str,
    mask: jax.Array | None = None,
    initial: jax.Array | None = None,
) -> Clusters:
    """Cluster points [..., N, D] into K slots by the named method.

    The k-means methods start from `initial` or from K evenly spread valid points, run at most 10 iterations,
    use the centroid as prototype and, as centre, the member nearest to it (ties by index); a slot is valid
    when it has members. "weighted_kmeans" weighs a point by its DPC-KNN importance (our choice: the paper
    does not say); for "kmeans" density, distance and importance are 1 on valid points. Only DPC-KNN uses
    `weighting`, only the k-means methods `initial`, all but "kmeans" `k`. No gradient flows through k-means.

    Args:
      features: [..., N, D], any float dtype.
      num_clusters: K.
      k: neighbours that define a density.
      method: "dpc_knn", "kmeans" or "weighted_kmeans".
      weighting: "importance" or "mean", see `dpc_knn`.
      mask: [..., N] bool, True for valid points; None means all.
      initial: [..., K] int indices of starting points.

    Raises:
      UserError: for an unknown method, and as `dpc_knn`.
    """
    if method not in METHODS:
        raise UserError(f"cluster: method is {method!r}; expected one of {', '.join(METHODS)}.")
    if method == "dpc_knn":
        return dpc_knn(features, num_clusters, k, mask=mask, weighting=weighting)

    features, mask = clean(features, mask)
    if initial is None:
        initial = spread(mask, num_clusters)
    ones = mask.astype(jnp.float32)
    density, distance, importance, weights = ones, ones, ones, None
    if method == "weighted_kmeans":
        peaks = density_peaks(features, k, mask)
        density, distance = jnp.exp(peaks.log_density), peaks.distance
        importance = jnp.exp(peaks.log_importance)
        weights = _relative(peaks.log_importance)
    found = kmeans(features, initial, weights=weights, mask=mask)

    member = found.assignment[..., None, :] == jnp.arange(num_clusters)[:, None]  # [..., K, N]
    valid = member.any(-1)
    centers = _nearest_member(jax.lax.stop_gradient(features), found.centroids, member)
    return Clusters(
        prototypes=jnp.where(valid[..., None], found.centroids, 0.0).astype(features.dtype),
        assignment=found.assignment,
        centers=jnp.where(valid, centers, 0),
        density=density,
        distance=distance,
        importance=importance,
        valid=valid,
    )


def spread(mask: jax.Array, num: int) -> jax.Array:
    """`num` distinct indices at even ranks among the valid points [..., N]: [..., num] int32, ascending.

    Where fewer points are valid, all of them, and then N (no point) in the remaining slots.
    """
    slot, points = jnp.arange(num), mask.shape[-1]
    count = mask.sum(-1, keepdims=True)
    rank = jnp.where(count >= num, (2 * slot + 1) * count // (2 * num), slot)
    order = jnp.argsort(~mask, axis=-1, stable=True)  # valid points first, in their order
    chosen = jnp.take_along_axis(order, jnp.minimum(rank, points - 1), -1)
    return jnp.where(rank < count, chosen, points).astype(jnp.int32)


def map_frames(function: Callable, frames: jax.Array):
    """`function` of every frame: frames [F, N, D] -> a tree of results with F in front.

    On a CPU a few frames at a time: what they need stays in its cache, and the same memory serves all of
    them, whereas asking the system for fresh memory takes a third of the time of the work. Elsewhere all at
    once.

    Args:
      function: of any number of frames [F, N, D], which it must treat one by one.
    """
    piece = max(1, CPU_PIECE // frames[0].size)
    if piece >= len(frames):
        return function(frames)

    def in_pieces(frames):
        whole = len(frames) // piece * piece
        found = jax.lax.map(function, frames[:whole].reshape(-1, piece, *frames.shape[1:]))
        found = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), found)
        if whole == len(frames):
            return found
        return jax.tree.map(lambda *x: jnp.concatenate(x), found, function(frames[whole:]))

    return jax.lax.platform_dependent(frames, cpu=in_pieces, default=function)


def _relative(log_importance: jax.Array) -> jax.Array:
    """Importance over its maximum: the same to k-means, and does not underflow; ones if all are zero."""
    highest = log_importance.max(-1, keepdims=True)
    return jnp.where(jnp.isfinite(highest), jnp.exp(log_importance - highest), 1.0)


def _nearest_member(features: jax.Array, centroids: jax.Array, member: jax.Array) -> jax.Array:
    """Index of each slot's member nearest to its centroid: [..., K] int32.

    Both of a pair are equally near to their mean: the first within rounding of the nearest is taken.
    """
    slot = jnp.argmax(member, -2)  # [..., N]
    own = jnp.take_along_axis(centroids, slot[..., None], -2)  # [..., N, D]
    square = jnp.square(features.astype(jnp.float32) - own).sum(-1)
    square = jnp.where(member, square[..., None, :], jnp.inf)
    nearest = square <= (1 + 1e-4) * square.min(-1, keepdims=True)
    return jnp.argmax(member & nearest, -1).astype(jnp.int32)
