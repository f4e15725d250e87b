"""Sharding rules on the full 7B model, sharding of activations by name, and errors."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import instruct_7b, released_7b
from dynfocus_jax import trees
from dynfocus_jax.connectors.registry import find_connector
from dynfocus_jax.errors import UserError
from dynfocus_jax.parallel.sharding import (
    LOGICAL_AXES,
    RULES,
    num_shards,
    on_mesh,
    param_shardings,
    place_like,
    replicated,
    shard,
)
from dynfocus_jax.parameters import param_shapes
from dynfocus_jax.training.state import abstract_state
from tests.tiny import mesh_of

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "sharding_7b.json"


def describe(leaf) -> str:
    """Return a description such as "float32 [32, 4096 fsdp, 11008 tensor]"."""
    spec = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
    sizes = [f"{size} {axis}" if axis else str(size) for size, axis in zip(leaf.shape, spec, strict=True)]
    return f"{leaf.dtype} [{', '.join(sizes)}]"


def full_state(config):
    return abstract_state(config, -1, mesh_of(fsdp=4, tensor=2))


@pytest.fixture(scope="module")
def full_size():
    return full_state(instruct_7b.get_config())


def test_golden_sharding_of_the_7b_model(full_size):
    """When a rule changes, review and update the golden file with the lines of `describe`."""
    state = {"trained": trees.flatten(full_size.trained), "frozen": trees.flatten(full_size.frozen)}
    found = {
        part: {path: describe(leaf) for path, leaf in sorted(leaves.items())}
        for part, leaves in state.items()
    }
    assert found == json.loads(GOLDEN.read_text())


def test_optimizer_moments_are_sharded_like_their_parameters(full_size):
    adam = full_size.opt_state[1][0]
    trained = trees.flatten(full_size.trained)
    for moments in (adam.mu, adam.nu):
        moments = trees.flatten(moments)
        assert {p: (m.shape, m.sharding) for p, m in moments.items()} == {
            path: (leaf.shape, leaf.sharding) for path, leaf in trained.items()
        }
        assert {leaf.dtype for leaf in moments.values()} == {np.dtype(np.float32)}
    assert not any(path.startswith("vision/") for path in trees.flatten(adam.mu))
    others = [leaf for leaf in jax.tree.leaves(full_size.opt_state) if leaf.shape == ()]
    assert all(leaf.sharding.is_fully_replicated for leaf in others)
    assert len(others) + 2 * len(trained) == len(jax.tree.leaves(full_size.opt_state))


def test_most_of_the_model_is_split(full_size):
    """Replicated parameters are less than 0.1 % of the model."""
    leaves = trees.flatten(full_size.trained) | trees.flatten(full_size.frozen)
    copied = sum(leaf.size for leaf in leaves.values() if leaf.sharding.is_fully_replicated)
    assert copied < 0.001 * sum(leaf.size for leaf in leaves.values())


def variants():
    """Yield the parameter shapes of configurations that together have every optional part."""
    config = instruct_7b.get_config()
    config.model.language.update({"qkv_bias": True, "qk_norm": True})
    config.model.language.lora.update(
        {"rank": 8, "targets": ("query", "key", "value", "out", "gate", "up", "down")}
    )
    config.model.connector.dpe.question_conditioned = True
    config.model.connector.projector = "residual"
    config.model.connector.cce.cones = "cross_attention"
    config.model.vision.update({"pre_norm": True, "final_norm": True})
    for each in (instruct_7b.get_config(), config, released_7b.get_config()):
        yield param_shapes(each, -1)


def test_every_rule_is_used_and_every_parameter_has_one_rule():
    """Backbone parameters have a rule each; connector parameters without a rule are replicated."""
    shapes = {path: leaf for each in variants() for path, leaf in each.items()}
    own = find_connector("dynfocus").SHARDING
    patterns = [pattern for pattern, _ in RULES] + [f"connector/{pattern}" for pattern, _ in own]
    used, unmatched = set(), set()
    for path in shapes:
        matching = [pattern for pattern in patterns if re.fullmatch(pattern, path)]
        assert len(matching) <= 1, (path, matching)
        used |= set(matching)
        unmatched |= set() if matching else {path}
    assert used == set(patterns)
    small = {"connector/cce/spatial/gate/kernel", "connector/dpe/score_net/out_dense_2/kernel"}
    assert unmatched == small
    shardings = param_shardings(shapes, mesh_of(fsdp=4, tensor=2), own)
    assert all(shardings[path].is_fully_replicated for path in small)


# --- Errors -------------------------------------------------------------------------------------------


def error_of(shapes, mesh):
    """Return the error of sharding these shapes; it must be one line."""
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    with pytest.raises(UserError) as error:
        param_shardings(shapes, mesh)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_a_parameter_without_a_rule():
    mesh = mesh_of(fsdp=2)
    sentence = error_of({"language/blocks/expert/kernel": (2, 8, 8)}, mesh)
    assert "language/blocks/expert/kernel of shape (2, 8, 8) has no sharding rule" in sentence
    assert "parallel/sharding.py" in sentence
    # A rule must match the whole path, and have at most as many dimensions as the parameter.
    assert "has no sharding rule" in error_of({"language/head/kernels": (8, 8)}, mesh)
    assert "has no sharding rule" in error_of({"language/head/kernel": (8,)}, mesh)


def test_an_axis_that_does_not_divide():
    sentence = error_of({"language/blocks/key/kernel": (2, 24, 3, 8)}, mesh_of(fsdp=4, tensor=2))
    assert "config.mesh.tensor is 2, which does not divide 3, a dimension of parameter" in sentence
    assert "parameter language/blocks/key/kernel of shape (2, 24, 3, 8)" in sentence
    sentence = error_of({"vision/patch_embedding/kernel": (48, 20)}, mesh_of(fsdp=8))
    assert "config.mesh.fsdp is 8" in sentence
    assert "a divisor of 20" in sentence


# --- Arrays and activations ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "one device", "another mesh"])
def test_place_like_copies_casts_and_splits(kind):
    values = np.arange(64, dtype=np.float32).reshape(4, 16) / 3
    path, mesh = "language/head/kernel", mesh_of(fsdp=4, tensor=2)

    def like(mesh, dtype):
        leaf = jax.ShapeDtypeStruct((4, 16), dtype)
        return jax.ShapeDtypeStruct((4, 16), dtype, sharding=param_shardings({path: leaf}, mesh)[path])

    source = values
    if kind != "numpy":
        source = jax.device_put(values, like(mesh_of(fsdp=2), jnp.float32).sharding)
    if kind == "one device":
        source = jnp.asarray(values)
    for dtype in (jnp.float32, jnp.bfloat16):
        placed = place_like(source, like(mesh, dtype))
        assert placed.dtype == dtype
        assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 8)}
        np.testing.assert_array_equal(placed, values.astype(dtype))
    same = place_like(source, like(mesh_of(), jnp.float32))
    same.delete()  # it is a copy, which can be donated without losing the source
    np.testing.assert_array_equal(source, values)


def spec_of(mesh, shape, *names):
    """Return the mesh axes of an array's dimensions after `shard` inside of jit."""

    def run(x):
        with on_mesh(mesh):
            return shard(x + 1, *names)

    found = jax.jit(run, in_shardings=replicated(mesh))(jnp.zeros(shape)).sharding
    return tuple(found.spec) + (None,) * (len(shape) - len(found.spec))


