"""The text encoder: dependencies of its queries, gradients, rematerialization."""

import jax
import jax.numpy as jnp
import numpy as np

from dynfocus_jax import trees
from dynfocus_jax.models.qformer import QFormer
from dynfocus_jax.planning.flops import count_flops
from tests.tiny import perturb


def make_qformer(**changes):
    sizes = {"vocab_size": 15, "max_text": 9, "num_queries": 3, "width": 8, "depth": 3, "heads": 2}
    model = QFormer(**(sizes | {"mlp_dim": 10, "cross_every": 2, "output_width": 5} | changes))
    tokens, lengths = jnp.zeros((1, 4), jnp.int32), jnp.array([4])
    init = jax.jit(lambda key: model.init(key, tokens, lengths, jnp.zeros((1, 2, 6, 7))))
    return model, {"params": perturb(init(jax.random.key(0))["params"])}


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 15, (2, 4)), jnp.asarray(rng.standard_normal((2, 3, 6, 7)), jnp.float32)


def test_padding_of_the_question_has_no_effect():
    model, variables = make_qformer()
    tokens, frames = inputs()
    lengths = np.array([4, 2])
    out = model.apply(variables, tokens, lengths, frames)
    assert out.shape == (2, 3, 3, 5)
    for filling in (0, 14):
        padded = np.full((2, 9), filling)
        padded[0, :4], padded[1, :2] = tokens[0], tokens[1, :2]
        np.testing.assert_allclose(model.apply(variables, padded, lengths, frames), out, rtol=1e-6, atol=1e-6)
    alone = model.apply(variables, tokens[1:, :2], lengths[1:], frames[1:])
    np.testing.assert_allclose(alone[0], out[1], rtol=1e-6, atol=1e-6)


def test_queries_depend_on_their_frame_and_question_only():
    model, variables = make_qformer()
    tokens, frames = inputs()
    lengths = np.array([4, 2])

    def of_one(frames):
        return jnp.sin(model.apply(variables, tokens, lengths, frames)[1, 2]).sum()

    gradient = np.abs(jax.grad(of_one)(frames)).max((-1, -2))
    assert gradient[1, 2] > 1e-3
    assert np.count_nonzero(gradient) == 1

    out = np.asarray(model.apply(variables, tokens, lengths, frames))
    other = tokens.copy()
    other[0, 3] = (other[0, 3] + 1) % 15
    changed = np.abs(np.asarray(model.apply(variables, other, lengths, frames)) - out).max((-1, -2))
    assert (changed[0] > 1e-4).all()
    assert not changed[1].any()
    swapped = tokens.copy()
    swapped[0, :2] = tokens[0, 1::-1]
    assert np.abs(np.asarray(model.apply(variables, swapped, lengths, frames)) - out)[0].max() > 1e-4


def test_all_parameters_but_the_last_text_feed_forward_have_gradients():
    model, variables = make_qformer()
    tokens, frames = inputs()

    def loss(variables):
        return jnp.sin(model.apply(variables, tokens, np.array([4, 2]), frames)).sum()

    gradients = trees.flatten(jax.grad(loss)(variables)["params"])
    zero = {path for path, gradient in gradients.items() if np.abs(gradient).max() < 1e-9}
    # The text output of the last block is unused; a key's bias shifts all logits of a query equally.
    unused = {path for path in gradients if path.startswith("blocks_2/text_mlp")}
    assert unused
    assert zero >= unused
    assert all(path.endswith("key/bias") for path in zero - unused)
    cross = {path.split("/")[0] for path in gradients if "cross_attention" in path}
    assert cross == {"blocks_0", "blocks_2"}


def test_remat_recomputes_and_keeps_gradients():
    tokens, frames = inputs()

    def gradient_of(model):
        def loss(variables):
            return jnp.sin(model.apply(variables, tokens, np.array([4, 2]), frames)).sum()

        return jax.jit(jax.grad(loss))

    kept, variables = make_qformer()
    recomputed, _ = make_qformer(remat="full")
    gradient, again = gradient_of(kept), gradient_of(recomputed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        gradient(variables),
        again(variables),
    )
    work, more = (count_flops(each.trace(variables).jaxpr.jaxpr) for each in (gradient, again))
    assert more > 1.2 * work
