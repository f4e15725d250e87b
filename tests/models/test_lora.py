"""LoRA of the language model: initialised to zero, trained alone, merged into the kernels."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file

from dynfocus_jax import trees
from dynfocus_jax.models.llama import PROJECTIONS, Llama
from dynfocus_jax.parallel.sharding import to_devices
from dynfocus_jax.parameters import init_params, param_shapes
from dynfocus_jax.training.optimizer import make_optimizer, make_schedule
from dynfocus_jax.training.state import TrainState, abstract_state, state_shardings
from dynfocus_jax.training.step import make_train_step
from dynfocus_jax.video_language_model import build_model
from dynfocus_jax.weights.conversion import export_model
from dynfocus_jax.weights.export import merge_lora
from tests.tiny import make_sample, mesh_of, pad, perturb, stack, tiny_config

RANK, ALPHA = 3, 7.0


def lora_config(targets=PROJECTIONS, rank=RANK, dtype="float32"):
    config = tiny_config()
    config.model.dtype = dtype
    config.model.language.depth = 2
    config.model.language.lora.update({"rank": rank, "alpha": ALPHA, "targets": targets})
    config.stages[-1].update({"trainable": ("language/.*lora_.*",), "lr_scale": (), "random_steps": 0})
    config.stages[-1].warmup = 0.0
    for stage in config.stages[:-1]:
        stage.trainable = ("connector/.*",)
    return config


def make_language(config):
    """Return the language model's initial parameters, and a jitted function from them to logits."""
    types = {"dtype": config.model.dtype, "param_dtype": config.model.param_dtype}
    model = Llama(**FrozenConfigDict(config.model.language), **types)
    tokens, lengths = np.random.default_rng(0).integers(0, 40, (2, 9)), np.array([9, 5])

    def run(module):
        hidden = module(module.embed(tokens), lengths)
        return module.logits(hidden)

    params = jax.jit(lambda key: model.init(key, method=run)["params"])(jax.random.key(0))
    return jax.device_get(params), jax.jit(lambda params: model.apply({"params": params}, method=run)[0])


def logits(config, params):
    return make_language(config)[1](params["language"])


@pytest.fixture(scope="module")
def params():
    """Initial parameters of a language model with low-rank updates of all projections, under "language"."""
    return {"language": make_language(lora_config())[0]}


def without_lora(params):
    flat = trees.flatten(params)
    return trees.unflatten({path: leaf for path, leaf in flat.items() if "lora" not in path})


def test_parameters(params):
    """Updates are beside their kernels and have the configured rank; other parameters do not change."""
    flat = trees.flatten(params)
    language = lora_config().model.language
    for target in PROJECTIONS:
        kernel = flat[f"language/blocks/{target}/kernel"]
        split = 3 if target == "out" else 2  # axes: layers, inputs, outputs
        down, up = (flat[f"language/blocks/{target}/lora_{name}"] for name in "ab")
        assert down.shape == (language.depth, *kernel.shape[1:split], RANK)
        assert up.shape == (language.depth, RANK, *kernel.shape[split:])
        assert not up.any()
        inputs = np.prod(kernel.shape[1:split])
        assert 0.8 * inputs**-0.5 < np.abs(down).max() <= inputs**-0.5  # uniform, as published
        assert not np.array_equal(down[0], down[1])
    base = trees.flatten({"language": make_language(lora_config(rank=0))[0]})
    assert {p: leaf.shape for p, leaf in base.items()} == {
        path: leaf.shape for path, leaf in trees.flatten(without_lora(params)).items()
    }
    chosen, none = (param_shapes(lora_config(("key", "down"), rank), -1).keys() for rank in (RANK, 0))
    assert chosen - none == {
        f"language/blocks/{target}/lora_{name}" for target in ("key", "down") for name in "ab"
    }


def test_initial_updates_are_zero(params):
    base = logits(lora_config(rank=0), without_lora(params))
    np.testing.assert_array_equal(logits(lora_config(), params), base)


