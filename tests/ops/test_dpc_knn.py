"""DPC-KNN: values of the released code, a brute-force version, ties, masks and gradients."""

from functools import partial
from pathlib import Path

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dynfocus_jax.ops.dpc_knn as module
from dynfocus_jax.errors import UserError
from dynfocus_jax.ops.dpc_knn import dpc_knn, first_duplicate, square_distances

GOLDEN = Path(__file__).parents[1] / "golden" / "released"
run = jax.jit(dpc_knn, static_argnums=(1, 2), static_argnames=("weighting",))


def assert_close(actual, expected, tolerance=1e-5):
    """Check that the error is at most `tolerance` of the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = max(np.abs(expected).max(initial=0.0), 1e-30)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def brute_force(points, num_clusters, k, mask, weighting):
    """Return the fields of Clusters from the definition, in float64, for integer points [N, D]."""
    num, width = points.shape
    points = np.where(mask[:, None], points, 0).astype(np.float64)
    live = [i for i in range(num) if mask[i]]
    square = np.array([[((points[i] - points[j]) ** 2).sum() for j in range(num)] for i in range(num)])
    spread, delta, importance = (np.zeros(num) for _ in range(3))
    for i in live:
        nearest = sorted(square[i, j] for j in live)[:k]
        spread[i] = sum(nearest) / len(nearest) / width
    for i in live:
        denser = [j for j in live if spread[j] < spread[i] or (spread[j] == spread[i] and j < i)]
        widest = max(square[a, b] for a in live for b in live)
        delta[i] = np.sqrt((min(square[i, j] for j in denser) if denser else widest) / width)
        importance[i] = np.exp(-spread[i]) * delta[i]
    order = sorted(live, key=lambda i: (-importance[i], i))[:num_clusters]
    assignment = np.full(num, -1)
    for i in live:
        assignment[i] = (
            order.index(i) if i in order else min(range(len(order)), key=lambda s: square[order[s], i])
        )
    prototypes = np.zeros((num_clusters, width))
    for slot in range(len(order)):
        members = [i for i in live if assignment[i] == slot]
        weights = np.array([importance[i] if weighting == "importance" else 1.0 for i in members])
        if weights.sum() == 0:
            weights = np.ones(len(members))
        total = weights.sum() + (0 if weighting == "importance" else 1e-6)
        prototypes[slot] = weights @ points[members] / total
    return {
        "prototypes": prototypes,
        "assignment": assignment,
        "centers": np.array(order + [0] * (num_clusters - len(order))),
        "density": np.where(mask, np.exp(-spread), 0.0),
        "distance": delta,
        "importance": importance,
        "valid": np.arange(num_clusters) < len(order),
    }


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_released_values(name):
    golden = np.load(GOLDEN / f"dpc_knn_{name}.npz")
    clusters = run(golden["features"], int(golden["num_clusters"]), int(golden["k"]), weighting="mean")
    np.testing.assert_array_equal(clusters.assignment, golden["assignment"])
    assert_close(clusters.prototypes, golden["merged"])
    assert clusters.valid.all()
    own = np.take_along_axis(np.asarray(clusters.assignment), np.asarray(clusters.centers), -1)
    np.testing.assert_array_equal(own, np.broadcast_to(np.arange(own.shape[-1]), own.shape))


# lead, N, D, K, k, weighting, dtype: K < N, K = N, K > N and k > N, one point, k = 1
CASES = [
    ((2,), 12, 3, 4, 5, "importance", jnp.float32),
    ((2,), 12, 3, 4, 5, "mean", jnp.float32),
    ((), 7, 2, 7, 3, "importance", jnp.float32),
    ((1, 2), 6, 4, 9, 10, "importance", jnp.bfloat16),
    ((), 1, 3, 2, 2, "mean", jnp.bfloat16),
    ((3,), 10, 2, 3, 1, "importance", jnp.float32),
]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_brute_force(data):
    lead, num, width, num_clusters, k, weighting, dtype = data.draw(st.sampled_from(CASES))
    points = data.draw(hnp.arrays(np.int8, (*lead, num, width), elements=st.integers(-2, 2)))
    mask = data.draw(hnp.arrays(np.bool_, (*lead, num)))
    if data.draw(st.booleans()):
        points = points[..., np.arange(num) // 2, :]  # every point twice
    clusters = run(jnp.asarray(points, dtype), num_clusters, k, mask=mask, weighting=weighting)
    assert clusters.prototypes.dtype == dtype
    for index in np.ndindex(*lead):
        expected = brute_force(points[index], num_clusters, k, mask[index], weighting)
        for field, values in expected.items():
            actual = np.asarray(getattr(clusters, field)[index])
            if values.dtype.kind == "f":
                tolerance = 1e-2 if field == "prototypes" and dtype == jnp.bfloat16 else 2e-6
                np.testing.assert_allclose(actual, values, rtol=tolerance, atol=tolerance, err_msg=field)
            else:
                np.testing.assert_array_equal(actual, values, err_msg=field)


def scenes(rng, frames, width):
    """Return points with all kinds of ties: a static scene, a cut, a return to it, and distinct frames."""
    a, b, c = rng.normal(size=(3, width))
    distinct = rng.normal(size=(frames - 15, width))
    points = np.stack([a] * 4 + [b] * 4 + [a] * 2 + [c, b, c, b, c])
    return np.concatenate([points, distinct]).astype(np.float32)


@pytest.mark.parametrize("extra", [3, 40])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e30, 0.0])
def test_padding_does_not_change_clusters(extra, garbage):
    rng = np.random.default_rng(0)
    for frames, width in [(17, 1408), (24, 96), (15, 257)]:
        points = scenes(rng, frames, width)
        plain = run(points, 8, 5)
        padded = run(
            np.concatenate([points, np.full((extra, width), garbage, np.float32)]),
            8,
            5,
            mask=np.arange(frames + extra) < frames,
        )
        np.testing.assert_array_equal(padded.centers, plain.centers)
        np.testing.assert_array_equal(padded.assignment[:frames], plain.assignment)
        np.testing.assert_array_equal(padded.assignment[frames:], -1)
        assert not padded.importance[frames:].any()
        assert_close(padded.prototypes, plain.prototypes, 1e-6)


def test_masked_points_in_between_do_not_change_clusters():
    rng = np.random.default_rng(1)
    points, at = scenes(rng, 20, 64), np.sort(rng.choice(50, 20, replace=False))
    spaced, mask = np.full((50, 64), np.nan, np.float32), np.zeros(50, bool)
    spaced[at], mask[at] = points, True
    plain, clusters = run(points, 6, 5), run(spaced, 6, 5, mask=mask)
    np.testing.assert_array_equal(clusters.centers, at[np.asarray(plain.centers)])
    np.testing.assert_array_equal(clusters.assignment[at], plain.assignment)


def test_static_video_gives_distinct_centers():
    frame = np.random.default_rng(2).normal(size=1408).astype(np.float32)
    clusters = run(np.tile(frame, (40, 1)), 25, 5)
    np.testing.assert_array_equal(clusters.centers, np.arange(25))
    np.testing.assert_array_equal(clusters.assignment[:25], np.arange(25))
    np.testing.assert_array_equal(clusters.assignment[25:], 0)
    assert clusters.valid.all()
    assert_close(clusters.prototypes, np.tile(frame, (25, 1)), 1e-6)


@pytest.fixture(params=["exact", "by position"])
def rounding(request, monkeypatch):
    """`dpc_knn` with this machine's rounding of products, and with rounding that depends on the position."""
    exact = module.gram

    def by_position(points):
        product = exact(points)
        noise = np.random.default_rng(0).normal(size=product.shape).astype(np.float32)
        # In a callback, since XLA would fuse the multiplication into the next operation, without rounding.
        return jax.pure_callback(lambda x: np.asarray(x) * (1 + np.float32(1e-6) * noise), product, product)

    if request.param == "by position":
        monkeypatch.setattr(module, "gram", by_position)
    return jax.jit(lambda *args, **kwargs: dpc_knn(*args, **kwargs), static_argnums=(1, 2))


