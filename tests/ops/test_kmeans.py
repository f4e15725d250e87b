"""K-means and `cluster`: released values, a plain loop, masks, weights, duplicates."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynfocus_jax.errors import UserError
from dynfocus_jax.ops.clustering import cluster, evenly_spaced
from dynfocus_jax.ops.dpc_knn import dpc_knn
from dynfocus_jax.ops.kmeans import kmeans

GOLDEN = Path(__file__).parents[1] / "golden" / "released"
run = jax.jit(kmeans, static_argnames=("iterations", "tol"))


def slow_kmeans(points, initial, weights, mask, iterations, tol):
    """Run k-means in float64 on points [N, D]; return centroids, labels (-1 where masked), summed weights."""
    points, slots = np.where(mask[:, None], points, 0).astype(np.float64), len(initial)
    centroids = points[initial]
    for _ in range(iterations):
        square = ((points[:, None] - centroids) ** 2).sum(-1)
        labels = np.where(mask, square.argmin(-1), -1)
        total = np.array([weights[labels == slot].sum() for slot in range(slots)])
        moved = centroids.copy()
        for slot in np.flatnonzero(total > 0):
            moved[slot] = weights[labels == slot] @ points[labels == slot] / total[slot]
        if np.linalg.norm(moved - centroids, axis=1).sum() < tol:
            break
        centroids = moved
    return centroids, labels, total


def assert_equals(actual, expected):
    """Compare a KMeans with the result of `slow_kmeans`."""
    centroids, labels, total = expected
    np.testing.assert_array_equal(actual.assignment, labels)
    np.testing.assert_allclose(actual.centroids, centroids, rtol=0, atol=1e-5 * np.abs(centroids).max())
    np.testing.assert_allclose(actual.weights, total, rtol=1e-5)


def test_released_values():
    golden = np.load(GOLDEN / "kmeans.npz")
    found = run(golden["features"].reshape(60, -1), golden["initial"])
    assert_equals(found, (golden["centroids"].reshape(16, -1), golden["labels"], golden["weights"]))


@pytest.mark.parametrize("iterations", [1, 2, 10, 50])
def test_against_a_plain_loop(iterations):
    """Rows stop at different iterations; points are weighted, some masked; masked points are NaN."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(4, 30, 5)).astype(np.float32)
    points[0, 5:] = points[0, :5].repeat(5, 0)  # five distinct points: converges at once
    weights = rng.random((4, 30)).astype(np.float32)
    weights[2, ::3] = 0
    mask = np.arange(30) < np.array([[30], [30], [25], [17]])
    initial = np.stack([rng.permutation(17)[:4] for _ in range(4)])
    initial[0] = [0, 1, 2, 3]
    points[~mask] = np.nan
    found = run(points, initial, weights=weights, mask=mask, iterations=iterations)
    stops = set()
    for b in range(4):
        expected = slow_kmeans(points[b], initial[b], weights[b], mask[b], iterations, 1e-4)
        assert_equals(jax.tree.map(lambda field, b=b: field[b], found), expected)
        longer = slow_kmeans(points[b], initial[b], weights[b], mask[b], iterations + 1, 1e-4)
        stops.add(bool((longer[0] == expected[0]).all()))
    assert iterations != 2 or stops == {True, False}


def test_tolerance_drops_the_last_update():
    points = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    initial, ones, mask = np.arange(5), np.ones(40), np.ones(40, bool)
    for tol in (0.05, 0.5, 1e9):
        assert_equals(run(points, initial, tol=tol), slow_kmeans(points, initial, ones, mask, 10, tol))
    np.testing.assert_array_equal(run(points, initial, tol=1e9).centroids, points[:5])


def test_duplicates_and_unused_slots():
    rng = np.random.default_rng(2)
    points = rng.normal(size=(3, 257)).astype(np.float32).repeat(6, 0)
    found = run(points, np.array([0, 1, 6, 18, -1, 12]))  # point 1 equals point 0; 18 and -1 are out of range
    np.testing.assert_array_equal(found.assignment, np.array([0, 2, 5]).repeat(6))
    np.testing.assert_array_equal(found.weights, [6, 0, 6, 0, 0, 6])
    assert not np.asarray(found.centroids)[3:5].any()
    np.testing.assert_array_equal(found.centroids[1], points[0])


def test_slots_with_equal_starting_points():
    """Only the first such slot gets points, even if rounding has moved its centroid away from them."""
    rng = np.random.default_rng(10)
    points = np.concatenate([rng.normal(size=(3, 33)).repeat(7, 0), rng.normal(size=(15, 33))]).astype(
        np.float32
    )
    weights, mask = rng.random(36).astype(np.float32), np.ones(36, bool)
    found = run(points, np.array([2, 0, 1, 8, 15, 30]), weights=weights)
    centroids, labels, total = slow_kmeans(points, [2, 8, 15, 30], weights, mask, 10, 1e-4)
    slots = np.array([0, 3, 4, 5])
    np.testing.assert_array_equal(found.assignment, slots[labels])
    np.testing.assert_allclose(found.centroids[slots], centroids, atol=1e-5)
    np.testing.assert_allclose(found.weights, np.insert(total, [1, 1], 0), rtol=1e-5)


def test_large_offset():
    """Labels do not change when all points are shifted far from the origin."""
    lattice = np.random.default_rng(3).integers(-5, 6, (50, 8))
    near, far = (run((lattice + shift).astype(np.float32), np.arange(6)) for shift in (0, 4096))
    np.testing.assert_array_equal(far.assignment, near.assignment)


