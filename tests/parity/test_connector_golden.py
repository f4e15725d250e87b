"""Our modules in mode "released" against golden values of the authors' code and a PyTorch copy of it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import FrozenConfigDict

from benchmarks.torch_published import PublishedConnector
from benchmarks.torch_published import Selection as PublishedSelection
from dynfocus_jax import trees
from dynfocus_jax.config import default_config
from dynfocus_jax.connectors.dynfocus import event_prototypes as event_prototype
from dynfocus_jax.connectors.dynfocus import scores as scores_module
from dynfocus_jax.connectors.dynfocus import selection as selecting
from dynfocus_jax.connectors.dynfocus.cooperative import SpatialPrototypes, TextContext, mixed_prototypes
from dynfocus_jax.connectors.dynfocus.event_prototypes import DPE_FIELDS, EventPrototypes
from dynfocus_jax.connectors.dynfocus.scores import ScoreNet
from dynfocus_jax.connectors.interface import ConnectorInputs
from dynfocus_jax.connectors.registry import make_connector
from dynfocus_jax.ops import perturbed_topk, pooling
from dynfocus_jax.sections import fill_section
from dynfocus_jax.video_language_model import row_randomness
from tests.parity.published import MODULES, our_params

GOLDEN = Path(__file__).parents[1] / "golden" / "released"
LEVELS = ((16, 8), (6, 3))


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def under(golden, prefix):
    """Return the entries whose names start with a prefix, as tensors, without the prefix."""
    return {
        key.removeprefix(prefix): torch.from_numpy(value)
        for key, value in golden.items()
        if key.startswith(prefix)
    }


def assert_close(actual, expected, tolerance=1e-5, scale=None):
    """Check the largest error relative to `scale`; by default, to the largest expected magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / (np.abs(expected).max() if scale is None else scale)
    assert error <= tolerance, f"relative error {error:.1e}"


def connector_of(language_width, clusters=80, ratio=0.45, **dpe):
    """Return our connector with the settings of the published one."""
    model = default_config().model
    model.connector.mode, model.dtype = "released", "float32"
    model.language.width = language_width
    model.connector.dpe.update({"num_prototypes": clusters, "ratio": ratio, "clustering": "kmeans"})
    model.connector.dpe.update({"jacobian": "diagonal", "kmeans_init": "random", **dpe})
    model.connector.cce.levels = LEVELS
    return make_connector(model)


CAPTURE = {"capture_intermediates": lambda module, method: module.name == "dpe" and method == "__call__"}


def run(connector, params, features, queries, **options):
    """Return the valid tokens `[L, D]` and the selection of one video; in training mode if noise is given."""
    train = "noise" in options

    @jax.jit
    def apply(params, features, queries, options):
        mask = jnp.ones((1, len(features)), bool)
        randomness = row_randomness(jax.random.key(0), 1, **options)
        inputs = ConnectorInputs(features[None], mask, text_queries=queries[None], randomness=randomness)
        visual, state = connector.apply({"params": params}, inputs, train=train, **CAPTURE)
        return visual, state["intermediates"]["dpe"]["__call__"][0]

    out, selection = apply(params, jnp.asarray(features), jnp.asarray(queries), options)
    return out.tokens[0, : int(out.count[0])], selection


# --- Golden values ------------------------------------------------------------------------------------


def test_every_published_weight_has_one_parameter():
    connector = connector_of(12)
    features, queries = jnp.zeros((1, 3, 256, 8)), jnp.zeros((1, 3, 2, 8))
    inputs = ConnectorInputs(features, jnp.ones((1, 3), bool), text_queries=queries)
    shapes = jax.eval_shape(connector.init, jax.random.key(0), inputs)
    ours = {path: leaf.shape for path, leaf in trees.flatten(shapes["params"]).items()}
    theirs = trees.flatten(our_params(PublishedConnector(8, 12).state_dict()))
    assert ours == {path: leaf.shape for path, leaf in theirs.items()}
    assert len(set(MODULES.values())) == len(MODULES)


