"""DPE: selected prototypes, scores and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from dynfocus_jax import trees
from dynfocus_jax.connectors.dynfocus.event_prototypes import DPE_FIELDS, EventPrototypes
from dynfocus_jax.connectors.dynfocus.selection import kept_counts, min_max
from dynfocus_jax.connectors.interface import ConnectorInputs, QuestionWords
from dynfocus_jax.sections import fill_section
from dynfocus_jax.video_language_model import row_randomness
from tests.tiny import perturb

PATCHES, WIDTH, K = 4, 6, 8


def make_dpe(mode="paper", **changes):
    fields = {"num_prototypes": K, "neighbors": 3, "ratio": 0.5, "samples": 40} | changes
    settings = FrozenConfigDict(fill_section(DPE_FIELDS, fields, "dpe"))
    return EventPrototypes(settings, mode, grid=(2, 2), pool=(1, 2))


def clips(frames, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((batch, frames, PATCHES, WIDTH)), jnp.float32)


def inputs(features, mask=None, question=None, oracle=None, randomness=None):
    """Return the inputs of a batch; all frames are valid unless there is a mask."""
    mask = jnp.ones(features.shape[:2], bool) if mask is None else mask
    question = None if question is None else QuestionWords(*question)
    return ConnectorInputs(features, mask, question=question, oracle_frames=oracle, randomness=randomness)


def select(dpe, variables, features, *, train=False, **given):
    return dpe.apply(variables, inputs(features, **given), train=train)


def make_randomness(features, seed=1, at_random=False, **given):
    return row_randomness(jax.random.key(seed), len(features), at_random, **given)


def init(dpe, features, **given):
    variables = jax.jit(lambda key: dpe.init(key, inputs(features, **given), train=False))
    return {"params": perturb(variables(jax.random.key(0))["params"])}


@pytest.mark.parametrize(
    ("prototypes", "ratio", "selected", "expected"),
    [
        (25, 0.28, None, {0: 0, 1: 1, 24: 7, 25: 7}),  # 0.28 * 25 is 7.000000000000001
        (25, 0.8, None, {1: 1, 2: 2, 5: 4, 25: 20}),
        (25, 1.0, None, {0: 0, 1: 1, 13: 13, 25: 25}),
        (80, 0.45, None, {1: 1, 2: 1, 3: 2, 12: 6, 80: 36}),
        (25, 1e-6, None, {0: 0, 1: 1, 25: 1}),
        (8, 0.5, 3, {0: 0, 1: 1, 2: 2, 3: 3, 8: 3}),
        (2, 0.5, 5, {0: 0, 1: 1, 2: 2}),
    ],
)
def test_kept_counts(prototypes, ratio, selected, expected):
    fields = {"num_prototypes": prototypes, "ratio": ratio, "num_selected": selected}
    kept = kept_counts(fill_section(DPE_FIELDS, fields, "dpe"), prototypes)
    assert len(kept) == prototypes + 1
    assert {count: kept[count] for count in expected} == expected


def test_min_max():
    scores = jnp.array(
        [[1.0, 3.0, 2.0, 99.0], [5.0, 5.0, -9.0, 5.0], [1.0, 2.0, 3.0, 4.0], [7.0, 0.0, 0.0, 0.0]]
    )
    valid = jnp.array([[1, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    expected = [[0, 2 / (2 + 1e-5), 1 / (2 + 1e-5), 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(min_max(scores, valid), expected, rtol=1e-6)
    gradient = jax.grad(lambda s: (min_max(s, valid) * scores).sum())(scores)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[~np.asarray(valid)].any()


def test_evaluation_selects_the_highest_scores_in_time_order():
    dpe, features = make_dpe(), clips(20)
    selection = select(dpe, init(dpe, features), features)
    assert selection.prototype_valid.all()
    for row in range(2):
        centers, scores = np.asarray(selection.centers[row]), np.asarray(selection.scores[row])
        assert (np.diff(centers) > 0).all()
        best = np.sort(np.argsort(-scores)[:4])
        np.testing.assert_array_equal(selection.frames[row], centers[best])
        np.testing.assert_array_equal(selection.indicators[row].argmax(-1), best)
    assert (selection.scores.min(), selection.valid.all()) == (0.0, True)
    assert 0.999 < selection.scores.max() < 1.0
    # A frame has the score of its event, and a key frame is in its own event.
    at_centers = np.take_along_axis(np.asarray(selection.frame_scores), np.asarray(selection.centers), 1)
    np.testing.assert_array_equal(at_centers, selection.scores)


def test_few_frames_are_their_own_events():
    dpe, features = make_dpe(num_selected=6), clips(4)
    mask = jnp.array([[True] * 4, [True, True, False, False]])
    selection = select(dpe, init(dpe, features), features, mask=mask)
    pooled = np.asarray(features).reshape(2, 4, 2, 2, WIDTH).mean(2)  # 2 x 2 patches, pooled to 1 x 2
    np.testing.assert_allclose(selection.events[0], pooled[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(selection.events[1, :2], pooled[1, :2], rtol=1e-6, atol=1e-7)
    assert selection.valid.tolist() == [[True] * 4, [True, True, False, False]]
    assert not selection.events[1, 2:].any()
    assert not selection.frame_scores[1, 2:].any()


def test_no_frames():
    dpe, features = make_dpe(), clips(4)
    mask = jnp.zeros((2, 4), bool)
    variables = init(dpe, features)
    noise = jnp.ones((2, 40, K))

    def loss(variables, train):
        randomness = make_randomness(features, noise=noise) if train else None
        selection = select(dpe, variables, features, mask=mask, train=train, randomness=randomness)
        return selection.events.sum() + selection.scores.sum(), selection

    for train in (False, True):
        gradients, selection = jax.grad(loss, has_aux=True)(variables, train)
        assert not selection.valid.any()
        assert not selection.scores.any()
        assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_training_slots_are_distinct_frames():
    """The scores are almost equal, so several slots' indicators have the same arg-max."""
    dpe = make_dpe(num_selected=5, samples=3)
    features = clips(20, batch=16)
    randomness = make_randomness(features, seed=0)
    selection = select(dpe, init(dpe, features), features, train=True, randomness=randomness)
    top = np.asarray(selection.indicators.argmax(-1))
    assert any(len(set(row)) < 5 for row in top.tolist()), (
        "no two slots have the same arg-max, so this tests nothing"
    )
    for row in range(16):
        assert len(set(selection.frames[row].tolist())) == 5
        assert set(selection.frames[row].tolist()) <= set(selection.centers[row].tolist())
    np.testing.assert_allclose(selection.indicators.sum(-1), 1.0, rtol=1e-6)


