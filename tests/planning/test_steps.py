"""The planned programs are those that training and evaluation run, and hold what they hold."""

import jax
import numpy as np
import pytest

from dynfocus_jax import trees
from dynfocus_jax.parallel.sharding import to_devices
from dynfocus_jax.planning.flops import count_flops
from dynfocus_jax.planning.step_report import device_bytes
from dynfocus_jax.planning.steps import serving_steps, train_step
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


def test_what_a_train_step_holds(config):
    step = train_step(config, 0, mesh_of(fsdp=2))
    held = {name: device_bytes(tree) for name, tree in step.held.items()}
    state, batch = step.arguments
    trained, frozen = trees.flatten(state.trained), trees.flatten(state.frozen)
    assert any(path.startswith("vision/") for path in frozen)
    # Adam's two moments of the trained parameters alone, its and the schedule's counters and the step.
    assert held["optimizer"] == 2 * held["trained parameters"] + 3 * 4
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    assert not [path for path, _ in moments if "['vision']" in jax.tree_util.keystr(path)]
    # Kernels are shared by two, biases and norms are not.
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in trained.values())
    assert whole / 2 < held["trained parameters"] < 0.7 * whole
    assert held["batch"] == sum(leaf.size * leaf.dtype.itemsize for leaf in batch) / 2
    # As the compiler has it: arguments that the step makes no use of are left out of its program.
    compiled = step.function.lower(*step.arguments).compile()
    unused = sum(device_bytes(getattr(batch, name)) for name in ("oracle_frames", "index"))
    assert compiled.memory_analysis().argument_size_in_bytes == sum(held.values()) - unused


def test_the_plain_step_computes_nothing_twice(config):
    def flops(function):
        return count_flops(function.trace(*step.arguments).jaxpr.jaxpr)

    step = train_step(config, 0, mesh_of(fsdp=2))
    expected = flops(step.function)
    frugal = config.copy_and_resolve_references()
    frugal.stages = (frugal.stages[0].copy_and_resolve_references(),)
    frugal.stages[0].loss_chunk = 8
    frugal.model.language.remat = "full"
    step = train_step(frugal, 0, mesh_of(fsdp=2))
    assert flops(step.plain) == expected
    assert flops(step.function) > expected  # the plain one has changed nothing of the configuration


def test_tokens_of_a_step(config):
    step = train_step(config, 0, mesh_of(fsdp=2))
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
    """On two devices: what the engine runs to answer a batch, compiled for the same shapes."""
    mesh = mesh_of(data=2)
    prefill, decode = serving_steps(config, mesh)
    assert prefill.rows == decode.rows == decode.tokens == 4  # three, rounded up to what two devices share
    rng = np.random.default_rng(0)
    batch = stack([pad(make_sample(rng, FRAMES - i, 9 + i, 5), FRAMES, MAX_TEXT) for i in range(4)])
    params = random_params(model_of(config), batch)
    engine = Engine(config, params, WordTokenizer(["w"], strict=False), mesh)
    run = {}

    def recorded(name):
        def call(*arguments):
            run[name] = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), arguments)
            return getattr(programs, name)(*arguments)

        return call

    programs = engine._programs
    engine._programs = programs._replace(prefill=recorded("prefill"), decode=recorded("decode"))
    engine.answer_batch(to_devices(batch, mesh), NEW)
    for step in (prefill, decode):
        planned = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), step.arguments)
        assert planned == run[step.name]
        held = sum(device_bytes(tree) for tree in step.held.values())
        assert held == sum(map(device_bytes, step.arguments))
