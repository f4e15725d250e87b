"""Token sampling: the tokens that top-k and top-p keep as in Hugging Face, their frequencies, seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dynfocus_jax.errors import UserError
from dynfocus_jax.serving.token_sampling import (
    SamplingParams,
    check_sampling,
    filter_logits,
    sample_tokens,
    stack_sampling,
)

VOCAB = 50
SETTINGS = [
    *(
        SamplingParams(temperature, k, p)
        for temperature in (0.3, 1.0, 2.5)
        for k in (0, 1, 7)
        for p in (0.2, 0.9)
    ),
    SamplingParams(1.0, VOCAB + 5, 1.0),
    SamplingParams(1.0, 0, 1e-6),
    SamplingParams(0.01, 0, 0.99),
]


def as_hugging_face(logits, params):
    """The scores that `generate(do_sample=True)` draws from."""
    warpers = [TemperatureLogitsWarper(params.temperature)]
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    return LogitsProcessorList(warpers)(None, torch.from_numpy(logits[None]))[0].numpy()


def test_filtered_logits_equal_hugging_face():
    """Rows of all settings in one batch, with logits as far apart as a trained model's."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (len(SETTINGS), VOCAB)).astype(np.float32)
    got = np.asarray(jax.jit(filter_logits)(logits, stack_sampling(SETTINGS)))
    for row, params in enumerate(SETTINGS):
        expected = as_hugging_face(logits[row], params)
        np.testing.assert_array_equal(got[row] > -np.inf, expected > -np.inf, err_msg=str(params))
        np.testing.assert_allclose(got[row], expected, rtol=1e-6)
    counts = (got > -np.inf).sum(axis=1)
    assert counts.min() == 1
    assert counts.max() == VOCAB
    assert len(set(counts)) > 5


def test_sampled_tokens_have_the_renormalised_probabilities():
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.06, 0.04]))
    count = 4000
    rows = stack_sampling([SamplingParams(1.0, 4, 0.85, seed=seed) for seed in range(count)])
    tokens = np.asarray(
        jax.jit(sample_tokens)(jnp.tile(logits, (count, 1)), rows, jnp.zeros(count, jnp.int32))
    )
    shares = np.bincount(tokens, minlength=5) / count
    # Of 0.96 the first three have 0.9 (two have 0.73): top-p keeps three.
    np.testing.assert_allclose(shares, [4 / 9, 3 / 9, 2 / 9, 0, 0], atol=0.03)


def test_greedy_and_sampled_rows_in_one_batch():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1, (200, VOCAB)).astype(np.float32)
    rows = stack_sampling([SamplingParams(), SamplingParams(3.0, seed=5)] * 100)
    tokens = np.asarray(sample_tokens(jnp.asarray(logits), rows, jnp.zeros(200, jnp.int32)))
    best = logits.argmax(axis=1)
    np.testing.assert_array_equal(tokens[::2], best[::2])
    assert (tokens[1::2] != best[1::2]).sum() > 50


def test_a_sample_depends_only_on_seed_and_position():
    logits = jnp.zeros((6, VOCAB))
    rows = stack_sampling([SamplingParams(1.0, seed=seed) for seed in (1, 1, 1, 2, 1, 2**32 - 1)])
    tokens = sample_tokens(logits, rows, jnp.array([0, 0, 1, 0, 2, 0], jnp.int32)).tolist()
    assert tokens[0] == tokens[1]
    assert len({*tokens[1:]}) > 3
    alone = sample_tokens(
        logits[:1], stack_sampling([SamplingParams(1.0, seed=1)]), jnp.array([1], jnp.int32)
    )
    assert alone.tolist() == [tokens[2]]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(-0.1), "temperature"),
        (SamplingParams(float("nan")), "temperature"),
        (SamplingParams(1.0, -1), "top_k"),
        (SamplingParams(1.0, 0, 1.5), "top_p"),
        (SamplingParams(1.0, 0, 1.0, -1), "seed"),
    ],
)
def test_settings_out_of_range(params, field):
    with pytest.raises(UserError, match=f"request 7: {field} is"):
        check_sampling(params, "request 7")