def test_training_events_are_mixed_by_the_indicators():
    dpe, features = make_dpe(), clips(5)
    selection = select(dpe, init(dpe, features), features, train=True, randomness=make_randomness(features))
    pooled = np.asarray(features).reshape(2, 5, 2, 2, WIDTH).mean(2)
    expected = np.einsum("bjk,bkpc->bjpc", np.asarray(selection.indicators), pooled)
    np.testing.assert_allclose(selection.events, expected, rtol=1e-5, atol=1e-6)
    assert len(np.unique(selection.indicators)) > 2  # not one-hot


def param_gradients(dpe, variables, features, at_random, **given):
    def loss(variables):
        randomness = make_randomness(features, at_random=at_random)
        selection = select(dpe, variables, features, train=True, randomness=randomness, **given)
        return jnp.sin(selection.events * 3).sum()

    return trees.flatten(jax.grad(loss)(variables)["params"])


def test_gradient_reaches_every_score_net_parameter_unless_selection_is_random():
    dpe, features = make_dpe(), clips(20)
    variables = init(dpe, features)
    gradients = param_gradients(dpe, variables, features, False)
    shift = gradients.pop("score_net/out_dense_2/bias")  # min-max normalisation removes it
    assert len(gradients) == 9
    for path, gradient in gradients.items():
        assert np.abs(gradient).max() > 1e-6, path
    assert np.abs(shift).max() < 1e-4 * max(np.abs(gradient).max() for gradient in gradients.values())
    at_random = param_gradients(dpe, variables, features, True)
    assert not any(gradient.any() for gradient in at_random.values())


def test_random_selection_is_uniform_over_valid_prototypes():
    """Chi-square tests of counts and of triples, in 2,000 draws of 3 of 6 valid events."""
    rows = 2000
    dpe = make_dpe(num_selected=3, samples=1)
    features = clips(K, batch=rows)
    mask = jnp.broadcast_to(jnp.arange(K) < 6, (rows, K))
    randomness = make_randomness(features, seed=3, at_random=True)
    selection = select(dpe, init(dpe, features[:1]), features, mask=mask, train=True, randomness=randomness)
    frames = np.asarray(selection.frames)
    assert selection.valid.all()
    assert (np.diff(frames, axis=1) > 0).all()
    assert frames.max() < 6
    counts = np.bincount(frames.ravel(), minlength=6)
    # Counts of draws without replacement have covariance 0.3 (I - 1 1'/6): chi-square, 5 degrees of freedom.
    assert ((counts - rows / 2) ** 2).sum() / (0.3 * rows) < 20.5  # p = 0.001
    triples = np.unique(frames @ [36, 6, 1], return_counts=True)[1]
    assert len(triples) == 20
    assert ((triples - rows / 20) ** 2).sum() / (rows / 20) < 43.8  # 19 degrees of freedom, p = 0.001


