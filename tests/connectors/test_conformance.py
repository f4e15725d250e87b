"""Conformance of all connectors to the interface: those of the package, and one outside of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynfocus_jax import trees
from dynfocus_jax.batch import Batch
from dynfocus_jax.config import connector
from dynfocus_jax.connectors.registry import connector_kinds, find_connector
from dynfocus_jax.parameters import init_params, sharded_shapes, trained_paths
from dynfocus_jax.training.optimizer import make_optimizer, make_schedule
from dynfocus_jax.training.state import TrainState, abstract_state, state_shardings
from dynfocus_jax.training.step import make_train_step
from dynfocus_jax.validation import validate
from dynfocus_jax.video_language_model import build_model, row_randomness, stage_connector
from tests.shapes import check_shapes
from tests.tiny import K, make_sample, mesh_of, pad, perturb, stack, tiny_config

OUTSIDE = "tests.connectors.gated_pooling:GatedPooling"
TINY = {  # settings for short clips of 4 x 4 patches
    "dynfocus": {
        "pool": (2, 2),
        "dpe": {"num_prototypes": K, "num_selected": 2, "samples": 8, "neighbors": 3},
        "cce": {"levels": ((4, 5), (2, 2))},
    },
    "pooled": {"pool": (2, 2)},
    OUTSIDE: {"frames": 3, "samples": 8},
}
KINDS = [*connector_kinds(), OUTSIDE]
LONG, FRAMES = 2 * K, (0, 1, K - 1, 2 * K)


def config_of(kind: str):
    config = tiny_config()
    config.data.root = "."
    config.model.connector = connector(kind, **TINY.get(kind, {}))
    (stage,) = [stage for stage in config.stages if stage.name == "instruct"]
    stage.update({"connector": None, "trainable": None, "copy": (), "random_steps": 0, "batch_size": 4})
    config.stages = (stage,)
    validate(config)
    return config


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    """(configuration, model, parameters, samples of different lengths with subtitles, their batch)."""
    config = config_of(request.param)
    rng = np.random.default_rng(0)
    samples = [
        make_sample(rng, frames, 6 + row, 3, oracle=(0,), subtitle_frames=(0, 0)[: 2 * bool(frames)])
        for row, frames in enumerate(FRAMES)
    ]
    batch = stack([pad(sample, LONG, 12, subtitle=3) for sample in samples])
    shapes = sharded_shapes(config, 0, mesh_of())
    model = build_model(config)
    params = perturb(trees.unflatten(init_params(model, jax.random.key(0), shapes)))
    return config, model, params, samples, batch


def visual_tokens(model, params, batch, train):
    def run(params, batch):
        randomness = row_randomness(jax.random.key(1), len(batch.index)) if train else None
        return model.apply(
            {"params": params}, batch, train=train, randomness=randomness, method="visual_tokens"
        )

    return jax.device_get(jax.jit(run)(params, batch))


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_output_and_padding(case, train):
    """Shapes, dtypes and static length are right, and a clip's tokens do not depend on batch and bucket."""
    config, model, params, samples, batch = case
    together = visual_tokens(model, params, batch, train)
    check_shapes(jax.tree.map(jnp.asarray, together))
    length = stage_connector(config).length(LONG)
    assert together.tokens.shape[1] == length + 3
    assert (together.count <= together.tokens.shape[1]).all()
    np.testing.assert_array_equal(together.mask, np.arange(length + 3) < together.count[:, None])
    assert not together.tokens[~together.mask].any()
    assert together.count[0] == 0
    if together.focus is not None:
        spent = together.focus.tokens.sum(axis=1) + (batch.subtitle_frames >= 0).sum(axis=1)
        np.testing.assert_array_equal(spent, together.count)
        assert not together.focus.scores[~batch.frame_mask].any()
        chosen = together.focus.frames[together.focus.valid]
        rows = np.nonzero(together.focus.valid)[0]
        assert batch.frame_mask[rows, chosen].all()
        assert together.focus.candidates[rows, chosen].all()
    if train:
        return  # random draws depend on the row, so a single clip has other values
    for row, sample in enumerate(samples):
        frames = max(len(sample.frames), 1)
        single = visual_tokens(model, params, stack([pad(sample, frames, 12, subtitle=3)]), train)
        count = int(together.count[row])
        assert int(single.count[0]) == count
        scale = max(np.abs(together.tokens).max(), 1e-9)
        np.testing.assert_allclose(
            single.tokens[0, :count], together.tokens[row, :count], atol=2e-6 * scale, rtol=0
        )


def train_step(config, params, batch: Batch, microbatches: int, **axes: int):
    """Return the metrics and the trained parameters after one step on a mesh."""
    stage = config.stages[0]
    stage.microbatches = microbatches
    mesh = mesh_of(**axes)
    abstract = abstract_state(config, 0, mesh)
    shardings = state_shardings(abstract)
    flat = trees.flatten(params)
    trained, frozen = trees.split(params, trained_paths(config, 0, flat))
    optimizer = make_optimizer(stage, abstract.trained)
    state = TrainState(np.int32(0), trained, frozen, optimizer.init(trained))
    state = jax.tree.map(jax.device_put, jax.device_get(state), shardings)
    model, key = build_model(config), jax.random.key(2)
    step = make_train_step(model, optimizer, make_schedule(stage), stage, key, shardings)
    state, metrics = step(state, batch)
    return jax.device_get((metrics, trees.flatten(state.trained)))


def test_microbatches_and_meshes_equal_one_device(case):
    """Two microbatches and 2 x 2 devices give the same step, since each row has its own random key."""
    config, _, params, _, batch = case
    metrics, trained = train_step(config, params, batch, 1)
    assert np.isfinite(metrics["loss"])
    for microbatches, axes in ((2, {}), (1, {"data": 2, "fsdp": 2})):
        other, updated = train_step(config, params, batch, microbatches, **axes)
        np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-5)
        np.testing.assert_allclose(other["grad_norm"], metrics["grad_norm"], rtol=1e-4)
        assert updated.keys() == trained.keys()


def test_default_trained_parameters_exist(case):
    config, _, params, _, _ = case
    assert any(map(trained_paths(config, 0, trees.flatten(params)), trees.flatten(params)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_meaning(kind):
    def check(fields, where):
        for name, field in fields.items():
            if isinstance(field, dict):
                check(field, f"{where}.{name}")
            else:
                assert field.about, f"{where}.{name}"

    check(find_connector(kind).FIELDS, kind)
