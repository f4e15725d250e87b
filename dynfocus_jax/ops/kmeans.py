"""Lloyd's k-means with Euclidean distance, which the paper compares with DPC-KNN (Table 11)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from dynfocus_jax.ops.dpc_knn import first_duplicate, zero_masked

# Squared distances from inner products are off by up to 6e-7 of the largest squared distance from the first
# point (measured at D = 22,528). Where this can hide which centroid is nearest, the distances to the
# `CANDIDATES` nearest centroids are recomputed from differences.
ROUNDING = 1e-6
CANDIDATES = 16


class KMeans(NamedTuple):
    """Result of k-means: K centroids and the assignment of N points to them."""

    centroids: Float32[Array, "*batch K D"]
    assignment: Int32[Array, "*batch N"]  # -1 for masked points
    weights: Float32[Array, "*batch K"]  # summed weights of the points of each centroid
    iterations: Int32[Array, "*batch"]  # number of times that the points were assigned


def kmeans(
    features: jax.Array,
    initial: jax.Array,
    *,
    weights: jax.Array | None = None,
    mask: jax.Array | None = None,
    iterations: int = 10,
    tol: float = 1e-4,
) -> KMeans:
    """Run weighted Lloyd iterations from given points, in float32. The result has no gradient.

    Each iteration assigns every point to its nearest centroid and moves the centroids to the weighted mean of
    their points; a centroid without weight stays. When the centroids' movements (Euclidean norms) sum to less
    than `tol`, the iteration stops and its update is dropped, so the assignment belongs to the returned
    centroids. If `iterations` is reached first, the centroids are one update ahead of the assignment. (Both
    as in the released code.) Of slots that start from bitwise-equal points, only the first gets points.

    Args:
      features: [..., N, D], any float dtype.
      initial: int [..., K], indices of the points to start from. An index outside 0..N-1 or of a masked point
        marks an unused slot, which keeps a zero centroid and gets no point. At least one slot must be used.
      weights: [..., N], non-negative; None means ones.
      mask: bool [..., N], True for valid points. None means all points are valid.
      iterations: maximum number of iterations.
      tol: smallest total movement, in the features' units.

    Raises:
      UserError: if there are no points, or the mask has another shape.
    """
    features, mask = zero_masked(jax.lax.stop_gradient(features).astype(jnp.float32), mask)
    num, slots = features.shape[-2], initial.shape[-1]
    weights = jnp.where(mask, 1.0 if weights is None else weights.astype(jnp.float32), 0.0)
    point = jnp.clip(initial, 0, num - 1)
    used = (point == initial) & jnp.take_along_axis(mask, point, -1)
    start = jnp.take_along_axis(features, point[..., None], -2)
    start = jnp.where(used[..., None], start, 0.0)
    used &= first_duplicate(start, used) == jnp.arange(slots)
    first = jnp.take_along_axis(features, jnp.argmax(mask, -1)[..., None, None], -2)
    offsets = features - first  # against cancellation in the distances
    extent = jnp.where(mask, jnp.square(offsets).sum(-1), 0.0).max(-1, keepdims=True)

    def label(centroids):
        """Return the nearest centroid of every point, int32 [..., N]."""
        relative = centroids - first
        product = jnp.einsum("...nd,...kd->...nk", offsets, relative, precision=jax.lax.Precision.HIGHEST)
        distance = jnp.square(relative).sum(-1)[..., None, :] - 2.0 * product  # squared, less ||x||^2
        distance = jnp.where(used[..., None, :], distance, jnp.inf)
        nearest = jnp.argmin(distance, -1).astype(jnp.int32)
        others = jnp.where(jnp.arange(slots) == nearest[..., None], jnp.inf, distance)
        ambiguous = mask & (others.min(-1) - distance.min(-1) <= ROUNDING * extent)
        return jax.lax.cond(ambiguous.any(), label_exactly, lambda *_: nearest, centroids, distance)

    def label_exactly(centroids, distance):
        """Return the nearest of the candidates, those of least `distance` [..., N, K]: int32 [..., N]."""
        candidates = jnp.sort(jax.lax.top_k(-distance, min(CANDIDATES, slots))[1], -1)  # ties: lower slot
        exact = jax.lax.map(partial(square_distance, centroids), jnp.moveaxis(candidates, -1, 0))
        best = jnp.argmin(exact, 0)[..., None]
        return jnp.take_along_axis(candidates, best, -1)[..., 0].astype(jnp.int32)

    def square_distance(centroids, slot):
        """Compute ||x - c||^2 of every point and the centroid of its `slot` [..., N]; inf if unused."""
        square = jnp.square(features - jnp.take_along_axis(centroids, slot[..., None], -2)).sum(-1)
        return jnp.where(jnp.take_along_axis(used, slot, -1), square, jnp.inf)

    def update(centroids, labels):
        """Return the weighted means of each slot's points, and their summed weights."""
        weight = jnp.where(labels[..., None, :] == jnp.arange(slots)[:, None], weights[..., None, :], 0.0)
        total = weight.sum(-1)
        mean = jnp.einsum("...kn,...nd->...kd", weight, features, precision=jax.lax.Precision.HIGHEST)
        mean /= jnp.where(total > 0, total, 1.0)[..., None]
        return jnp.where((total > 0)[..., None], mean, centroids), total

    def iterate(state):
        step, centroids, labels, total, done = state
        step += ~done
        labels = jnp.where(done[..., None], labels, label(centroids))
        moved, new_total = update(centroids, labels)
        total = jnp.where(done[..., None], total, new_total)
        done |= jnp.linalg.norm(moved - centroids, axis=-1).sum(-1) < tol
        return step, jnp.where(done[..., None, None], centroids, moved), labels, total, done

    def unfinished(state):
        step, *_, done = state
        return ((step < iterations) & ~done).any()

    labels = jnp.zeros(mask.shape, jnp.int32)
    total = jnp.zeros(initial.shape, jnp.float32)
    step = jnp.zeros(initial.shape[:-1], jnp.int32)
    state = (step, start, labels, total, step > 0)
    step, centroids, labels, total, _ = jax.lax.while_loop(unfinished, iterate, state)
    return KMeans(centroids, jnp.where(mask, labels, -1), total, step)
