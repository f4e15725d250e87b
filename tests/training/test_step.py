"""The train step: one program for every kind of batch; padding rows have no weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynfocus_jax import trees
from dynfocus_jax.parallel.sharding import replicated, to_devices
from dynfocus_jax.training import optimizer as optimizer_lib
from dynfocus_jax.training.state import TrainState, state_shardings
from dynfocus_jax.training.step import make_train_step
from tests.tiny import forward, make_sample, mesh_of, model_of, pad, random_params, stack, tiny_config

BUCKET = (7, 12)  # frames, text


@pytest.fixture(scope="module")
def step_and_state():
    config = tiny_config()
    model, stage, mesh = model_of(config), config.stages[-1], mesh_of()
    params = random_params(model, stack([pad(make_sample(np.random.default_rng(0), 1, 4, 3), *BUCKET)]))
    trained, frozen = trees.split(params, lambda path: not path.startswith("vision/"))
    optimizer = optimizer_lib.make_optimizer(stage, trained)

    def state():  # a new one each time, as the step donates it
        new = TrainState(jnp.int32(0), trained, frozen, optimizer.init(trained))
        return jax.device_put(jax.tree.map(jnp.array, new), replicated(mesh))

    shardings = state_shardings(state())
    step = make_train_step(model, optimizer, lambda step: 0.0, stage, jax.random.key(1), shardings)

    def run(samples, step_number=0):
        batch = to_devices(stack([pad(sample, *BUCKET) for sample in samples]), mesh)
        new, metrics = step(state()._replace(step=jnp.int32(step_number)), batch)
        return jax.device_get(new), jax.device_get(metrics)

    return step, run, model, params


def padding_row():
    return make_sample(np.random.default_rng(0), 0, 1, 1)._replace(
        tokens=np.zeros(1, np.int32),
        loss_mask=np.zeros(1, bool),
        visual_position=np.int32(0),
        index=np.int32(-1),
    )


def test_one_program_serves_every_kind_of_batch(step_and_state):
    step, run, _, _ = step_and_state
    rng = np.random.default_rng(1)
    video = [make_sample(rng, 7, 12, 4), make_sample(rng, 3, 5, 1)]
    image, text = [make_sample(rng, 1, 8, 2)] * 2, [make_sample(rng, 0, 6, 3)] * 2
    for batch in (video, image, text, [video[0], text[0]], [image[0], padding_row()]):
        for number in (0, 3):  # random, then learned selection
            new, metrics = run(batch, number)
            assert np.isfinite(metrics["loss"])
            assert metrics["loss"] > 0.1
            assert new.step == number + 1
            assert metrics["frames"] == sum(len(sample.frames) for sample in batch)
    assert step._cache_size() == 1


def test_padding_rows_have_no_weight(step_and_state):
    """At most two frames, both kept: nothing is random, so the loss can be computed by hand."""
    _, run, model, params = step_and_state
    rng = np.random.default_rng(2)
    one, two = make_sample(rng, 2, 9, 4), make_sample(rng, 1, 5, 2)
    _, full = run([one, two])
    batch = stack([pad(sample, *BUCKET) for sample in (one, two)])
    losses = forward(model, True)(params, batch)[1]
    np.testing.assert_allclose(full["loss"], losses.sum() / batch.loss_mask.sum(), rtol=1e-5)
    new, padded = run([one, padding_row()])
    np.testing.assert_allclose(padded["loss"], losses[0] / one.loss_mask.sum(), rtol=1e-5)
    twice, _ = run([one, one])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), new.trained, twice.trained
    )


def test_a_batch_of_padding_has_no_loss_and_no_gradient(step_and_state):
    _, run, _, _ = step_and_state
    new, metrics = run([padding_row(), padding_row()])
    assert metrics["loss"] == 0
    assert metrics["grad_norm"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


def test_state_is_float32_and_frozen_leaves_have_no_moments(step_and_state):
    _, run, _, params = step_and_state
    new, _ = run([make_sample(np.random.default_rng(3), 2, 5, 2)] * 2)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(new.trained))
    trained = sum(leaf.size for leaf in jax.tree.leaves(new.trained))
    moments = sum(leaf.size for leaf in jax.tree.leaves(new.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(new.trained) if leaf.ndim)
    assert trained + sum(leaf.size for leaf in jax.tree.leaves(new.frozen)) == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )
