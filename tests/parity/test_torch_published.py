"""The PyTorch comparison program against golden values of the authors' released code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.torch_published import (
    Merger,
    PerturbedTopK,
    PublishedConnector,
    ScoreNetwork,
    Selection,
    dpc_knn,
    weighted_kmeans,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "released"


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def under(golden, prefix):
    """Return the entries whose names start with a prefix, without the prefix."""
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def assert_close(actual, expected, tolerance=1e-5, scale=None):
    """Check the largest error relative to `scale`; by default, to the largest expected magnitude."""
    assert actual.shape == expected.shape
    scale = expected.abs().max() if scale is None else scale
    error = (actual.detach() - expected).abs().max() / scale
    assert error <= tolerance, f"relative error {error:.1e}"


def connector_of(golden, vision_width, language_width):
    """Return a connector with the parameters in a golden file, which may hold those of one part only."""
    connector = PublishedConnector(vision_width, language_width)
    parameters = under(golden, "p.")
    missing, unexpected = connector.load_state_dict(parameters, strict=False)
    assert not unexpected
    assert len(missing) + len(parameters) == len(connector.state_dict())
    return connector


@pytest.mark.parametrize("case", "abc")
def test_dpc_knn(case):
    golden = load(f"dpc_knn_{case}")
    prototypes, assignment = dpc_knn(golden["features"], int(golden["num_clusters"]), int(golden["k"]))
    assert torch.equal(assignment, golden["assignment"])
    assert_close(prototypes, golden["merged"])


def test_dpc_knn_orders_ties_by_index():
    """Each corner of a square occurs twice: all densities are equal, so the first of each pair is denser."""
    corners = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0], [8.0, 8.0]])
    prototypes, assignment = dpc_knn(corners.repeat_interleave(2, 0)[None], 6, 2)
    # One centre per corner, then the second copies, which are clusters of their own.
    assert assignment[0].tolist() == [0, 4, 1, 5, 2, 2, 3, 3]
    assert_close(prototypes[0], corners[[0, 1, 2, 3, 0, 1]])


def test_kmeans():
    golden = load("kmeans")
    centroids, labels, weights = weighted_kmeans(golden["features"].flatten(1), golden["initial"])
    assert torch.equal(labels, golden["labels"])
    assert torch.equal(weights, golden["weights"])
    assert_close(centroids, golden["centroids"].flatten(1))


def test_kmeans_drops_the_update_below_the_tolerance_and_keeps_empty_clusters():
    points = torch.tensor([[3.0], [3.0], [4.0], [8.0]])
    initial = torch.tensor([0, 1, 3])  # points 0 and 1 are equal: the second cluster stays empty
    centroids, labels, weights = weighted_kmeans(points, initial, iterations=1)
    assert labels.tolist() == [0, 0, 0, 2]
    assert weights.tolist() == [3.0, 0.0, 1.0]
    assert_close(centroids, torch.tensor([[10 / 3], [3.0], [8.0]]))
    stopped, _, _ = weighted_kmeans(points, initial, tol=0.5)  # the first update moves the centroid by 1/3
    assert torch.equal(stopped, points[initial])


def test_kmeans_weights():
    points = torch.tensor([[0.0], [1.0], [8.0]])
    centroids, _, mass = weighted_kmeans(points, torch.tensor([0, 2]), torch.tensor([1.0, 3.0, 2.0]))
    assert mass.tolist() == [4.0, 2.0]
    assert_close(centroids, torch.tensor([[0.75], [8.0]]))


def test_merger():
    golden = load("merger")
    merger = Merger((16, 6), (8, 3))
    merger.load_state_dict({"score.weight": golden["score.weight"], "score.bias": golden["score.bias"]})
    assert_close(merger(golden["features"]), golden["out"])


def test_score_network():
    golden = load("score_network")
    network = ScoreNetwork(golden["inputs"].shape[-1] // 2)
    network.load_state_dict(under(golden, "p."))
    assert_close(network(golden["inputs"]), golden["scores"])


def test_perturbed_topk():
    golden = load("perturbed_topk")
    scores = golden["scores"].requires_grad_()
    indicators = PerturbedTopK.apply(scores, golden["noise"], int(golden["k"]), float(golden["sigma"]))
    indicators.backward(golden["grad_indicators"])
    assert_close(indicators, golden["indicators"])
    assert_close(scores.grad, golden["grad_scores"])


def test_perturbed_topk_without_noise_has_no_gradient():
    golden = load("perturbed_topk")
    scores = golden["scores"].requires_grad_()
    PerturbedTopK.apply(scores, golden["noise"], 5, 0.0).backward(golden["grad_indicators"])
    assert torch.equal(scores.grad, torch.zeros_like(scores))


def selection_of(golden):
    width = golden["event"].shape[-1]
    selection = Selection(width, float(golden["ratio"]), float(golden["sigma"]))
    selection.score_network.load_state_dict(under(golden, "p."))
    prototypes = int(golden["T"])
    events = golden["event"][0].unflatten(0, (prototypes, -1)).requires_grad_()
    spatial = golden["spatial"][0].unflatten(0, (prototypes, -1)).requires_grad_()
    return selection, events, spatial


def test_selection_in_evaluation():
    golden = load("selection")
    selection, events, spatial = selection_of(golden)
    tokens, indices = selection(events, spatial)
    assert torch.equal(indices, golden["eval_indices"][0])
    assert_close(tokens, golden["eval_tokens"])


# The raw scores of this golden file span 5e-4 only, so their normalisation turns one float32 rounding of a
# score into about 3e-4 of the gradients that pass through it. A wrong epsilon shows as 5e-2.
SCORE_GRADIENT_TOLERANCE = 1e-3


def test_selection_in_training_with_gradients():
    golden = load("selection")
    selection, events, spatial = selection_of(golden)
    tokens, indices = selection(events, spatial, golden["noise"][0])
    tokens.backward(golden["grad_tokens"])
    assert torch.equal(indices, golden["train_indices"][0])
    assert_close(tokens, golden["train_tokens"])
    assert_close(spatial.grad.flatten(0, 1), golden["grad_spatial"][0])  # does not pass through the scores
    assert_close(events.grad.flatten(0, 1), golden["grad_event"][0], SCORE_GRADIENT_TOLERANCE)

    gradients = under(golden, "g.")
    parameters = dict(selection.score_network.named_parameters())
    assert parameters.keys() == gradients.keys()
    # The last bias shifts all scores, which normalisation cancels: its gradient is rounding around zero.
    shift = "out_conv.4.bias"
    scale = max(gradient.abs().max() for gradient in gradients.values())
    assert_close(parameters.pop(shift).grad, gradients.pop(shift), SCORE_GRADIENT_TOLERANCE, scale)
    for name, parameter in parameters.items():
        assert_close(parameter.grad, gradients[name], SCORE_GRADIENT_TOLERANCE)


def test_rods():
    golden = load("rods")
    connector = connector_of(golden, golden["prototypes"].shape[-1], golden["out"].shape[-1])
    assert_close(connector.rods(golden["prototypes"], golden["text_queries"]), golden["out"])


@pytest.mark.parametrize("frames", [1, 2, 12, 100])
def test_connector(frames):
    golden = load(f"connector_T{frames}")
    connector = connector_of(golden, golden["features"].shape[-1], golden["out"].shape[-1])
    tokens = connector(golden["features"], golden["text_queries"], golden.get("initial"))
    assert_close(tokens, golden["out"])


def test_connector_in_training_without_perturbation_is_evaluation():
    """With zero noise in every sample, the differentiable selection must equal the hard one."""
    golden = load("connector_T12")
    connector = connector_of(golden, golden["features"].shape[-1], golden["out"].shape[-1])
    tokens = connector(golden["features"], golden["text_queries"], noise=torch.zeros(3, 12))
    assert_close(tokens, golden["out"])
    tokens.square().sum().backward()
    without_gradient = [name for name, parameter in connector.named_parameters() if parameter.grad is None]
    assert without_gradient == []


def test_rods_come_first_if_all_frames_are_kept():
    """Each frame has its two rods and then its cone, like a single image."""
    torch.manual_seed(0)
    connector = PublishedConnector(8, 12, ratio=1.0)
    features, text_queries = torch.randn(3, 256, 8), torch.randn(3, 4, 8)
    frames = connector(features, text_queries).unflatten(0, (3, 40))
    spatial = connector.spatial_prototypes(features)
    cones = connector.mm_projector(torch.cat([connector.pool(features), spatial], dim=1))
    assert_close(frames, torch.cat([connector.rods(spatial, text_queries), cones], dim=1))


def test_a_frame_chosen_twice_has_one_cone():
    torch.manual_seed(0)
    connector = PublishedConnector(8, 12)
    cones, spatial, text_queries = torch.randn(3, 38, 8), torch.randn(4, 22, 8), torch.randn(4, 5, 8)
    tokens = connector.encode(cones, torch.tensor([1, 1, 3]), spatial, text_queries)
    rods = connector.rods(spatial, text_queries)
    first, _, last = connector.mm_projector(cones)
    assert_close(tokens, torch.cat([rods[0], first, rods[2], last]))