def test_merger():
    golden = load("merger")
    module = SpatialPrototypes(LEVELS, "dpc_knn", weighting="mean", grouped=True)
    params = our_params(under(golden, "score."), "cce/spatial", "merge.score.")
    (tokens,) = module.apply({"params": params}, golden["features"][None])
    assert_close(tokens[0], golden["out"])


def test_score_network():
    golden = load("score_network")
    params = our_params(under(golden, "p."), "dpe/score_net", "selective.score_network.")
    inputs = golden["inputs"]
    scores = ScoreNet().apply({"params": params}, inputs, jnp.ones(inputs.shape[:2], bool))
    assert_close(scores[..., None], golden["scores"])


def test_rods():
    golden = load("rods")
    params = our_params(under(golden, "p."))
    spatial, queries = golden["prototypes"], golden["text_queries"]
    width = golden["out"].shape[-1]
    context = TextContext(width).apply({"params": params["cce"]["context"]}, spatial[None], queries[None])[0]
    projector = connector_of(width).bind({"params": params}).projector
    content = projector(spatial.mean(axis=1))
    assert_close(np.stack([content, context], axis=1), golden["out"])


@pytest.mark.parametrize("frames", [1, 2, 12, 100])
def test_connector(frames):
    golden = load(f"connector_T{frames}")
    connector = connector_of(golden["out"].shape[-1])
    options = {"initial_frames": golden["initial"][None].astype(np.int32)} if "initial" in golden else {}
    params = our_params(under(golden, "p."))
    tokens, _ = run(connector, params, golden["features"], golden["text_queries"], **options)
    assert_close(tokens, golden["out"])


# --- Selection, with gradients ------------------------------------------------------------------------


def select(golden, params, events, spatial, *, dtype="float32", noise=None):
    """Return the selected tokens `[J, P + M, C]` and the selection, for events that need no pooling."""
    fields = {
        "num_prototypes": 80,
        "neighbors": 5,
        "ratio": float(golden["ratio"]),
        "clustering": "kmeans",
        "kmeans_init": "random",
        "samples": 64,
        "sigma": float(golden["sigma"]),
        "jacobian": "diagonal",
    }
    settings = FrozenConfigDict(fill_section(DPE_FIELDS, fields, "dpe"))
    dpe = EventPrototypes(settings, "released", grid=(4, 4), pool=(4, 4), dtype=dtype)
    randomness = None if noise is None else row_randomness(jax.random.key(0), 1, noise=noise)
    inputs = ConnectorInputs(events[None], jnp.ones((1, len(events)), bool), randomness=randomness)
    selection = dpe.apply({"params": {"score_net": params}}, inputs, train=noise is not None)
    mixed = mixed_prototypes(spatial[None], selection)
    return jnp.concatenate([selection.events, mixed], axis=2)[0], selection


def selection_inputs(golden, dtype):
    """Return score net parameters, events `[T, P, C]` and spatial tokens `[T, M, C]`."""
    params = our_params(under(golden, "p."), "dpe/score_net", "selective.score_network.")
    frames = int(golden["T"])
    events, spatial = (golden[name][0].reshape(frames, -1, 16) for name in ("event", "spatial"))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, events, spatial))


def selection_gradients(golden, inputs, dtype="float32"):
    """Return tokens, selection, and the gradients of parameters, events and spatial tokens."""
    noise, upstream = jnp.asarray(golden["noise"], dtype), jnp.asarray(golden["grad_tokens"], dtype)

    def loss(params, events, spatial):
        tokens, selection = select(golden, params, events, spatial, dtype=dtype, noise=noise)
        return (tokens * upstream).sum(), (tokens, selection)

    (_, aux), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs)
    return *aux, gradients


def test_selection_in_evaluation():
    golden = load("selection")
    tokens, selection = select(golden, *selection_inputs(golden, "float32"))
    np.testing.assert_array_equal(selection.frames, golden["eval_indices"])
    assert_close(tokens, golden["eval_tokens"])


# The raw scores of this golden file span 5e-4 only, so their normalisation turns one float32 rounding of a
# score into about 3e-4 of the gradients that pass through it. The tests after this one are tight.
SCORE_GRADIENT_TOLERANCE = 1e-3
SHIFT = "out_dense_2/bias"  # it shifts all scores, which normalisation cancels: its gradient is rounding


