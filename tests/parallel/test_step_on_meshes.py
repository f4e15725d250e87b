"""The train step on eight devices, in microbatches and in loss chunks: equal to one device and one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynfocus_jax import trees
from dynfocus_jax.parallel.sharding import place_like, to_devices
from dynfocus_jax.parameters import init_params, param_shapes
from dynfocus_jax.training.optimizer import make_optimizer, make_schedule
from dynfocus_jax.training.state import TrainState, abstract_state, state_shardings
from dynfocus_jax.training.step import make_train_step
from dynfocus_jax.video_language_model import build_model
from tests.tiny import make_sample, mesh_of, pad, perturb, stack, tiny_config

FRAMES, TEXT, ROWS = 7, 13, 16  # more frames than prototypes; 4 devices do not divide text and sequence
MESHES = (
    {"data": 8},
    {"fsdp": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "context": 4},
)
KEY = 5  # of the selection: with others, a gradient of the score net is rounding in the first step only
# This bias shifts all scores, which their normalisation cancels: its gradient is 0, and computed as rounding.
SHIFT = "connector/dpe/score_net/out_dense_2/bias"


def toy(**changes):
    """Return the tiny configuration, with two layers and a number of heads that two devices can split."""
    config = tiny_config()
    config.model.language.update({"depth": 2, "kv_heads": 2})
    config.model.vision.depth = 2
    config.model.text_encoder.depth = 1
    config.stages[-1].update({"random_steps": 0, "warmup": 0.0, "learning_rate": 1e-3} | changes)
    return config


@pytest.fixture(scope="module")
def batch():
    """A batch of videos, an image, a text-only sample and a padding row."""
    rng = np.random.default_rng(0)
    samples = [make_sample(rng, FRAMES, TEXT - row, 1 + row, at_end=row % 2 == 0) for row in range(6)]
    samples += [make_sample(rng, 1, 9, 2), make_sample(rng, 0, 6, 3)]
    nothing = make_sample(rng, 0, 1, 1)._replace(loss_mask=np.zeros(1, bool))
    samples += [nothing, *(make_sample(rng, 3 + row % 4, 4 + row, 2) for row in range(ROWS - 9))]
    return stack([pad(sample, FRAMES, TEXT) for sample in samples])


@pytest.fixture(scope="module")
def params():
    """Host parameters, {path: leaf}."""
    shapes = param_shapes(toy(), -1)
    rng = np.random.default_rng(1)
    start = {path: jnp.asarray(0.2 * rng.standard_normal(s.shape), s.dtype) for path, s in shapes.items()}
    return jax.device_get(trees.flatten(perturb(trees.unflatten(start))))


def train(config, mesh, params, batch, steps=2):
    """Train some steps on a batch; return the state and the metrics of each step."""
    stage = config.stages[-1]
    abstract = abstract_state(config, -1, mesh)
    optimizer = make_optimizer(stage, abstract.trained)

    def placed(tree):
        return trees.unflatten(
            {path: place_like(params[path], like) for path, like in trees.flatten(tree).items()}
        )

    trained, shardings = placed(abstract.trained), state_shardings(abstract)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trained)
    step_number = place_like(np.zeros((), np.int32), abstract.step)
    state = TrainState(step_number, trained, placed(abstract.frozen), opt_state)
    model = build_model(config)
    step = make_train_step(model, optimizer, make_schedule(stage), stage, jax.random.key(KEY), shardings)
    metrics = []
    for _ in range(steps):
        state, values = step(state, to_devices(batch, mesh))
        metrics.append(jax.device_get(values))
    return state, metrics


@pytest.fixture(scope="module")
def alone(params, batch):
    """State and metrics of training on one device."""
    return jax.device_get(train(toy(), mesh_of(), params, batch))


def assert_same(result, expected):
    (state, metrics), (expected_state, expected_metrics) = result, expected
    for values, wanted in zip(metrics, expected_metrics, strict=True):
        for name in wanted:
            np.testing.assert_allclose(values[name], wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)
    # Adam's first moment, which stands for the gradient, and the updated parameters
    moments, wanted = trees.flatten(state.opt_state[1][0].mu), expected_state.opt_state[1][0].mu
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    trained, compared, elements = trees.flatten(expected_state.trained), 0, 0
    for path, leaf in trees.flatten(wanted).items():
        exact = np.zeros_like(leaf) if path == SHIFT else leaf
        np.testing.assert_allclose(moments[path], exact, atol=1e-5 * scale, err_msg=path)
        # Adam divides by the size of the gradient: if that is only rounding error, so is the update.
        is_reliable = (np.abs(leaf) > 1e-5 * scale) | (leaf == 0)
        found = np.asarray(trees.flatten(state.trained)[path])
        np.testing.assert_allclose(found[is_reliable], trained[path][is_reliable], atol=1e-5, err_msg=path)
        compared, elements = compared + is_reliable.sum(), elements + is_reliable.size
    assert compared > 0.8 * elements
    for path, leaf in trees.flatten(expected_state.frozen).items():
        np.testing.assert_array_equal(trees.flatten(state.frozen)[path], leaf, err_msg=path)


def test_the_step_is_a_meaningful_reference(alone, params):
    """The loss falls, all parameters have a gradient, and the learned selection takes part."""
    state, metrics = alone
    assert metrics[1]["loss"] < metrics[0]["loss"]
    moments = trees.flatten(state.opt_state[1][0].mu)
    without = {path for path, leaf in moments.items() if not np.abs(leaf).max() > 0}
    assert all("/text_mlp" in path for path in without)  # of the last layer, whose output is not used
    assert any(path.startswith("connector/dpe/score_net") for path in moments)
    moved = {path: np.abs(params[path] - leaf).max() for path, leaf in trees.flatten(state.trained).items()}
    assert max(moved.values()) > 1e-4


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_on_eight_devices(axes, alone, params, batch):
    mesh = mesh_of(**axes)
    assert mesh.size == 8
    state, metrics = train(toy(), mesh, params, batch)
    assert_same((state, metrics), alone)
    # No device holds more than its shard.
    shards = axes.get("fsdp", 1) * axes.get("tensor", 1)
    kernel = trees.flatten(state.trained)["language/blocks/gate/kernel"]
    moment = trees.flatten(state.opt_state[1][0].nu)["language/blocks/gate/kernel"]
    frozen = trees.flatten(state.frozen)["vision/blocks/mlp/up/kernel"]
    for leaf in (kernel, moment, frozen):
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // shards}


@pytest.mark.parametrize(
    "changes",
    [{"microbatches": 4}, {"loss_chunk": 5}, {"loss_chunk": 1, "microbatches": 16}, {"loss_chunk": 20}],
    ids=str,
)
def test_microbatches_and_loss_chunks(changes, alone, params, batch):
    assert_same(train(toy(**changes), mesh_of(), params, batch), alone)


def test_microbatches_and_loss_chunks_on_eight_devices(alone, params, batch):
    config = toy(microbatches=4, loss_chunk=6)
    config.model.language.remat = "full"
    assert_same(train(config, mesh_of(fsdp=2, tensor=2, context=2), params, batch), alone)


def test_parameters_are_initialised_on_the_mesh():
    """They equal those of one device, bit for bit; in bfloat16 they are rounded."""
    config, mesh = toy(), mesh_of(fsdp=4, tensor=2)
    model = build_model(config)

    def initialise(mesh):
        state = abstract_state(config, -1, mesh)
        wanted = trees.flatten(trees.merge(state.trained, state.frozen))
        return init_params(model, jax.random.key(5), wanted)

    many, one = initialise(mesh), initialise(mesh_of())
    for path, leaf in one.items():
        np.testing.assert_array_equal(many[path], leaf, err_msg=path)
    assert len(many["language/head/kernel"].addressable_shards[0].data) == 6  # of 24
    config.model.dtype = "bfloat16"
    assert initialise(mesh)["vision/position"].dtype == jnp.float32  # an earlier stage trains it
    config.stages = config.stages[-1:]
    rounded = initialise(mesh)
    assert rounded["vision/position"].dtype == jnp.bfloat16
    assert rounded["language/head/kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(rounded["vision/position"], one["vision/position"].astype(jnp.bfloat16))