def test_names_of_activations():
    mesh = mesh_of(data=2, fsdp=2, context=2)
    rows = ("data", "fsdp")
    assert spec_of(mesh, (4, 6, 3), "batch", "sequence", None) == (rows, "context", None)
    assert spec_of(mesh, (8, 3), "frames", None) == (rows, None)
    mesh = mesh_of(fsdp=2, tensor=4)
    assert spec_of(mesh, (2, 3, 4, 5), "batch", None, "heads", None)[2] == "tensor"
    assert spec_of(mesh, (2, 8), None, "vocab") == (None, "tensor")
    assert spec_of(mesh, (2, 8), None, "hidden") == (None, "tensor")
    # The sequence of one decoded token cannot be split, nor the batch of one prompt.
    assert spec_of(mesh_of(fsdp=2, context=4), (1, 1, 8), "batch", "sequence", None) == (None,) * 3


def test_number_of_shards():
    assert num_shards("batch") == num_shards("sequence") == 1
    with on_mesh(mesh_of(data=2, fsdp=2, context=2)):
        names = ("batch", "frames", "sequence", "heads", None)
        assert [num_shards(name) for name in names] == [4, 4, 2, 1, 1]


def test_without_a_mesh_the_array_is_unchanged():
    x = jnp.ones((2, 3))
    assert shard(x, "batch", None) is x
    with on_mesh(mesh_of()):
        assert shard(x, "batch", None) is x


@pytest.mark.parametrize("devices", [1, 8])
def test_unknown_names_are_errors_with_and_without_a_mesh(devices):
    with on_mesh(mesh_of(data=devices)):
        with pytest.raises(ValueError, match=r"name 'sequnce' is unknown; expected one of 'batch', 'frames'"):
            shard(jnp.ones((2, 3)), "batch", "sequnce")
        with pytest.raises(ValueError, match=r"1 names .* shape \(2, 3\)"):
            shard(jnp.ones((2, 3)), "batch")
    with pytest.raises(ValueError, match="unknown"):
        num_shards("length")


def test_rules_use_axes_of_the_mesh():
    axes = set(mesh_of().shape)
    assert {axis for names in LOGICAL_AXES.values() for axis in names} == axes
    assert {axis for _, spec in RULES for axis in spec if axis} == {"fsdp", "tensor"}
    assert all(isinstance(spec, PartitionSpec) for _, spec in RULES)
