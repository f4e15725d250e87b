"""Schedules, learning rate factors, and the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynfocus_jax.batch import padding_sample
from dynfocus_jax.config import stage
from dynfocus_jax.errors import UserError
from dynfocus_jax.training.losses import answer_loss, chunked_answer_loss
from dynfocus_jax.training.optimizer import make_optimizer, make_schedule

BASE = {"name": "s", "annotations": "a.json", "steps": 100, "trainable": (".*",), "learning_rate": 0.4}


def test_cosine_schedule():
    rate = make_schedule(stage(**BASE, warmup=0.2))
    expected = {
        0: 0.0,
        5: 0.1,
        10: 0.2,
        20: 0.4,
        40: 0.2 * (1 + np.cos(np.pi / 4)),
        60: 0.2,
        100: 0.0,
    }
    np.testing.assert_allclose([rate(step) for step in expected], list(expected.values()), atol=1e-7)


def test_linear_tail_schedule():
    rate = make_schedule(stage(**BASE, warmup=0.1, schedule="linear_tail"))
    expected = {0: 0.0, 5: 0.2, 10: 0.4, 74: 0.4, 75: 0.4, 80: 0.32, 99: 0.016, 100: 0.0}
    np.testing.assert_allclose([rate(step) for step in expected], list(expected.values()), atol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear_tail"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (2, 0.03), (10, 0.95)])
def test_short_schedules(kind, steps, warmup):
    rate = make_schedule(stage(**BASE | {"steps": steps}, warmup=warmup, schedule=kind))
    values = np.array([rate(step) for step in range(steps + 1)])
    assert np.isfinite(values).all()
    assert values.min() >= 0
    assert values.max() <= 0.4 + 1e-6


def one_update(**fields):
    params = {"a": {"w": jnp.array([1.0, -2.0])}, "b": {"w": jnp.array([3.0])}}
    gradients = {"a": {"w": jnp.array([3e-3, -1e-3])}, "b": {"w": jnp.array([2e-3])}}
    optimizer = make_optimizer(stage(**BASE | {"warmup": 0.0} | fields), params)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    return jax.device_get(updates)


def test_adamw_first_step():
    """The first step of Adam is the sign of the gradient; weight decay adds a fraction of the parameter."""
    updates = one_update(weight_decay=0.1)
    np.testing.assert_allclose(
        updates["a"]["w"], -0.4 * (np.sign([3, -1]) + 0.1 * np.array([1, -2])), rtol=1e-4
    )
    np.testing.assert_allclose(updates["b"]["w"], [-0.4 * (1 + 0.1 * 3)], rtol=1e-4)


def test_lr_scale():
    plain, scaled = one_update(), one_update(lr_scale=(("b/.*", 3.0), ("a/w", 0.0)))
    np.testing.assert_allclose(scaled["b"]["w"], 3.0 * plain["b"]["w"], rtol=1e-6)
    assert plain["b"]["w"].all()
    assert not scaled["a"]["w"].any()


def test_lr_scale_that_matches_nothing():
    with pytest.raises(UserError, match=r"lr_scale.*'c/\.\*'"):
        one_update(lr_scale=(("c/.*", 3.0),))


def test_loss_counts_answer_tokens_only():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 5, 7)).astype(np.float32)
    rows = [padding_sample(1, 4, 5, 2) for _ in range(3)]
    for row in rows[:2]:
        row.tokens[:] = rng.integers(0, 7, 5)
    rows[0].loss_mask[2:4] = True
    rows[1].loss_mask[4:] = True
    batch = jax.tree.map(lambda *x: np.stack(x), *rows)
    losses, counts = answer_loss(jnp.asarray(logits), batch)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    by_hand = [
        -log_probability[0, [2, 3], batch.tokens[0, 2:4]].sum(),
        -log_probability[1, 4, batch.tokens[1, 4]],
        0,
    ]
    np.testing.assert_allclose(losses, by_hand, rtol=1e-5)
    assert counts.tolist() == [2, 1, 0]


# --- The loss in chunks -------------------------------------------------------------------------------

ROWS, TEXT, WIDTH, WORDS = 3, 7, 4, 11


@pytest.fixture(scope="module")
def chunked():
    """The loss as a function (hidden, head, chunk), a batch with and without answers, hidden, and head."""
    rng = np.random.default_rng(1)
    rows = [padding_sample(1, 4, TEXT, 2) for _ in range(ROWS)]
    for row in rows[:2]:
        row.tokens[:] = rng.integers(0, WORDS, TEXT)
        row.loss_mask[:] = rng.random(TEXT) < 0.6
    batch = jax.tree.map(lambda *x: np.stack(x), *rows)
    hidden, head = rng.standard_normal((ROWS, TEXT, WIDTH)), rng.standard_normal((WIDTH, WORDS))

    def losses(hidden, head, chunk):
        return chunked_answer_loss(hidden, lambda part: part @ head, batch, chunk)

    return losses, batch, jnp.float32(hidden), jnp.float32(head)


@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 7, 9])
def test_chunks_do_not_change_the_loss(chunked, chunk):
    losses, batch, hidden, head = chunked
    found, expected = losses(hidden, head, chunk), answer_loss(hidden @ head, batch)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[1].tolist() == batch.loss_mask.sum(1).tolist()

    def gradient(function):
        return jax.grad(lambda *arguments: function(*arguments)[0].sum(), (0, 1))(hidden, head)

    wanted = gradient(lambda hidden, head: answer_loss(hidden @ head, batch))
    for one, other in zip(gradient(lambda *x: losses(*x, chunk)), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def logits_held(jaxpr) -> int:
    """Return the size of the largest array of logits in a program and in those within it."""
    shapes = [var.aval.shape for equation in jaxpr.eqns for var in equation.outvars]
    held = [int(np.prod(shape)) for shape in shapes if WORDS in shape and WIDTH not in shape]
    parts = [part for equation in jaxpr.eqns for part in jax.tree.leaves(list(equation.params.values()))]
    inner = [
        getattr(part, "jaxpr", part) for part in parts if hasattr(part, "eqns") or hasattr(part, "jaxpr")
    ]
    return max([0, *held, *map(logits_held, inner)])


@pytest.mark.parametrize(("chunk", "held"), [(0, TEXT), (1, 1), (2, 2), (3, 3)])
def test_only_the_logits_of_a_chunk_are_in_memory(chunked, chunk, held):
    """In the forward and the backward pass."""
    losses, _, hidden, head = chunked
    gradient = jax.grad(lambda hidden, head: losses(hidden, head, chunk)[0].sum(), (0, 1))
    assert logits_held(jax.make_jaxpr(gradient)(hidden, head).jaxpr) == ROWS * held * WORDS