def test_two_alternating_frames_tie_by_index(rounding):
    """Densities are equal in exact arithmetic, so only bitwise ties put the first frame first."""
    for seed in range(20):
        pair = np.random.default_rng(seed).normal(size=(2, 333)).astype(np.float32)
        clusters = rounding(np.tile(pair, (9, 1)), 4, 11)
        np.testing.assert_array_equal(clusters.centers, [0, 1, 2, 3])
        np.testing.assert_array_equal(clusters.assignment, [0, 1, 2, 3] + [0, 1] * 7)


def test_mutual_nearest_neighbours_tie_by_index(rounding):
    """With k = 2, two such points have equal densities, wherever they are among masked points."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        far, pair = rng.normal(size=(2, 1001))
        place = np.sort(rng.choice(12, 3, replace=False))
        points, mask = np.zeros((12, 1001), np.float32), np.zeros(12, bool)
        points[place], mask[place] = [far, pair, pair + 0.1 * rng.normal(size=1001)], True
        clusters = rounding(points, 3, 2, mask=mask)
        np.testing.assert_array_equal(clusters.centers, place[[1, 0, 2]])


@pytest.mark.parametrize("width", [1, 2, 777])
def test_duplicates_have_equal_distances(rounding, width):
    rng = np.random.default_rng(5)
    distinct = rng.normal(size=(13, width)).astype(np.float32)
    which = rng.integers(0, 13, 37)
    points, mask = distinct[which], rng.random(37) < 0.8
    square = np.asarray(jax.jit(lambda *args: square_distances(*args))(points, mask))
    np.testing.assert_array_equal(square, square.T)
    assert np.isinf(square[~mask]).all()
    live = np.flatnonzero(mask)
    for i in live:
        for j in live:
            if which[i] == which[j]:
                np.testing.assert_array_equal(square[i], square[j])
                assert square[i, j] == 0
            else:
                exact, scale = (
                    ((points[i].astype(np.float64) - p) ** 2).sum() for p in (points[j], points[0])
                )
                assert abs(square[i, j] - exact) < 1e-5 * (exact + scale)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 20.0, 1000.0])
def test_no_scale_underflows(scale):
    """At scale 20 and above exp(-d^2) is 0 in float32, but choices and weights are still correct."""
    points = scale * np.random.default_rng(3).normal(size=(60, 32)).astype(np.float32)
    clusters = run(np.concatenate([points, np.ones((60, 1), np.float32)], 1), 10, 5)
    assert all(np.isfinite(field).all() for field in clusters)
    # The constant last feature is the sum of the weights.
    np.testing.assert_allclose(clusters.prototypes[:, -1], 1.0, rtol=1e-5)
    assert len(np.unique(clusters.centers)) == 10

    x = np.concatenate([points, np.ones((60, 1))], 1).astype(np.float64)
    square = ((x[:, None] - x[None]) ** 2).sum(-1) / 33
    log_density = -np.sort(square, 1)[:, :5].mean(1)
    denser = log_density[None, :] > log_density[:, None]
    delta = np.sqrt(np.where(denser.any(1), np.where(denser, square, np.inf).min(1), square.max()))
    np.testing.assert_array_equal(clusters.centers, np.argsort(-(log_density + np.log(delta)))[:10])


def test_far_from_the_origin():
    """An offset a thousand times the distances does not change the result."""
    rng = np.random.default_rng(4)
    lattice = rng.integers(-3, 4, (40, 16))
    near = run(lattice.astype(np.float32), 6, 4)
    far = run((lattice + 3000).astype(np.float32), 6, 4)
    np.testing.assert_array_equal(far.centers, near.centers)
    np.testing.assert_array_equal(far.assignment, near.assignment)
    np.testing.assert_array_equal(far.importance, near.importance)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(hnp.arrays(np.int8, (9, 3), elements=st.integers(-1, 1)), hnp.arrays(np.bool_, 9), st.booleans())
def test_first_duplicate(lattice, mask, negative_zero):
    points = lattice.astype(np.float32)
    if negative_zero:
        points[::2][points[::2] == 0] = -0.0
    expected = [
        next(j for j in range(9) if mask[j] and (lattice[j] == lattice[i]).all()) if mask[i] else i
        for i in range(9)
    ]
    np.testing.assert_array_equal(jax.jit(first_duplicate)(points, mask), expected)


def test_first_duplicate_distinguishes_adjacent_floats():
    """Rows differ in one coordinate by units in the last place of float32 or of bfloat16."""
    base = np.ones((256, 8), np.float32)
    for step in (1, 2**16):
        bits = base.view(np.uint32).copy()
        bits[np.arange(256), np.arange(256) % 8] += np.uint32(step) * (np.arange(256, dtype=np.uint32) // 8)
        points = bits.view(np.float32)
        expected = np.where(np.arange(256) < 8, 0, np.arange(256))  # the first eight rows are equal
        np.testing.assert_array_equal(jax.jit(first_duplicate)(points, np.ones(256, bool)), expected)


@pytest.mark.parametrize("weighting", ["importance", "mean"])
def test_gradient_is_that_of_the_weighted_sum(weighting):
    rng = np.random.default_rng(6)
    points = rng.normal(size=(2, 20, 8)).astype(np.float32)
    points[:, 15:] = np.nan
    mask = np.broadcast_to(np.arange(20) < 15, (2, 20))
    upstream = rng.normal(size=(2, 6, 8)).astype(np.float32)

    def loss(x):
        return (dpc_knn(x, 6, 3, mask=mask, weighting=weighting).prototypes * upstream).sum()

    clusters, gradient = run(points, 6, 3, mask=mask, weighting=weighting), jax.jit(jax.grad(loss))(points)
    member = np.asarray(clusters.assignment)[:, None] == np.arange(6)[:, None]
    weights = member * (np.asarray(clusters.importance)[:, None] if weighting == "importance" else 1.0)
    weights = weights / weights.sum(-1, keepdims=True)
    assert_close(gradient, np.einsum("bkn,bkd->bnd", weights, upstream))
    assert not np.asarray(gradient)[:, 15:].any()


def test_no_valid_point():
    points = np.full((5, 4), np.nan, np.float32)
    mask = np.zeros(5, bool)
    clusters = run(points, 3, 2, mask=mask)
    assert not clusters.valid.any()
    np.testing.assert_array_equal(clusters.assignment, -1)
    np.testing.assert_array_equal(clusters.centers, 0)
    for field in (clusters.prototypes, clusters.density, clusters.distance, clusters.importance):
        assert not np.asarray(field).any()
    gradient = jax.jit(jax.grad(lambda x: dpc_knn(x, 3, 2, mask=mask).prototypes.sum()))(points)
    assert not np.asarray(gradient).any()


def test_vmap_is_the_leading_axis():
    rng = np.random.default_rng(7)
    points, mask = rng.normal(size=(3, 12, 5)).astype(np.float32), rng.random((3, 12)) < 0.7
    whole = run(points, 4, 3, mask=mask)
    mapped = jax.jit(jax.vmap(lambda x, m: dpc_knn(x, 4, 3, mask=m)))(points, mask)
    for one, other in zip(whole, mapped, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_no_pairwise_difference_is_materialised():
    batch, num, width = 2, 64, 48

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (var.aval.size for var in equation.outvars)
            for value in equation.params.values():
                for sub in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(sub, "jaxpr", sub)
                    if hasattr(inner, "eqns"):
                        yield from sizes(inner)

    points = jax.ShapeDtypeStruct((batch, num, width), jnp.float32)
    found = list(sizes(jax.make_jaxpr(partial(dpc_knn, num_clusters=8, k=4))(points).jaxpr))
    assert max(found) < batch * num * num * width / 8
    assert batch * num * num in found  # the search has found the distances


def test_errors():
    points = jnp.zeros((4, 3))
    with pytest.raises(UserError, match="weighting is 'max'"):
        dpc_knn(points, 2, 2, weighting="max")
    with pytest.raises(UserError, match="num_clusters is 0"):
        dpc_knn(points, 0, 2)
    with pytest.raises(UserError, match="neighbours, is 0"):
        dpc_knn(points, 2, 0)
    with pytest.raises(UserError, match=r"mask has shape \(3,\), expected \(4,\)"):
        dpc_knn(points, 2, 2, mask=jnp.ones(3, bool))
    with pytest.raises(UserError, match=r"shape \(0, 3\)"):
        dpc_knn(jnp.zeros((0, 3)), 2, 2)
