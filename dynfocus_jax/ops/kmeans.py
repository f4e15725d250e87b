"""Lloyd's k-means with Euclidean distance: the clustering that the paper compares DPC-KNN with (Table 11)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dynfocus_jax.ops.dpc_knn import clean, first_twin

# Distances through inner products are off by up to 6e-7 of the points' greatest squared distance from the
# first one (measured at D = 22,528). Where that hides which centroid is nearest, differences decide.
ROUNDING = 1e-6
CANDIDATES = 16  # how many of the nearest are measured so


class KMeans(NamedTuple):
    """Centroids and the points that gave them."""

    centroids: jax.Array  # [..., K, D] float32
    assignment: jax.Array  # [..., N] int32, -1 for masked points
    weights: jax.Array  # [..., K] float32, summed weights of the members
    iterations: jax.Array  # [...] int32, how often the points were labelled


def kmeans(
    features: jax.Array,
    initial: jax.Array,
    *,
    weights: jax.Array | None = None,
    mask: jax.Array | None = None,
    iterations: int = 10,
    tol: float = 1e-4,
) -> KMeans:
    """Weighted Lloyd iterations from given points, in float32; no gradient flows through the result.

    Each iteration labels every point with its nearest centroid and moves the centroids to their members'
    weighted mean; a centroid without weight stays where it is. When the centroids' movements (Euclidean
    norms) sum to less than `tol`, the iteration stops and its update is dropped: the labels belong to the
    centroids returned. Where `iterations` run out first, the centroids are one update ahead of the labels.
    (Both as in the released code.) Of slots that start from bitwise-equal points only the first gets points.

    Args:
      features: [..., N, D], any float dtype.
      initial: [..., K] int indices of the points to start from; an index outside 0..N-1 or of a masked point
        marks an unused slot, which keeps a zero centroid and gets no point. At least one slot must be used.
      weights: [..., N] non-negative; None means ones.
      mask: [..., N] bool, True for valid points; None means all.
      iterations: at most this many.
      tol: in the features' units.
    """
    features, mask = clean(jax.lax.stop_gradient(features).astype(jnp.float32), mask)
    num, slots = features.shape[-2], initial.shape[-1]
    weights = jnp.where(mask, 1.0 if weights is None else weights.astype(jnp.float32), 0.0)
    point = jnp.clip(initial, 0, num - 1)
    used = (point == initial) & jnp.take_along_axis(mask, point, -1)
    start = jnp.take_along_axis(features, point[..., None], -2)
    start = jnp.where(used[..., None], start, 0.0)
    used &= first_twin(start, used) == jnp.arange(slots)
    first = jnp.take_along_axis(features, jnp.argmax(mask, -1)[..., None, None], -2)
    offsets = features - first  # against cancellation in the distances
    extent = jnp.where(mask, jnp.square(offsets).sum(-1), 0.0).max(-1, keepdims=True)

    def label(centroids):
        """[..., N] int32 nearest centroid."""
        towards = centroids - first
        product = jnp.einsum("...nd,...kd->...nk", offsets, towards, precision=jax.lax.Precision.HIGHEST)
        distance = jnp.square(towards).sum(-1)[..., None, :] - 2.0 * product  # without ||x||^2
        distance = jnp.where(used[..., None, :], distance, jnp.inf)
        nearest = jnp.argmin(distance, -1).astype(jnp.int32)
        others = jnp.where(jnp.arange(slots) == nearest[..., None], jnp.inf, distance)
        doubtful = mask & (others.min(-1) - distance.min(-1) <= ROUNDING * extent)
        return jax.lax.cond(doubtful.any(), decide, lambda *_: nearest, centroids, distance)

    def decide(centroids, distance):
        """[..., N] int32 nearest by differences among the centroids of least `distance` [..., N, K]."""
        candidates = jnp.sort(jax.lax.top_k(-distance, min(CANDIDATES, slots))[1], -1)  # ties: the lower
        measured = jax.lax.map(partial(measure, centroids), jnp.moveaxis(candidates, -1, 0))
        best = jnp.argmin(measured, 0)[..., None]
        return jnp.take_along_axis(candidates, best, -1)[..., 0].astype(jnp.int32)

    def measure(centroids, slot):
        """||x - c||^2 of every point and the centroid of its slot [..., N], inf if unused: [..., N]."""
        square = jnp.square(features - jnp.take_along_axis(centroids, slot[..., None], -2)).sum(-1)
        return jnp.where(jnp.take_along_axis(used, slot, -1), square, jnp.inf)

    def update(centroids, labels):
        """Weighted means of the members and their summed weights."""
        share = jnp.where(labels[..., None, :] == jnp.arange(slots)[:, None], weights[..., None, :], 0.0)
        total = share.sum(-1)
        mean = jnp.einsum("...kn,...nd->...kd", share, features, precision=jax.lax.Precision.HIGHEST)
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
