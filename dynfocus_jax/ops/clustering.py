"""One interface to the clusterings that the paper compares (Table 11): DPC-KNN, k-means, weighted k-means."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dynfocus_jax.errors import UserError
from dynfocus_jax.ops.dpc_knn import Clusters, density_peaks, dpc_knn, zero_masked
from dynfocus_jax.ops.kmeans import kmeans

CLUSTERING_METHODS = ("dpc_knn", "kmeans", "weighted_kmeans")
CPU_CHUNK_SIZE = 2**21  # array elements; with the intermediates of clustering about 20 MiB


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

    The k-means methods run at most 10 iterations. Their prototypes are the centroids, a centre is the point
    of the slot nearest to its centroid (ties by index), and a slot is valid if it has points.
    "weighted_kmeans" weights points by their DPC-KNN importance (our choice: the paper does not specify the
    weights). For "kmeans", density, distance and importance are 1 on valid points. Prototypes of the k-means
    methods have no gradient.

    Args:
      features: [..., N, D], any float dtype.
      num_clusters: K.
      k: neighbours that define a density; unused by "kmeans".
      method: "dpc_knn", "kmeans" or "weighted_kmeans".
      weighting: "importance" or "mean", see `dpc_knn`; used by "dpc_knn" only.
      mask: bool [..., N], True for valid points. None means all points are valid.
      initial: int [..., K], indices of the points that the k-means methods start from; None means K evenly
        spaced valid points.

    Raises:
      UserError: if the method is unknown; further those of `dpc_knn`.
    """
    if method not in CLUSTERING_METHODS:
        expected = ", ".join(CLUSTERING_METHODS)
        raise UserError(f"cluster: method is {method!r}, expected one of {expected}.")
    if method == "dpc_knn":
        return dpc_knn(features, num_clusters, k, mask=mask, weighting=weighting)

    features, mask = zero_masked(features, mask)
    if initial is None:
        initial = evenly_spaced(mask, num_clusters)
    weights = None
    density = distance = importance = mask.astype(jnp.float32)
    if method == "weighted_kmeans":
        peaks = density_peaks(features, k, mask)
        density, distance = jnp.exp(peaks.log_density), peaks.distance
        importance = jnp.exp(peaks.log_importance)
        weights = _relative_importance(peaks.log_importance)
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


def evenly_spaced(mask: jax.Array, num: int) -> jax.Array:
    """Return `num` distinct indices, evenly spaced among the valid points of a mask [..., N].

    Returns:
      int32 [..., num], ascending. If fewer points are valid: all of them, then N (no point).
    """
    slot, points = jnp.arange(num), mask.shape[-1]
    count = mask.sum(-1, keepdims=True)
    rank = jnp.where(count >= num, (2 * slot + 1) * count // (2 * num), slot)
    order = jnp.argsort(~mask, axis=-1, stable=True)  # valid points first, in ascending order
    chosen = jnp.take_along_axis(order, jnp.minimum(rank, points - 1), -1)
    return jnp.where(rank < count, chosen, points).astype(jnp.int32)


def map_frames(function: Callable, frames: jax.Array):
    """Apply `function` to frames [F, N, D], on a CPU a few frames at a time and elsewhere to all at once.

    On a CPU the chunks reuse the same memory and fit into the cache; fresh memory from the operating system
    would take a third of the time of the computation.

    Args:
      function: maps any number of frames [F, N, D], each on its own, to a tree of arrays [F, ...].

    Returns:
      The tree of results of all frames, [F, ...].
    """
    chunk = max(1, CPU_CHUNK_SIZE // frames[0].size)
    if chunk >= len(frames):
        return function(frames)

    def in_chunks(frames):
        whole = len(frames) // chunk * chunk
        results = jax.lax.map(function, frames[:whole].reshape(-1, chunk, *frames.shape[1:]))
        results = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), results)
        if whole == len(frames):
            return results
        return jax.tree.map(lambda *x: jnp.concatenate(x), results, function(frames[whole:]))

    return jax.lax.platform_dependent(frames, cpu=in_chunks, default=function)


def _relative_importance(log_importance: jax.Array) -> jax.Array:
    """Return importance divided by its maximum, or ones if it is zero everywhere.

    K-means does not depend on the scale of its weights, and importance itself may underflow.
    """
    highest = log_importance.max(-1, keepdims=True)
    return jnp.where(jnp.isfinite(highest), jnp.exp(log_importance - highest), 1.0)


def _nearest_member(features: jax.Array, centroids: jax.Array, member: jax.Array) -> jax.Array:
    """Return the index of each slot's point nearest to its centroid, int32 [..., K].

    Of points whose distances are equal up to rounding, such as two points and their mean, it is the first.
    """
    slot = jnp.argmax(member, -2)  # [..., N]
    own = jnp.take_along_axis(centroids, slot[..., None], -2)  # [..., N, D]
    square = jnp.square(features.astype(jnp.float32) - own).sum(-1)
    square = jnp.where(member, square[..., None, :], jnp.inf)
    nearest = square <= (1 + 1e-4) * square.min(-1, keepdims=True)
    return jnp.argmax(member & nearest, -1).astype(jnp.int32)
