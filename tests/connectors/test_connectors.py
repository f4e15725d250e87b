"""Connectors: number, order and values of their tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynfocus_jax.config import default_config
from dynfocus_jax.connectors.interface import ConnectorInputs
from dynfocus_jax.connectors.registry import change_kind, make_connector
from dynfocus_jax.ops.dpc_knn import dpc_knn
from tests.tiny import change

WIDTH = 8
PATCHES = 256  # 16 x 16, pooled to P = 16; levels (16, 8) give 24 spatial tokens: 40 per cone


def full_connector(**changes):
    """Return a connector with the default numbers of tokens, at a small width C = D."""
    config = default_config()
    config.model.dtype = "float32"
    config.model.language.width = WIDTH
    config.model.connector.projector = "linear"
    return make_connector(change(config, **changes).model)


RELEASED = {
    "mode": "released",
    "dpe__clustering": "kmeans",
    "dpe__num_prototypes": 80,
    "dpe__ratio": 0.45,
    "cce__levels": ((16, 8), (6, 3)),
}


def inputs(features, queries=None, mask=None):
    """Return the inputs of a batch; all frames are valid unless there is a mask."""
    mask = jnp.ones(features.shape[:2], bool) if mask is None else mask
    return ConnectorInputs(jnp.asarray(features), mask, text_queries=queries)


def identity_params(connector, frames):
    """Return parameters whose maps f and W_v are identities; W_v also adds 1000, to mark context tokens."""
    shapes = inputs(jnp.zeros((1, frames, PATCHES, WIDTH)), jnp.zeros((1, frames, 2, WIDTH)))
    params = connector.init(jax.random.key(0), shapes)["params"]
    params["projector"]["linear"] = {"kernel": jnp.eye(WIDTH), "bias": jnp.zeros(WIDTH)}
    if connector.needs_text_queries:
        params["cce"]["context"]["value"] = {"kernel": jnp.eye(WIDTH), "bias": jnp.full(WIDTH, 1000.0)}
    return {"params": params}


def run(connector, params, features):
    """Return the valid tokens [L, D] of one video, and the focus."""
    queries = jnp.zeros((1, len(features), 2, WIDTH))
    out = connector.apply(params, inputs(jnp.asarray(features)[None], queries))
    assert out.count[0] <= out.tokens.shape[1]
    return np.asarray(out.tokens[0, : out.count[0]]), out.focus


def numbered(frames):
    """Return features [T, N, C] whose direction encodes the frame index, for `identify`."""
    angle = 0.2 * np.arange(frames)
    rows = np.zeros((frames, WIDTH), np.float32)
    rows[:, 0], rows[:, 1] = np.cos(angle), np.sin(angle)
    return np.repeat(rows[:, None], PATCHES, axis=1)


def identify(tokens):
    """Return the frame of each token of `numbered` features, and whether it is a context token of a rod."""
    context = tokens[:, 2] > 500
    tokens = tokens - 1000.0 * context[:, None]
    frame = np.arctan2(tokens[:, 1], tokens[:, 0]) / 0.2
    np.testing.assert_allclose(frame, np.round(frame), atol=1e-2)
    return np.round(frame).astype(int).tolist(), context.tolist()


@pytest.mark.parametrize(("frames", "kept"), [(1, 1), (7, 6), (13, 11)])
def test_frames_are_in_time_order_with_40_or_2_tokens(frames, kept):
    connector = full_connector()
    tokens, focus = run(connector, identity_params(connector, frames), numbered(frames))
    chosen = focus.frames[0][focus.valid[0]].tolist()
    assert len(chosen) == kept  # ceil(0.8 T)
    expected = [(t, c) for t in range(frames) for c in ([False] * 40 if t in chosen else [False, True])]
    assert focus.tokens[0].tolist() == [40 if t in chosen else 2 for t in range(frames)]
    assert list(zip(*identify(tokens), strict=True)) == expected
    assert len(tokens) == 2 * (frames - kept) + 40 * kept
    assert connector.length(frames) == len(tokens)


def test_length_of_long_buckets():
    """2 (T - J) + 40 J tokens for J = 20 of 25; in released mode 38 per cone and J = 36 of 80."""
    connector, released = full_connector(), full_connector(**RELEASED)
    for frames in (25, 64, 1000):
        assert connector.length(frames) == 2 * (frames - 20) + 40 * 20
    for frames in (80, 100, 1000):
        assert released.length(frames) == 2 * (frames - 36) + 38 * 36
    assert released.length(1) == 40  # an image also has its rods
    assert full_connector(cce__cones="none").length(100) == 200
    assert full_connector(cce__cones="patches", cce__rods=()).length(100) == 20 * 256
    assert full_connector(cce__rods=("coarse", "context")).length(100) == 80 * 9 + 20 * 40


def test_released_image_is_rods_then_cone():
    connector = full_connector(**RELEASED)
    params = identity_params(connector, 1)
    tokens, _ = run(connector, params, numbered(1))  # all patches are equal
    assert (tokens[:, 2] > 500).tolist() == [False, True] + [False] * 38
    # Gates scale the spatial tokens, and therefore the rods, but not the event tokens.
    scale = np.linalg.norm(tokens[:, :2], axis=1)
    np.testing.assert_allclose(scale[2:18], 1, rtol=1e-4)
    gates = params["params"]["cce"]["spatial"]["gate"]
    logits = np.full(6, tokens[2].mean()) @ gates["kernel"] + gates["bias"]
    gates = np.exp(logits) / np.exp(logits).sum()
    assert np.allclose(np.unique(scale[18:].round(5)), np.unique(gates.round(5)), atol=1e-4)
    assert gates.min() - 1e-5 < scale[0] < gates.max() + 1e-5


def test_released_cones_have_rods_only_if_every_frame_has_a_cone():
    all_cones = full_connector(**RELEASED | {"dpe__ratio": 1.0})
    tokens, _ = run(all_cones, identity_params(all_cones, 3), numbered(3))
    assert len(tokens) == 3 * 40
    context = np.flatnonzero(tokens[:, 2] > 500)
    assert context.tolist() == [1, 41, 81]
    some_cones = full_connector(**RELEASED | {"dpe__ratio": 0.6})
    tokens, _ = run(some_cones, identity_params(some_cones, 3), numbered(3))
    assert len(tokens) == 2 * 38 + 2


def random_features(frames, seed=0):
    return np.random.default_rng(seed).standard_normal((frames, PATCHES, WIDTH)).astype(np.float32)


def spatial_levels(frame):
    first = dpc_knn(jnp.asarray(frame), 16, 8).prototypes
    return np.asarray(first), np.asarray(dpc_knn(first, 8, 3).prototypes)


def event_tokens(frame):
    return frame.reshape(4, 4, 4, 4, WIDTH).mean((1, 3)).reshape(16, WIDTH)


def test_cone_is_event_then_level_1_then_level_2():
    connector, features = full_connector(), random_features(1)
    tokens, _ = run(connector, identity_params(connector, 1), features)
    first, second = spatial_levels(features[0])
    expected = np.concatenate([event_tokens(features[0]), first, second])
    np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-6)


def test_rod_is_content_then_context():
    connector, features = full_connector(cce__cones="none"), random_features(2)
    params = identity_params(connector, 2)
    key = jax.tree.map(np.asarray, params["params"]["cce"]["context"]["key"])
    queries = np.random.default_rng(1).standard_normal((1, 2, 3, WIDTH)).astype(np.float32)
    out = connector.apply(params, inputs(features[None], queries))
    for frame in range(2):
        spatial = np.concatenate(spatial_levels(features[frame])).astype(np.float64)
        logits = queries[0, frame] @ (spatial @ key["kernel"] + key["bias"]).T / np.sqrt(WIDTH)
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        expected = [spatial.mean(0), (weights @ spatial).mean(0) + 1000.0]
        np.testing.assert_allclose(out.tokens[0, 2 * frame : 2 * frame + 2], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cones", ["single_grained", "pair", "patches", "cross_attention"])
def test_other_cones(cones):
    connector, features = full_connector(cce__cones=cones), random_features(1)
    params = identity_params(connector, 1)
    tokens, _ = run(connector, params, features)
    events, (first, second) = event_tokens(features[0]), spatial_levels(features[0])
    spatial = np.concatenate([first, second])
    if cones == "single_grained":
        expected = np.concatenate([events, first])
    elif cones == "pair":
        expected = np.stack([events.mean(0), spatial.mean(0)])
    elif cones == "patches":
        expected = features[0]
    else:
        fusion = jax.tree.map(np.asarray, params["params"]["cce"]["fusion"])
        query, key, value = (
            x @ fusion[name]["kernel"] + fusion[name]["bias"]
            for name, x in (("query", events), ("key", spatial), ("value", spatial))
        )
        weights = np.exp(query @ key.T / np.sqrt(WIDTH))
        expected = events + weights / weights.sum(-1, keepdims=True) @ value
    assert len(tokens) == {"single_grained": 32, "pair": 2, "patches": 256, "cross_attention": 16}[cones]
    np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-5)


def test_coarse_rods():
    connector, features = (
        full_connector(cce__cones="none", cce__rods=("coarse", "content")),
        random_features(1),
    )
    tokens, _ = run(connector, identity_params(connector, 1), features)
    first, second = spatial_levels(features[0])
    content = np.concatenate([first, second]).mean(0, keepdims=True)
    np.testing.assert_allclose(tokens, np.concatenate([second, content]), rtol=1e-5, atol=1e-6)


def test_pooled_connector():
    config = default_config()
    config.model.dtype = "float32"
    config.model.language.width = WIDTH
    config.model.connector.projector = "linear"
    config.model.connector = change_kind(config.model.connector, "pooled", "config.model.connector")
    connector, features = make_connector(config.model), random_features(3)
    given = inputs(features[None], mask=jnp.array([[True, True, False]]))
    params = connector.init(jax.random.key(0), given)["params"]
    params["projector"]["linear"] = {"kernel": jnp.eye(WIDTH), "bias": jnp.zeros(WIDTH)}
    out = connector.apply({"params": params}, given)
    assert out.count.tolist() == [32]
    assert out.focus is None
    expected = np.concatenate([event_tokens(frame) for frame in features[:2]])
    np.testing.assert_allclose(out.tokens[0, :32], expected, rtol=1e-5, atol=1e-6)
    assert not out.tokens[0, 32:].any()