def question(features, words=3, seed=5):
    rng = np.random.default_rng(seed)
    embedded = jnp.asarray(rng.standard_normal((features.shape[0], words, 7)), jnp.float32)
    return embedded, jnp.full(features.shape[0], words)


def test_question_term_starts_at_zero_with_a_gradient():
    plain, conditioned, features = make_dpe(), make_dpe(question_conditioned=True), clips(20)
    asked = question(features)
    variables = jax.jit(lambda key: conditioned.init(key, inputs(features, question=asked), train=False))(
        jax.random.key(0)
    )
    params = variables["params"]
    without = {"params": {key: params[key] for key in ("score_net",)}}
    expected = select(plain, without, features)
    actual = select(conditioned, variables, features, question=asked)
    np.testing.assert_array_equal(actual.scores, expected.scores)
    gradients = param_gradients(conditioned, variables, features, False, question=asked)
    assert np.abs(gradients["question_score/bilinear/kernel"]).max() > 1e-6


def test_scores_depend_on_valid_question_words_only():
    dpe, features = make_dpe(question_conditioned=True), clips(20)
    words, _ = question(features)
    variables = init(dpe, features, question=question(features))

    def scores(words, length):
        asked = (words, jnp.full(2, length))
        return np.asarray(select(dpe, variables, features, question=asked).scores)

    other = words.at[:, 1].add(1.0)
    assert np.abs(scores(words, 2) - scores(other, 2)).max() > 1e-3
    np.testing.assert_array_equal(scores(words, 1), scores(other, 1))


def test_question_score_against_its_formula():
    dpe, features = make_dpe(question_conditioned=True), clips(5)
    words, _ = question(features)
    lengths = jnp.array([3, 1])
    variables = init(dpe, features, question=(words, lengths))
    with_question = select(dpe, variables, features, question=(words, lengths)).scores
    params = variables["params"]
    plain = make_dpe()

    # Take the raw scores from the score net, add the question's term by hand, and normalise again.
    events = np.asarray(features, np.float64).reshape(2, 5, 2, 2, WIDTH).mean(2)
    _, state = plain.apply(
        {"params": {"score_net": params["score_net"]}},
        inputs(features),
        train=False,
        capture_intermediates=True,
    )
    (raw,) = state["intermediates"]["score_net"]["__call__"]
    norm, kernel = params["question_score"]["event_norm"], params["question_score"]["bilinear"]["kernel"]
    centred = events - events.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
    for row in range(2):
        total = np.array(raw[row], np.float64)
        for word in range(lengths[row]):
            mapped = np.asarray(words[row, word], np.float64) @ np.asarray(kernel, np.float64)
            total += (normed[row] @ mapped).max(-1)
        expected = (total - total.min()) / (total.max() - total.min() + 1e-5)
        np.testing.assert_allclose(with_question[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("total", "expected"), [(8, [1, 4, 6]), (3, [0, 1, 2]), (2, [0, 1]), (0, [])])
def test_uniform_selection(total, expected):
    dpe, features = make_dpe(selection="uniform", num_selected=3), clips(8)
    mask = jnp.broadcast_to(jnp.arange(8) < total, (2, 8))
    selection = select(dpe, {}, features, mask=mask)
    assert selection.frames[0][selection.valid[0]].tolist() == expected


def test_oracle_selects_the_first_given_frames():
    dpe, features = make_dpe(selection="oracle", num_selected=2), clips(6)
    oracle = jnp.array([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]], bool)
    mask = jnp.array([[True] * 6, [True] * 5 + [False]])
    selection = select(dpe, {}, features, mask=mask, train=True, oracle=oracle)
    assert selection.frames[0].tolist() == [1, 3]
    assert selection.valid.tolist() == [[True, True], [True, False]]
    assert selection.frames[1, 0] == 4
    pooled = np.asarray(features).reshape(2, 6, 2, 2, WIDTH).mean(2)
    np.testing.assert_allclose(selection.events[0], pooled[0, [1, 3]], rtol=1e-6, atol=1e-7)