def test_selection_in_training_with_gradients():
    golden = load("selection")
    tokens, selection, gradients = selection_gradients(golden, selection_inputs(golden, "float32"))
    np.testing.assert_array_equal(selection.frames, golden["train_indices"])
    assert_close(tokens, golden["train_tokens"])
    params, events, spatial = gradients
    assert_close(spatial.reshape(-1, 16), golden["grad_spatial"][0])  # does not pass through the scores
    assert_close(events.reshape(-1, 16), golden["grad_event"][0], SCORE_GRADIENT_TOLERANCE)
    expected = our_params(under(golden, "g."), "dpe/score_net", "selective.score_network.")
    expected, actual = trees.flatten(expected), trees.flatten(params)
    assert actual.keys() == expected.keys()
    scale = max(np.abs(gradient).max() for gradient in expected.values())
    assert_close(actual.pop(SHIFT), expected.pop(SHIFT), SCORE_GRADIENT_TOLERANCE, scale)
    for path, gradient in actual.items():
        assert_close(gradient, expected[path], SCORE_GRADIENT_TOLERANCE)


def published_selection(golden, params, dtype):
    """Return tokens and gradients of the PyTorch program, for our score net parameters."""
    selection = PublishedSelection(16, float(golden["ratio"]), float(golden["sigma"])).to(dtype)
    weights = dict(selection.score_network.named_parameters())
    for name, weight in weights.items():
        (path,) = trees.flatten(our_params({name: weight}, "dpe/score_net", "selective.score_network."))
        weight.data = torch.tensor(np.asarray(trees.flatten(params)[path]).T, dtype=dtype)
    frames = int(golden["T"])
    events, spatial = (
        torch.from_numpy(golden[name][0]).to(dtype).unflatten(0, (frames, -1)).requires_grad_()
        for name in ("event", "spatial")
    )
    tokens, _ = selection(events, spatial, torch.from_numpy(golden["noise"][0]).to(dtype))
    tokens.backward(torch.from_numpy(golden["grad_tokens"]).to(dtype))
    gradients = {name: weight.grad for name, weight in weights.items()}
    gradients = our_params(gradients, "dpe/score_net", "selective.score_network.")
    return tokens.detach(), (gradients, events.grad, spatial.grad)


def assert_same_selection(actual, expected, tolerance):
    (tokens, (params, events, spatial)), (their_tokens, theirs) = actual, expected
    assert_close(tokens, their_tokens, tolerance)
    their_params, their_events, their_spatial = theirs
    assert_close(events, their_events, tolerance)
    assert_close(spatial, their_spatial, tolerance)
    their_params, params = trees.flatten(their_params), trees.flatten(params)
    assert params.keys() == their_params.keys()
    scale = max(np.abs(np.asarray(gradient)).max() for gradient in their_params.values())
    for path, gradient in params.items():
        assert_close(gradient, their_params[path], tolerance, scale if path == SHIFT else None)


def test_selection_gradients_in_float32_when_scores_are_well_spread():
    golden = load("selection")
    params, events, spatial = selection_inputs(golden, "float32")
    for layer in ("in_dense", "out_dense_0", "out_dense_1", "out_dense_2"):
        params[layer]["kernel"] *= 6.0
    tokens, _, gradients = selection_gradients(golden, (params, events, spatial))
    assert_same_selection((tokens, gradients), published_selection(golden, params, torch.float32), 1e-5)


class _Double:
    """jax.numpy with float64 in place of float32."""

    def __getattr__(self, name):
        return jnp.float64 if name == "float32" else getattr(jnp, name)


def test_selection_gradients_in_float64(monkeypatch):
    """Float64 tests the formulas without the rounding that the golden scores amplify."""
    for module in (event_prototype, scores_module, selecting, perturbed_topk, pooling):
        monkeypatch.setattr(module, "jnp", _Double())
    golden = load("selection")
    with jax.enable_x64(True):
        inputs = selection_inputs(golden, "float64")
        tokens, _, gradients = selection_gradients(golden, inputs, "float64")
        expected = published_selection(golden, inputs[0], torch.float64)
        assert_same_selection((tokens, gradients), expected, 1e-9)


