"""The language model: against a numpy program, with and without cache; greedy answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynfocus_jax.models.llama import Llama
from dynfocus_jax.serving.generate import make_greedy
from tests.tiny import forward, make_sample, model_of, pad, random_params, shaken, stack, tiny_config

SIZES = {"vocab_size": 11, "width": 12, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp_dim": 20}


def make_llama(**changes):
    model = Llama(**(SIZES | changes))

    def everything(module, tokens, lengths):
        hidden, _ = module(module.embed(tokens), lengths)
        return module.logits(hidden)

    tokens = jnp.zeros((1, 3), jnp.int32)
    init = jax.jit(lambda key: model.init(key, tokens, jnp.array([3]), method=everything))
    variables = {"params": shaken(init(jax.random.key(0))["params"])}
    return model, variables, jax.jit(lambda v, t, n: model.apply(v, t, n, method=everything))


def numpy_llama(params, tokens, heads, kv_heads, eps=1e-5, theta=1e4):
    """Logits of one unpadded sequence in float64, one head at a time, from the definition."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, name, layer=None):
        scale = params[name]["scale"] if layer is None else params["blocks"][name]["scale"][layer]
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

    def rotate(x):  # halves, as pairs (i, i + h/2) turned by position * theta ** (-2i/h)
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None] * theta ** (-2 * np.arange(half) / x.shape[-1])
        turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = params["embedding"]["embedding"][tokens]
    blocks = params["blocks"]
    visible = np.tril(np.ones((len(x), len(x)), bool))
    for layer in range(blocks["out"]["kernel"].shape[0]):
        weights = {name: blocks[name]["kernel"][layer] for name in blocks if "norm" not in name}
        y = norm(x, "attention_norm", layer)
        for head in range(heads):
            group = head * kv_heads // heads
            query, key = rotate(y @ weights["query"][:, head]), rotate(y @ weights["key"][:, group])
            logits = np.where(visible, query @ key.T / np.sqrt(query.shape[-1]), -np.inf)
            share = np.exp(logits - logits.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            x = x + share @ (y @ weights["value"][:, group]) @ weights["out"][head]
        y = norm(x, "mlp_norm", layer)
        gate = y @ weights["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ weights["up"])) @ weights["down"]
    head = params["head"]["kernel"] if "head" in params else params["embedding"]["embedding"].T
    return norm(x, "final_norm") @ head


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 4}, {"kv_heads": 1, "tied_embeddings": True}], ids=str)
def test_against_numpy(changes):
    model, variables, run = make_llama(**changes)
    assert ("head" in variables["params"]) != model.tied_embeddings
    tokens = np.random.default_rng(0).integers(0, 11, (3, 9))
    lengths = np.array([9, 4, 1])
    logits = run(variables, tokens, lengths)
    assert logits.dtype == jnp.float32
    for row, length in enumerate(lengths):
        expected = numpy_llama(variables["params"], tokens[row, :length], model.heads, model.kv_heads)
        np.testing.assert_allclose(logits[row, :length], expected, rtol=1e-5, atol=1e-5)


def test_causality():
    _, variables, run = make_llama()
    tokens = np.random.default_rng(1).integers(0, 11, (1, 9))
    other = tokens.copy()
    other[0, 5] = (other[0, 5] + 1) % 11
    one, two = (np.asarray(run(variables, x, np.array([9])))[0] for x in (tokens, other))
    np.testing.assert_array_equal(one[:5], two[:5])
    assert (np.abs(one[5:] - two[5:]).max(-1) > 1e-4).all()


def test_remat_changes_nothing():
    _, variables, run = make_llama()
    _, _, rerun = make_llama(remat="full")
    tokens, lengths = np.random.default_rng(2).integers(0, 11, (2, 6)), np.array([6, 3])

    def gradient(run):
        return jax.grad(lambda v: jnp.square(run(v, tokens, lengths)[:, :3]).sum())(variables)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient(run), gradient(rerun)
    )