def test_no_gradient():
    points = jnp.asarray(np.random.default_rng(4).normal(size=(12, 3)), jnp.float32)
    gradient = jax.grad(lambda x: kmeans(x, jnp.arange(3)).centroids.sum())(points)
    assert not np.asarray(gradient).any()


def test_evenly_spaced():
    rng = np.random.default_rng(5)
    for num in (1, 3, 7):
        mask = rng.random((20, 11)) < rng.random((20, 1))
        chosen = np.asarray(evenly_spaced(jnp.asarray(mask), num))
        padded = np.asarray(evenly_spaced(jnp.pad(mask, ((0, 0), (0, 9))), num))
        for row, more, valid in zip(chosen, padded, mask, strict=True):
            live, found = np.flatnonzero(valid), row[row < 11]
            assert len(found) == len(set(found)) == min(num, len(live))
            assert set(found) <= set(live)
            np.testing.assert_array_equal(more[more < 20], found)
    np.testing.assert_array_equal(evenly_spaced(jnp.ones(12, bool), 4), [1, 4, 7, 10])


@pytest.mark.parametrize("method", ["kmeans", "weighted_kmeans"])
def test_cluster_by_kmeans(method):
    rng = np.random.default_rng(6)
    points, mask = rng.normal(size=(2, 25, 6)).astype(np.float32), np.arange(25) < np.array([[25], [19]])
    found = jax.jit(lambda x: cluster(x, 4, 3, method=method, weighting="importance", mask=mask))(points)
    peaks = dpc_knn(points, 4, 3, mask=mask)
    weights = np.asarray(peaks.importance) if method == "weighted_kmeans" else mask * 1.0
    for field in ("density", "distance", "importance"):
        expected = getattr(peaks, field) if method == "weighted_kmeans" else mask
        np.testing.assert_allclose(getattr(found, field), expected, rtol=1e-6)
    for b in range(2):
        initial = np.asarray(evenly_spaced(jnp.asarray(mask[b]), 4))
        centroids, labels, _ = slow_kmeans(points[b], initial, weights[b], mask[b], 10, 1e-4)
        np.testing.assert_array_equal(found.assignment[b], labels)
        np.testing.assert_allclose(found.prototypes[b], centroids, atol=1e-5)
        for slot in range(4):
            members = np.flatnonzero(labels == slot)
            square = ((points[b, members] - centroids[slot]) ** 2).sum(-1)
            assert found.centers[b, slot] == members[square.argmin()]
    assert found.valid.all()


@pytest.mark.parametrize("method", ["kmeans", "weighted_kmeans", "dpc_knn"])
def test_cluster_with_few_points(method):
    """Fewer valid points than clusters, a static video, and no valid point."""
    rng = np.random.default_rng(7)
    points = rng.normal(size=(3, 8, 5)).astype(np.float32)
    points[1] = points[1, 0]
    mask = np.arange(8) < np.array([[3], [8], [0]])
    points[~mask] = np.nan
    found = jax.jit(lambda x: cluster(x, 5, 2, method=method, weighting="importance", mask=mask))(points)
    assert all(np.isfinite(field).all() for field in found)

    assert sorted(np.asarray(found.assignment[0, :3])) == [0, 1, 2]
    np.testing.assert_array_equal(found.assignment[0, 3:], -1)
    np.testing.assert_array_equal(found.valid[0], np.arange(5) < 3)
    np.testing.assert_allclose(
        found.prototypes[0, :3], points[0, np.asarray(found.centers[0, :3])], rtol=1e-6
    )
    assert not np.asarray(found.prototypes[0, 3:]).any()

    distinct = 5 if method == "dpc_knn" else 1
    assert found.valid[1].sum() == distinct
    np.testing.assert_allclose(found.prototypes[1, 0], points[1, 0], rtol=1e-6)

    assert not found.valid[2].any()
    np.testing.assert_array_equal(found.assignment[2], -1)
    assert not np.asarray(found.prototypes[2]).any()


def test_weights_do_not_underflow():
    """Importance is 0 in float32 here; the reference uses its float64 value."""
    points = 10 * np.random.default_rng(8).normal(size=(40, 256)).astype(np.float32)
    found = jax.jit(lambda x: cluster(x, 3, 5, method="weighted_kmeans", weighting="mean"))(points)
    assert not np.asarray(found.importance).any()
    square = ((points[:, None].astype(np.float64) - points) ** 2).sum(-1) / 256
    density = np.exp(-np.sort(square, 1)[:, :5].mean(1))
    weights = density * np.asarray(found.distance)
    initial = np.asarray(evenly_spaced(jnp.ones(40, bool), 3))
    centroids, labels, _ = slow_kmeans(points, initial, weights, np.ones(40, bool), 10, 1e-4)
    np.testing.assert_array_equal(found.assignment, labels)
    # Values are up to 30, and the weights have the rounding error of an exponent of -144.
    np.testing.assert_allclose(found.prototypes, centroids, atol=1e-3)


def test_cluster_by_dpc_knn_and_errors():
    points = np.random.default_rng(9).normal(size=(14, 4)).astype(np.float32)
    for weighting in ("importance", "mean"):
        found = cluster(points, 3, 2, method="dpc_knn", weighting=weighting)
        for one, other in zip(found, dpc_knn(points, 3, 2, weighting=weighting), strict=True):
            np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="method is 'mean_shift', expected one of dpc_knn"):
        cluster(points, 3, 2, method="mean_shift", weighting="mean")
