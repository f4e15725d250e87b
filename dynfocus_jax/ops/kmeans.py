"""Lloyd's k-means with Euclidean distance: the clustering that the paper compares DPC-KNN with (Table 11)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dynfocus_jax.ops.dpc_knn import clean, first_twin, gram, mix


class KMeans(NamedTuple):
    """Centroids and the points that gave them."""

    centroids: jax.Array  # [..., K, D] float32
    assignment: jax.Array  # [..., N] int32, -1 for masked points
    weights: jax.Array  # [..., K] float32, summed weights of the members
    iterations: jax.Array  # [...] int32 labellings of the points until the end


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

    A centroid is a weighted mean of points: the iterations move its weights [..., K, N] and read nothing but
    the points' inner products, so that the features are read twice, however many iterations there are.

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
    first = jnp.take_along_axis(features, jnp.argmax(mask, -1)[..., None, None], -2)
    products = gram(features - first)  # [..., N, N], from the first point against cancellation

    point = jnp.clip(initial, 0, num - 1)
    used = (initial == point) & jnp.take_along_axis(mask, point, -1)
    start = (point[..., None] == jnp.arange(num)) & used[..., None]
    used &= first_twin(jnp.take_along_axis(features, point[..., None], -2), used) == jnp.arange(slots)

    def to_points(means):
        """Inner products of means [..., K, N] with every point: [..., K, N]."""
        return jnp.einsum("...kj,...jn->...kn", means, products, precision=jax.lax.Precision.HIGHEST)

    def label(means, inner):
        """[..., N] int32 nearest centroid, by ||c||^2 / 2 - x.c (||x||^2 is common to all)."""
        distance = 0.5 * (means * inner).sum(-1, keepdims=True) - inner
        return jnp.argmin(jnp.where(used[..., None], distance, jnp.inf), -2).astype(jnp.int32)

    def update(means, labels):
        """Weighted means of the members and their summed weights."""
        share = jnp.where(labels[..., None, :] == jnp.arange(slots)[:, None], weights[..., None, :], 0.0)
        total = share.sum(-1)
        some = (total > 0)[..., None]
        return jnp.where(some, share / jnp.where(some, total[..., None], 1.0), means), total

    def iterate(state):
        step, means, inner, labels, total, done = state
        step += ~done
        labels = jnp.where(done[..., None], labels, label(means, inner))
        moved, new_total = update(means, labels)
        new_inner = to_points(moved)
        square = ((moved - means) * (new_inner - inner)).sum(-1)  # [..., K] of the movements
        total = jnp.where(done[..., None], total, new_total)
        done |= jnp.sqrt(jnp.maximum(square, 0.0)).sum(-1) < tol
        means, inner = (
            jnp.where(done[..., None, None], old, new) for old, new in ((means, moved), (inner, new_inner))
        )
        return step, means, inner, labels, total, done

    def unfinished(state):
        step, *_, done = state
        return ((step < iterations) & ~done).any()

    start = start.astype(jnp.float32)
    step = jnp.zeros(initial.shape[:-1], jnp.int32)
    labels, total = jnp.zeros(mask.shape, jnp.int32), jnp.zeros(initial.shape, jnp.float32)
    state = (step, start, to_points(start), labels, total, step > 0)
    step, means, _, labels, total, _ = jax.lax.while_loop(unfinished, iterate, state)
    return KMeans(mix(means, features), jnp.where(mask, labels, -1), total, step)
