"""Top-k selection: values; gradients against released code, optax and differences; masks and counts."""

from pathlib import Path

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynfocus_jax.errors import UserError
from dynfocus_jax.ops.perturbed_topk import distinct_argmax, hard_topk, perturbed_topk

GOLDEN = Path(__file__).parents[1] / "golden" / "released"
perturbed = jax.jit(perturbed_topk, static_argnums=(2, 3, 4))


def assert_close(actual, expected, tolerance=1e-5):
    """Check that the error is at most `tolerance` of the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def slow_topk(scores, k, mask, count):
    """Return indices of the best min(k, count) valid entries, ascending, padded to k with len(scores)."""
    order = sorted((i for i in range(len(scores)) if mask[i]), key=lambda i: (-scores[i], i))
    best = sorted(order[: min(k, count)])
    return best + [len(scores)] * (k - len(best))


def slow_indicators(scores, noise, k, sigma, mask, count):
    """Return the one-hot sorted top-k of every noise sample: [B, S, k, N]."""
    batch, samples, num = noise.shape
    result = np.zeros((batch, samples, k, num))
    perturbed_scores = np.float32(scores)[:, None] + np.float32(sigma) * np.float32(noise)
    for b in range(batch):
        for s in range(samples):
            for slot, index in enumerate(slow_topk(perturbed_scores[b, s], k, mask[b], count[b])):
                if index < num:
                    result[b, s, slot, index] = 1
    return result


def make_inputs(seed, batch=3, samples=40, num=9, k=4):
    rng = np.random.default_rng(seed)
    scores = rng.random((batch, num)).astype(np.float32)
    noise = rng.normal(size=(batch, samples, num)).astype(np.float32)
    return scores, noise, rng.normal(size=(batch, k, num)).astype(np.float32)


def test_released_values_and_gradient():
    golden = np.load(GOLDEN / "perturbed_topk.npz")
    indicators, pull = jax.vjp(
        lambda scores: perturbed(
            scores, golden["noise"], int(golden["k"]), float(golden["sigma"]), "diagonal"
        ),
        golden["scores"],
    )
    assert_close(indicators, golden["indicators"])
    assert_close(pull(golden["grad_indicators"])[0], golden["grad_scores"])


@pytest.mark.parametrize("jacobian", ["full", "diagonal"])
def test_values_and_gradients_by_definition(jacobian):
    """Compute both estimators from the sample indicators in float64, with a mask and counts below k."""
    scores, noise, upstream = make_inputs(0)
    mask = np.ones((3, 9), bool)
    mask[0, [1, 5]], mask[1, :6] = False, False  # sample 1 has 3 valid entries for k = 4
    count = np.array([4, 4, 2])
    samples = slow_indicators(scores, noise, 4, 0.3, mask, count)
    indicators, pull = jax.vjp(
        lambda x: perturbed(x, noise, 4, 0.3, jacobian, mask=mask, count=count), scores
    )
    assert indicators.dtype == jnp.float32
    assert_close(indicators, samples.mean(1), 1e-6)
    assert not np.asarray(indicators)[2, 2:].any()
    assert not np.asarray(indicators)[1, 3:].any()

    if jacobian == "full":
        expected = np.einsum("bkn,bskn,bsm->bm", upstream, samples, noise) / 40 / 0.3
    else:
        expected = np.einsum("bkn,bskn,bsn->bn", upstream, samples, noise) / 40 / 0.3
    assert_close(pull(upstream)[0], np.where(mask, expected, 0))


def test_full_gradient_equals_that_of_optax():
    num, k, samples, sigma = 8, 3, 50, 0.2
    scores, _, upstream = make_inputs(1, batch=1, num=num, k=k)
    key = jax.random.key(3)
    noise = jax.vmap(lambda one: optax.tree.random_like(one, scores[0], sampler=jax.random.normal))(
        jax.random.split(key, samples)
    )

    def one_hot(x):
        return jax.nn.one_hot(jnp.sort(jax.lax.top_k(x, k)[1]), num)

    oracle = optax.perturbations.make_perturbed_fun(
        one_hot, samples, sigma, optax.perturbations.Normal(), use_baseline=False
    )
    expected, pull_expected = jax.vjp(lambda x: oracle(key, x), scores[0])
    actual, pull = jax.vjp(lambda x: perturbed(x, noise[None], k, sigma, "full"), scores)
    assert_close(actual[0], expected, 1e-6)
    assert_close(pull(upstream)[0][0], pull_expected(upstream[0])[0])


def test_full_gradient_is_the_slope_of_the_smoothed_objective():
    """Central differences with common random numbers agree within 5 standard errors of the samples."""
    num, k, samples, sigma, step = 5, 2, 200_000, 0.5, 0.1
    scores, noise, upstream = make_inputs(2, 1, samples, num, k)

    def per_sample(x):  # <G, Y_s>, [S]
        chosen = np.sort(np.argsort(-(x + sigma * noise[0]), axis=-1)[:, :k], axis=-1)
        return sum(upstream[0, j, chosen[:, j]] for j in range(k))

    gradient, diagonal = (
        jax.vjp(lambda x, j=j: perturbed(x, noise, k, sigma, j), scores)[1](upstream)[0][0]
        for j in ("full", "diagonal")
    )
    at_scores = per_sample(scores[0])
    missed = 0
    for d, unit in enumerate(np.eye(num, dtype=np.float32)):
        slope = (per_sample(scores[0] + step * unit) - per_sample(scores[0] - step * unit)) / (2 * step)
        estimate = at_scores * noise[0, :, d] / sigma
        scatter = (estimate - slope).std() / np.sqrt(samples)
        assert scatter < 0.02
        assert abs(float(gradient[d]) - slope.mean()) < 5 * scatter
        missed += abs(float(diagonal[d]) - slope.mean()) > 5 * scatter
    assert missed > 0  # the bound is tight enough to reject the diagonal estimator


@pytest.mark.parametrize("jacobian", ["full", "diagonal"])
@pytest.mark.parametrize("sigma", [0.0, 1e-20])
def test_no_perturbation_no_gradient(sigma, jacobian):
    scores, noise, upstream = make_inputs(4)
    indicators, pull = jax.vjp(lambda x: perturbed(x, noise, 4, sigma, jacobian), scores)
    assert_close(indicators, slow_indicators(scores, noise, 4, 0, np.ones((3, 9), bool), [4] * 3).mean(1), 0)
    np.testing.assert_array_equal(pull(upstream)[0], np.zeros((3, 9)))


@pytest.mark.parametrize("jacobian", ["full", "diagonal"])
def test_masked_entries_have_no_effect(jacobian):
    scores, noise, upstream = make_inputs(5)
    mask = np.arange(9) < np.array([[9], [6], [5]])

    def run(x):
        return perturbed(x, noise, 4, 0.1, jacobian, mask=mask)

    clean, pull_clean = jax.vjp(run, scores)
    dirty, pull_dirty = jax.vjp(run, np.where(mask, scores, np.nan))
    np.testing.assert_array_equal(dirty, clean)
    np.testing.assert_array_equal(pull_dirty(upstream)[0], pull_clean(upstream)[0])
    assert not np.asarray(pull_clean(upstream)[0])[~mask].any()


def test_noise_has_no_gradient_and_bfloat16_scores_have_one():
    scores, noise, upstream = make_inputs(6)
    by_noise = jax.grad(lambda z: (perturbed_topk(jnp.asarray(scores), z, 4, 0.1) * upstream).sum())(noise)
    assert not np.asarray(by_noise).any()
    half = jnp.asarray(scores, jnp.bfloat16)
    by_scores = jax.grad(lambda x: (perturbed_topk(x, noise, 4, 0.1) * upstream).sum())(half)
    assert by_scores.dtype == jnp.bfloat16
    expected = jax.grad(lambda x: (perturbed_topk(x, noise, 4, 0.1) * upstream).sum())(
        half.astype(jnp.float32)
    )
    assert_close(by_scores, expected, 1e-2)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    hnp.arrays(np.float32, (2, 7), elements=st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0])),
    hnp.arrays(np.bool_, (2, 7)),
    hnp.arrays(np.int32, 2, elements=st.integers(0, 4)),
)
def test_hard_topk(scores, mask, count):
    run = jax.jit(hard_topk, static_argnums=1)
    everything = np.ones(7, bool)
    for chosen, use_mask, use_count in [
        (run(scores, 4), False, False),
        (run(scores, 4, mask=mask), True, False),
        (run(scores, 4, mask=mask, count=count), True, True),
        (run(scores, 4, count=count), False, True),
    ]:
        assert chosen.dtype == jnp.int32
        for b in range(2):
            expected = slow_topk(
                scores[b], 4, mask[b] if use_mask else everything, count[b] if use_count else 4
            )
            np.testing.assert_array_equal(chosen[b], expected)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    hnp.arrays(np.float32, (2, 4, 6), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    hnp.arrays(np.bool_, (2, 6)),
    hnp.arrays(np.int32, 2, elements=st.integers(0, 4)),
)
def test_distinct_argmax(indicators, mask, count):
    run = jax.jit(distinct_argmax)
    for actual, masks, counts in [
        (run(indicators), np.ones((2, 6), bool), [4, 4]),
        (run(indicators, mask=mask, count=count), mask, count),
    ]:
        assert actual.dtype == jnp.int32
        for b in range(2):
            taken = []
            for slot in range(4):
                free = [d for d in range(6) if masks[b, d] and d not in taken]
                use = free and slot < counts[b]
                taken.append(min(free, key=lambda d: (-indicators[b, slot, d], d)) if use else 6)
            np.testing.assert_array_equal(actual[b], taken)


def test_errors():
    with pytest.raises(UserError, match="k is 4 for 3 scores"):
        hard_topk(jnp.zeros(3), 4)
    with pytest.raises(UserError, match="k is 0 for 3 scores"):
        perturbed_topk(jnp.zeros((1, 3)), jnp.zeros((1, 2, 3)), 0, 0.1)
    with pytest.raises(UserError, match="jacobian is 'half'"):
        perturbed_topk(jnp.zeros((1, 3)), jnp.zeros((1, 2, 3)), 1, 0.1, "half")