def test_cache_after_padded_prompts_equals_the_full_forward():
    """Prompts of 3, 7 and 5 tokens in a bucket of 7, continued token by token to 12."""
    model, variables, run = make_llama()
    tokens = np.random.default_rng(3).integers(0, 11, (3, 12))
    start = np.array([3, 7, 5])
    full = np.asarray(run(variables, tokens, np.full(3, 12)))

    @jax.jit
    def step(variables, tokens, lengths, cache):
        def call(module):
            hidden, extended = module(module.embed(tokens), lengths, cache)
            return module.logits(hidden), extended

        return model.apply(variables, method=call)

    prompt = np.where(np.arange(7) < start[:, None], tokens[:, :7], 9)  # 9: anything
    logits, cache = step(variables, prompt, start, model.empty_cache(3, 12))
    for row in range(3):
        np.testing.assert_allclose(logits[row, : start[row]], full[row, : start[row]], rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == start.tolist()
    for offset in range(5):
        at = start + offset
        logits, cache = step(variables, np.take_along_axis(tokens, at[:, None], 1), np.ones(3, int), cache)
        expected = full[np.arange(3), at]
        np.testing.assert_allclose(logits[:, 0], expected, rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [8, 12, 10]


def naive_greedy(run, params, samples, new_tokens, text):
    """Answers by running the whole sequence again for every token."""
    answers = [[] for _ in samples]
    for _ in range(new_tokens):
        batch = stack([pad(sample, 5, text) for sample in samples])
        logits = run(params, batch)
        for row, sample in enumerate(samples):
            token = int(np.argmax(logits[row, sample.length]))
            answers[row].append(token)
            tokens = np.append(sample.tokens, np.int32(token))
            mask = np.zeros(len(tokens), bool)
            samples[row] = sample._replace(tokens=tokens, loss_mask=mask, length=np.int32(len(tokens)))
    return answers


def test_greedy_answers_equal_a_naive_loop():
    model = model_of(tiny_config())
    rng = np.random.default_rng(5)
    samples = [
        make_sample(rng, 3, 4, 3),
        make_sample(rng, 5, 6, 2, at_end=True)._replace(visual_position=np.int32(6)),
        make_sample(rng, 0, 2, 1),
        make_sample(rng, 1, 3, 8),
    ]
    prompts = stack([pad(sample, 5, 6) for sample in samples])
    params = random_params(model, prompts)
    # Sharper preferences, and different ones for different rows.
    params["language"]["head"]["kernel"] *= 5.0
    run = jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits)
    expected = naive_greedy(run, params, list(samples), 5, text=12)
    assert len({tuple(answer) for answer in expected}) == 4, "the case is too easy"

    greedy = make_greedy(model, 5, eos_id=-1)
    np.testing.assert_array_equal(greedy(params, prompts).tokens, expected)
    # From its first end token on, an answer holds nothing else.
    eos = expected[0][1]
    ended = [answer[: answer.index(eos)] + [eos] * (5 - answer.index(eos)) if eos in answer else answer
             for answer in expected]  # fmt: skip
    np.testing.assert_array_equal(make_greedy(model, 5, eos_id=eos)(params, prompts).tokens, ended)
    one = make_greedy(model, 1, eos_id=eos)(params, prompts).tokens
    np.testing.assert_array_equal(one, np.array(expected)[:, :1])


def test_logits_are_those_of_the_text_alone_without_frames():
    """A text-only sample in the whole model is the language model on its tokens."""
    config = tiny_config()
    model = model_of(config)
    rng = np.random.default_rng(6)
    batch = stack([pad(make_sample(rng, 0, 7, 3), 5, 9), pad(make_sample(rng, 5, 7, 3), 5, 9)])
    params = random_params(model, batch)
    logits = model.apply({"params": params}, batch).logits
    language = config.model.language
    expected = numpy_llama(params["language"], batch.tokens[0, :7], language.heads, language.kv_heads)
    np.testing.assert_allclose(logits[0, 1:7], expected[:6], rtol=1e-4, atol=1e-5)
    losses = forward(model, False)(params, batch)[1]
    log_probability = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    by_hand = -sum(log_probability[i - 1, batch.tokens[0, i]] for i in range(3, 7))
    np.testing.assert_allclose(losses[0], by_hand, rtol=1e-5)