@pytest.mark.parametrize("target", PROJECTIONS)
def test_each_update_belongs_to_its_kernel(params, target):
    """The result equals that of a kernel with the update added."""
    config = lora_config((target,))
    flat = trees.flatten(perturb(params, 1))
    kept = {path: leaf for path, leaf in flat.items() if "lora" not in path or f"/{target}/" in path}
    down, up = (flat[f"language/blocks/{target}/lora_{name}"] for name in "ab")
    kernel = f"language/blocks/{target}/kernel"
    equation = "lir,lrhd->lihd" if up.ndim == 4 else "lhdr,lro->lhdo" if target == "out" else "lir,lro->lio"
    update = jnp.einsum(equation, down, up) * ALPHA / RANK
    by_hand = trees.flatten(without_lora(trees.unflatten(flat)))
    changed = logits(config, trees.unflatten(kept))
    base = logits(lora_config(rank=0), trees.unflatten(by_hand))
    by_hand[kernel] = by_hand[kernel] + update
    expected = logits(lora_config(rank=0), trees.unflatten(by_hand))
    assert np.abs(expected - base).max() > 1e-3
    np.testing.assert_allclose(changed, expected, atol=2e-5)


def test_only_the_updates_are_trained():
    """Updates have gradients and moments; other parameters are frozen, in the compute dtype."""
    config, mesh = lora_config(("query", "value", "down"), dtype="bfloat16"), mesh_of()
    abstract, stage = abstract_state(config, -1, mesh), config.stages[-1]
    assert all("lora_" in path for path in trees.flatten(abstract.trained))
    assert len(trees.flatten(abstract.trained)) == 6
    for path, leaf in trees.flatten(abstract.frozen).items():  # the connector is trained by an earlier stage
        assert leaf.dtype == (jnp.float32 if path.startswith("connector/") else jnp.bfloat16), path
    model, optimizer = build_model(config), make_optimizer(stage, abstract.trained)
    wanted = trees.flatten(trees.merge(abstract.trained, abstract.frozen))
    trained, frozen = trees.split(
        trees.unflatten(init_params(model, jax.random.key(0), wanted)), lambda path: "lora_" in path
    )
    state = TrainState(jnp.int32(0), trained, frozen, optimizer.init(trained))
    state = jax.device_put(state, state_shardings(abstract))
    before = jax.device_get(state)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(trained))
    step = make_train_step(
        *(model, optimizer, make_schedule(stage), stage, jax.random.key(1), state_shardings(abstract))
    )
    rng = np.random.default_rng(0)
    batch = stack([pad(make_sample(rng, 3, 9, 4), 3, 12), pad(make_sample(rng, 0, 12, 2), 3, 12)])
    for _ in range(2):  # in the first step only lora_b has a gradient
        state, metrics = step(state, to_devices(batch, mesh))
    assert np.isfinite(metrics["loss"])
    for path, leaf in trees.flatten(before.trained).items():
        assert not np.array_equal(trees.flatten(state.trained)[path], leaf), path
    for path, leaf in trees.flatten(before.frozen).items():
        np.testing.assert_array_equal(trees.flatten(state.frozen)[path], leaf, err_msg=path)


def test_merge_lora(params):
    config = lora_config()
    moved = jax.device_get(perturb(params, 2))
    merged = merge_lora(moved, config.model.language.lora)
    assert trees.flatten(merged).keys() == trees.flatten(without_lora(moved)).keys()
    expected = logits(config, moved)
    np.testing.assert_allclose(logits(lora_config(rank=0), merged), expected, atol=5e-5)
    assert np.abs(logits(lora_config(rank=0), without_lora(moved)) - expected).max() > 1e-2
    assert "lora_a" in moved["language"]["blocks"]["query"]  # the argument is not modified


def test_export_merges_the_updates(params, tmp_path):
    config = lora_config()
    moved = jax.device_get(perturb(params, 3))
    language = {"language": moved["language"]}
    for name in ("adapted", "merged"):
        (tmp_path / name).mkdir()
    export_model(tmp_path / "adapted", language, config, 2**30)
    merged = merge_lora(language, config.model.language.lora)
    export_model(tmp_path / "merged", merged, lora_config(rank=0), 2**30)
    one, other = (load_file(tmp_path / name / "language/model.safetensors") for name in ("adapted", "merged"))
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)
    kernel = moved["language"]["blocks"]["query"]["kernel"][1]
    name = "model.layers.1.self_attn.q_proj.weight"
    assert np.abs(one[name].T.reshape(kernel.shape) - kernel).max() > 1e-2
    assert "lora" not in json.dumps(json.loads((tmp_path / "adapted/language/config.json").read_text()))