# --- The whole connector and the PyTorch program ------------------------------------------------------


def random_case(seed, frames, width=20, language_width=28, **options):
    """Return a randomly initialised published connector, features, queries and our parameters."""
    torch.manual_seed(seed)
    published = PublishedConnector(width, language_width, **options)
    features, queries = torch.randn(frames, 256, width), torch.randn(frames, 5, width)
    return published, features, queries, our_params(published.state_dict())


@pytest.mark.parametrize(("frames", "ratio"), [(7, 0.45), (7, 1.0), (30, 0.45)])
def test_connector_at_odd_sizes(frames, ratio):
    published, features, queries, params = random_case(frames, frames, clusters=12, ratio=ratio)
    initial = torch.randperm(frames)[:12]
    expected = published(features, queries, initial)
    connector = connector_of(28, clusters=12, ratio=ratio)
    options = {"initial_frames": initial.numpy()[None].astype(np.int32)} if frames > 12 else {}
    tokens, _ = run(connector, params, features.numpy(), queries.numpy(), **options)
    assert_close(tokens, expected.detach())


def compare_training(published, features, queries, params, noise, initial, **settings):
    """Compare tokens and all gradients in training; return the number of tokens and our selection."""
    features.requires_grad_()
    expected = published(features, queries, initial, noise)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)

    connector = connector_of(expected.shape[-1], **settings)
    options = {"noise": jnp.asarray(noise.numpy())[None]}
    if initial is not None:
        options["initial_frames"] = initial.numpy()[None].astype(np.int32)

    def loss(params, features):
        tokens, selection = run(connector, params, features, queries.numpy(), **options)
        return (tokens * upstream.numpy()).sum(), (tokens, selection)

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, (tokens, selection)), (of_params, of_features) = gradient(params, features.detach().numpy())
    assert_close(tokens, expected.detach())
    theirs = {name: parameter.grad for name, parameter in published.named_parameters()}
    theirs, ours = trees.flatten(our_params(theirs)), trees.flatten(of_params)
    assert ours.keys() == theirs.keys()
    # Float32 gradients through the scores are accurate to about 1e-4; tests of the selection are tighter.
    assert_close(of_features, features.grad, 1e-4)
    scores = max(np.abs(x).max() for path, x in theirs.items() if path.startswith("dpe/"))
    others = max(np.abs(x).max() for path, x in theirs.items() if not path.startswith("dpe/"))
    assert scores > 0
    for path, gradient in ours.items():
        if path.startswith("dpe/"):
            assert_close(gradient, theirs[path], 1e-3, scores)
        elif path == "cce/context/key/bias":  # it shifts all logits of a query: its gradient is rounding
            assert_close(gradient, theirs[path], scale=others)
        else:
            assert_close(gradient, theirs[path])
    return len(tokens), selection


@pytest.mark.parametrize("frames", [7, 30])
def test_connector_in_training_with_gradients(frames):
    published, features, queries, params = random_case(frames + 1, frames, clusters=12)
    torch.nn.init.normal_(published.selective.score_network.out_conv[4].weight, std=20.0)  # spread the scores
    params = our_params(published.state_dict())
    noise = torch.randn(50, min(frames, 12))
    # Our prototypes are in time order, so the initial frames must be, too.
    initial = torch.randperm(frames)[:12].sort().values if frames > 12 else None
    compare_training(published, features, queries, params, noise, initial, clusters=12)


def test_two_slots_with_the_same_frame():
    """Samples choose frames {0, 1} 3 times, {1, 2} and {1, 3} twice each: frame 1 is first in both slots."""
    published, features, queries, params = random_case(5, 4, ratio=0.5)
    pairs = [(0, 1)] * 3 + [(1, 2)] * 2 + [(1, 3)] * 2
    noise = torch.tensor([[100.0 * (t in pair) for t in range(4)] for pair in pairs])
    count, selection = compare_training(published, features, queries, params, noise, None, ratio=0.5)
    assert selection.frames.tolist() == [[1, 1]]
    assert selection.valid.tolist() == [[True, False]]
    assert count == 38 + 3 * 2
