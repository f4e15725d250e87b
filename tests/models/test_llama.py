"""The language model, compared with a NumPy implementation, with and without a KV cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynfocus_jax.models.llama import Llama, rope_frequencies
from tests.tiny import (
    forward,
    make_sample,
    model_of,
    pad,
    perturb,
    random_params,
    stack,
    tiny_config,
    with_kind,
)

SIZES = {"vocab_size": 11, "width": 12, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp_dim": 20}


def make_llama(**changes):
    model = Llama(**(SIZES | changes))

    def compute_logits(module, tokens, lengths):
        hidden = module(module.embed(tokens), lengths)
        return module.logits(hidden)

    tokens = jnp.zeros((1, 3), jnp.int32)
    init = jax.jit(lambda key: model.init(key, tokens, jnp.array([3]), method=compute_logits))
    variables = {"params": perturb(init(jax.random.key(0))["params"])}
    return model, variables, jax.jit(lambda v, t, n: model.apply(v, t, n, method=compute_logits))


def rope_from_wavelengths(theta, size, scaling="none", factor=1.0, low=1.0, high=4.0, original=8192):
    """Return RoPE's radians per position from wavelengths, as in the code of Llama 3.1."""
    frequencies = []
    for pair in range(size // 2):
        frequency = theta ** (-2 * pair / size)
        wavelength = 2 * np.pi / frequency
        if scaling == "linear" or (scaling == "llama3" and wavelength > original / low):
            frequency /= factor
        elif scaling == "llama3" and wavelength > original / high:
            smooth = (original / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        frequencies.append(frequency)
    return np.array(frequencies)


def numpy_llama(params, tokens, heads, kv_heads, eps=1e-5, rope=(1e4,)):
    """Compute the logits of one unpadded sequence in float64, one head at a time, from the definition.

    rope: theta, then the arguments of `rope_from_wavelengths` after `size`.
    """
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, name, layer=None):
        scale = params[name]["scale"] if layer is None else params["blocks"][name]["scale"][layer]
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

    def project(x, name, layer, head):
        out = x @ blocks[name]["kernel"][layer][:, head]
        if "bias" in blocks[name]:
            out = out + blocks[name]["bias"][layer][head]
        return norm(out, f"{name}_norm", layer) if f"{name}_norm" in blocks else out

    def rotate(x):  # channels are paired as (i, i + h/2)
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None] * rope_from_wavelengths(rope[0], x.shape[-1], *rope[1:])
        rotated = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
        return np.concatenate([rotated.real, rotated.imag], axis=-1)

    x = params["embedding"]["embedding"][tokens]
    blocks = params["blocks"]
    visible = np.tril(np.ones((len(x), len(x)), bool))
    for layer in range(blocks["out"]["kernel"].shape[0]):
        weights = {name: blocks[name]["kernel"][layer] for name in blocks if "norm" not in name}
        y = norm(x, "attention_norm", layer)
        for head in range(heads):
            group = head * kv_heads // heads
            query = rotate(project(y, "query", layer, head))
            key, value = rotate(project(y, "key", layer, group)), project(y, "value", layer, group)
            logits = np.where(visible, query @ key.T / np.sqrt(query.shape[-1]), -np.inf)
            weights_of_keys = np.exp(logits - logits.max(-1, keepdims=True))
            weights_of_keys /= weights_of_keys.sum(-1, keepdims=True)
            x = x + weights_of_keys @ value @ weights["out"][head]
        y = norm(x, "mlp_norm", layer)
        gate = y @ weights["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ weights["up"])) @ weights["down"]
    head = params["head"]["kernel"] if "head" in params else params["embedding"]["embedding"].T
    return norm(x, "final_norm") @ head


QWEN2 = {"kv_heads": 4, "qkv_bias": True}
QWEN3 = {"head_dim": 10, "qk_norm": True, "eps": 1e-6}
LINEAR = {"rope_scaling": "linear", "rope_factor": 3.0}
# The frequencies of the three channel pairs of a head of 6: kept, interpolated, divided.
LLAMA3 = {
    "rope_scaling": "llama3",
    "rope_factor": 5.0,
    "rope_low_freq": 0.5,
    "rope_high_freq": 4.0,
    "rope_original_length": 100,
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": 4}, {"kv_heads": 1, "tied_embeddings": True}, QWEN2, QWEN3, LINEAR, LLAMA3],
    ids=str,
)
def test_against_numpy(changes):
    model, variables, run = make_llama(**changes)
    assert ("head" in variables["params"]) != model.tied_embeddings
    names = ("rope_scaling", "rope_factor", "rope_low_freq", "rope_high_freq", "rope_original_length")
    rope = (model.rope_theta, *(getattr(model, name) for name in names))
    tokens = np.random.default_rng(0).integers(0, 11, (3, 9))
    lengths = np.array([9, 4, 1])
    logits = run(variables, tokens, lengths)
    assert logits.dtype == jnp.float32
    for row, length in enumerate(lengths):
        arguments = (variables["params"], tokens[row, :length], model.heads, model.kv_heads)
        expected = numpy_llama(*arguments, model.eps, rope)
        np.testing.assert_allclose(logits[row, :length], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", ["none", "linear", "llama3"])
@pytest.mark.parametrize(
    ("size", "theta", "rest"),
    [(128, 5e5, (8.0, 1.0, 4.0, 8192)), (64, 5e5, (32.0, 1.0, 4.0, 8192)), (18, 1e4, (7.0, 0.5, 3.0, 60))],
)
def test_rope_frequencies(size, theta, rest, scaling):
    """Cases include the settings of Llama 3.1 and 3.2."""
    frequencies = rope_frequencies(size, theta, scaling, *rest)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, rope_from_wavelengths(theta, size, scaling, *rest), rtol=2e-6)


def test_causality():
    _, variables, run = make_llama()
    tokens = np.random.default_rng(1).integers(0, 11, (1, 9))
    other = tokens.copy()
    other[0, 5] = (other[0, 5] + 1) % 11
    one, two = (np.asarray(run(variables, x, np.array([9])))[0] for x in (tokens, other))
    np.testing.assert_array_equal(one[:5], two[:5])
    assert (np.abs(one[5:] - two[5:]).max(-1) > 1e-4).all()


def test_remat_keeps_gradients():
    _, variables, run = make_llama()
    _, _, rerun = make_llama(remat="full")
    tokens, lengths = np.random.default_rng(2).integers(0, 11, (2, 6)), np.array([6, 3])

    def gradient(run):
        return jax.grad(lambda v: jnp.square(run(v, tokens, lengths)[:, :3]).sum())(variables)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient(run), gradient(rerun)
    )


