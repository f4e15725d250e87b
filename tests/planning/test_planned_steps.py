"""Planned steps are the programs that training and evaluation run, with the same arguments."""

import jax
import numpy as np
import pytest

from dynfocus_jax import trees
from dynfocus_jax.parallel.sharding import to_devices
from dynfocus_jax.planning.flops import count_flops
from dynfocus_jax.planning.planned_steps import planned_serving_steps, planned_train_step
from dynfocus_jax.planning.step_report import device_bytes
from dynfocus_jax.serving.engine import Engine
from dynfocus_jax.text.tokenizers import WordTokenizer
from tests.tiny import make_sample, mesh_of, model_of, pad, random_params, stack, tiny_config

MAX_TEXT, FRAMES, NEW = 24, 6, 4


@pytest.fixture(scope="module")
def config():
    config = tiny_config()
    config.stages = config.stages[-1:]
    config.stages[0].update({"num_frames": FRAMES, "max_text": MAX_TEXT})
    config.evaluation.update(
        {"media_frames": FRAMES, "max_text": MAX_TEXT, "max_new_tokens": NEW, "batch_size": 3}
    )
    return config


def test_arguments_of_a_train_step(config):
    step = planned_train_step(config, 0, mesh_of(fsdp=2))
    held = {name: device_bytes(tree) for name, tree in step.held.items()}
    state, batch = step.arguments
    trained, frozen = trees.flatten(state.trained), trees.flatten(state.frozen)
    assert any(path.startswith("vision/") for path in frozen)
    # Adam's two moments of the trained parameters, three counters: Adam's, the schedule's and the step.
    assert held["optimizer"] == 2 * held["trained parameters"] + 3 * 4
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    assert not [path for path, _ in moments if "['vision']" in jax.tree_util.keystr(path)]
    # Kernels are split over two devices, biases and norms are replicated.
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in trained.values())
    assert whole / 2 < held["trained parameters"] < 0.7 * whole
    assert held["batch"] == sum(leaf.size * leaf.dtype.itemsize for leaf in batch) / 2
    # The compiler agrees; it leaves out arguments that the step does not use.
    compiled = step.function.lower(*step.arguments).compile()
    unused = sum(device_bytes(getattr(batch, name)) for name in ("oracle_frames", "index"))
    assert compiled.memory_analysis().argument_size_in_bytes == sum(held.values()) - unused


def test_the_step_without_recomputation(config):
    def flops(function):
        return count_flops(function.trace(*step.arguments).jaxpr.jaxpr)

    step = planned_train_step(config, 0, mesh_of(fsdp=2))
    expected = flops(step.function)
    frugal = config.copy_and_resolve_references()
    frugal.stages = (frugal.stages[0].copy_and_resolve_references(),)
    frugal.stages[0].loss_chunk = 8
    frugal.model.language.remat = "full"
    step = planned_train_step(frugal, 0, mesh_of(fsdp=2))
    assert flops(step.without_recomputation) == expected
    assert flops(step.function) > expected  # the configuration itself is unchanged


def test_tokens_of_a_step(config):
    step = planned_train_step(config, 0, mesh_of(fsdp=2))
    selected, levels, pool = (
        config.model.connector.dpe.num_selected,
        config.model.connector.cce.levels,
        config.model.connector.pool,
    )
    cone = int(np.prod(pool)) + sum(count for count, _ in levels)
    visual = 2 * (FRAMES - selected) + cone * selected
    assert step.rows == config.stages[0].batch_size
    assert step.tokens == step.rows * (MAX_TEXT + visual)


def test_serving_steps_are_those_of_evaluation(config):
    """On two devices, the engine answers a batch with these programs and arguments of these shapes."""
    mesh = mesh_of(data=2)
    prefill, decode = planned_serving_steps(config, mesh)
    assert prefill.rows == decode.rows == decode.tokens == 4  # three, rounded up to a multiple of two devices
    rng = np.random.default_rng(0)
    batch = stack([pad(make_sample(rng, FRAMES - i, 9 + i, 5), FRAMES, MAX_TEXT) for i in range(4)])
    params = random_params(model_of(config), batch)
    engine = Engine(config, params, WordTokenizer(["w"], strict=False), mesh)
    programs, run = engine._programs, {}

    def recorded(name, function):
        def call(*arguments):
            run[name] = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), arguments)
            return function(*arguments)

        return call

    engine._programs = programs._replace(
        encode_and_prefill=recorded("prefill", programs.encode_and_prefill),
        decode=recorded("decode", programs.decode),
    )
    engine.answer_batch(to_devices(batch, mesh), NEW)
    for step in (prefill, decode):
        planned = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), step.arguments)
        assert planned == run[step.name]
        held = sum(device_bytes(tree) for tree in step.held.values())
        assert held == sum(map(device_bytes, step.arguments))