@pytest.mark.parametrize("changes", [{}, QWEN3 | LLAMA3], ids=["llama", "qwen3"])
def test_prefill_equals_the_full_forward(changes):
    """Logits are bitwise equal. The cache equals one that `extend` has filled from empty."""
    model, variables, run = make_llama(**changes)
    tokens, lengths = np.random.default_rng(4).integers(0, 11, (3, 7)), np.array([7, 3, 1])

    @jax.jit
    def prefill(variables):
        def call(module):
            hidden, cache = module.prefill(module.embed(tokens), lengths)
            return module.logits(hidden), cache

        return model.apply(variables, method=call)

    @jax.jit
    def extend(variables, cache):
        return model.apply(
            variables, method=lambda module: module.extend(module.embed(tokens), lengths, cache)
        )

    logits, cache = prefill(variables)
    np.testing.assert_array_equal(logits, run(variables, tokens, lengths))
    _, filled = extend(variables, model.empty_cache(3, 7))
    assert cache.lengths.tolist() == filled.lengths.tolist() == lengths.tolist()
    for row, length in enumerate(lengths):
        for one, other in ((cache.keys, filled.keys), (cache.values, filled.values)):
            assert one.shape == other.shape == (2, 3, 2, 7, model.head_dim)
            np.testing.assert_allclose(
                one[:, row, :, :length], other[:, row, :, :length], rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("changes", [{}, QWEN3 | LLAMA3], ids=["llama", "qwen3"])
def test_cache_in_padded_chunks_equals_the_full_forward(changes):
    """Chunks have different sizes; in each, rows have different numbers of valid tokens, or none.

    The cache holds exactly the 13 valid tokens, so the padding of the last chunks lies beyond its end.
    """
    model, variables, run = make_llama(**changes)
    tokens = np.random.default_rng(3).integers(0, 11, (3, 13))
    full = np.asarray(run(variables, tokens, np.full(3, 13)))

    @jax.jit
    def step(variables, tokens, lengths, cache):
        def call(module):
            hidden, extended = module.extend(module.embed(tokens), lengths, cache)
            return module.logits(hidden), extended

        return model.apply(variables, method=call)

    cache, done = model.empty_cache(3, 13), np.zeros(3, int)
    chunks = [(5, (3, 5, 0)), (1, (1, 1, 1)), (7, (2, 4, 7)), (1, (1, 0, 1)), (5, (5, 3, 4)), (1, (1, 0, 0))]
    for size, valid in chunks:
        chunk = np.full((3, size), 9)  # padding holds an arbitrary token
        for row, count in enumerate(valid):
            chunk[row, :count] = tokens[row, done[row] : done[row] + count]
        logits, cache = step(variables, chunk, np.array(valid), cache)
        for row, count in enumerate(valid):
            expected = full[row, done[row] : done[row] + count]
            np.testing.assert_allclose(logits[row, :count], expected, rtol=1e-5, atol=1e-5)
        done += valid
        assert cache.lengths.tolist() == done.tolist()
    assert done.tolist() == [13, 13, 13]


def test_text_only_sample_equals_the_language_model():
    """Logits and loss of a sample without frames are those of the language model on its tokens."""
    config = tiny_config()
    config.stages[-1].connector = with_kind(config, "pooled")  # compiles faster
    model = model_of(config)
    rng = np.random.default_rng(6)
    batch = stack([pad(make_sample(rng, 0, 7, 3), 5, 9), pad(make_sample(rng, 5, 7, 3), 5, 9)])
    params = random_params(model, batch)
    logits = jax.jit(lambda params: model.apply({"params": params}, batch).logits)(params)
    language = config.model.language
    expected = numpy_llama(params["language"], batch.tokens[0, :7], language.heads, language.kv_heads)
    np.testing.assert_allclose(logits[0, 1:7], expected[:6], rtol=1e-4, atol=1e-5)
    losses = forward(model, False)(params, batch)[1]
    log_probability = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    by_hand = -sum(log_probability[i - 1, batch.tokens[0, i]] for i in range(3, 7))
    np.testing.assert_allclose(losses[0], by_hand, rtol=1e-5)
