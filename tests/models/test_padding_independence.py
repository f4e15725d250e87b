"""A sample's visual tokens and loss depend neither on the other samples of its batch nor on its bucket."""

import jax
import numpy as np
import pytest

from dynfocus_jax.connectors.interface import ConnectorInputs, QuestionWords
from dynfocus_jax.connectors.registry import make_connector
from dynfocus_jax.video_language_model import row_randomness
from tests.tiny import (
    SAMPLES,
    K,
    change,
    forward,
    make_sample,
    model_of,
    pad,
    perturb,
    random_params,
    stack,
    tiny_config,
)

LONG = 2 * K + 1
RELEASED = {"mode": "released", "dpe__clustering": "kmeans", "dpe__jacobian": "diagonal"}
VARIANTS = {
    "paper": {},
    "plain_f": {"projector": "mlp"},
    "ratio": {"dpe__num_selected": None, "dpe__ratio": 0.6},
    "uniform": {"dpe__selection": "uniform", "dpe__num_selected": 3, "cce__rods": ()},
    "uniform_ratio": {"dpe__selection": "uniform", "dpe__num_selected": None, "dpe__ratio": 0.4},
    "oracle": {"dpe__selection": "oracle"},
    "oracle_ratio": {"dpe__selection": "oracle", "dpe__num_selected": None, "dpe__ratio": 0.2},
    "kmeans": {"dpe__clustering": "kmeans", "cce__clustering": "kmeans"},
    "kmeans_random": {"dpe__clustering": "kmeans", "dpe__kmeans_init": "random"},
    "weighted_kmeans": {"dpe__clustering": "weighted_kmeans", "cce__clustering": "weighted_kmeans"},
    "question": {"dpe__question_conditioned": True},
    "single_grained": {"cce__cones": "single_grained"},
    "cross_attention": {"cce__cones": "cross_attention"},
    "pair_coarse": {"cce__cones": "pair", "cce__rods": ("coarse", "context")},
    "kmeans_pair_coarse": {"dpe__clustering": "kmeans", "cce__cones": "pair", "cce__rods": ("coarse",)},
    "patches": {"cce__cones": "patches", "cce__rods": ("content",)},
    "rods_only": {"cce__cones": "none"},
    "rods3": {"cce__cones": "none", "cce__rods": ("coarse", "context")},
    "released": RELEASED,
    "released_pair": RELEASED | {"cce__cones": "pair", "cce__rods": ("content",)},
    "released_all": RELEASED | {"dpe__num_selected": K},
}


def make_samples():
    rng = np.random.default_rng(3)
    still = rng.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    return {
        "image": make_sample(rng, 1, 7, 3),
        "few_frames": make_sample(rng, K - 2, 9, 8, oracle=(0, 2)),
        "as_many_frames_as_events": make_sample(rng, K, 4, 1, oracle=(3,)),
        "many_frames": make_sample(rng, LONG, 8, 5, oracle=(2, 5, 9), subtitle_frames=(0, 0, 3, 10)),
        "many_frames_at_end": make_sample(rng, LONG - 1, 10, 5, at_end=True, oracle=(0,)),
        "still_image_repeated": make_sample(rng, np.repeat(still, LONG, 0), 6, 4, oracle=(5, 6)),
        "still_image_few": make_sample(rng, np.repeat(still, K - 1, 0), 6, 4, subtitle_frames=(2,)),
        "text_only": make_sample(rng, 0, 10, 6),
    }


def differences(together, alone, rows):
    """Yield a line for each difference between row i of `together` and `alone[i]`."""
    scale = np.abs(together.tokens).max()
    for row, name in enumerate(rows):
        count, single = together.count[row], jax.tree.map(lambda x: x[0], alone[row])
        if single.count != count:
            yield f"{name}: {single.count} tokens alone, {count} in the batch"
            continue
        if count > together.tokens.shape[1]:
            yield f"{name}: {count} tokens do not fit into {together.tokens.shape[1]}"
        error = np.abs(single.tokens[:count] - together.tokens[row, :count]).max(initial=0.0) / scale
        if not error <= 1e-6:
            yield f"{name}: visual tokens differ by {error:.1e} of their scale"
        for tokens, mask in ((together.tokens[row], together.mask[row]), (single.tokens, single.mask)):
            if mask[:count].sum() != count or mask[count:].any() or tokens[count:].any():
                yield f"{name}: padding is not where the mask says, or not zero"


def make_noise(rows):
    return np.random.default_rng(0).standard_normal((rows, SAMPLES, K)).astype(np.float32)


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("mode", ["paper", "released"])
def test_whole_model(mode, train):
    """A mixed batch has the visual tokens and losses of each sample alone in a smaller bucket."""
    config = change(tiny_config(), **VARIANTS[mode])
    model = model_of(config)
    cases = make_samples()
    batch = stack([pad(sample, LONG + 6, 14, subtitle=6) for sample in cases.values()])
    params = random_params(model, batch)
    run = forward(model, train)
    noise = make_noise(len(cases))
    together, losses = jax.device_get(run(params, batch, noise))
    alone, single_losses = [], []
    for row, sample in enumerate(cases.values()):
        frames = K if len(sample.frames) <= K else LONG
        single = stack([pad(sample, frames, 10, subtitle=4)])
        visual, loss = jax.device_get(run(params, single, noise[row : row + 1]))
        alone.append(visual)
        single_losses.append(loss[0])
    assert not list(differences(together, alone, cases))
    assert losses.min() > 0.1
    np.testing.assert_allclose(single_losses, losses, rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_connector(variant):
    """A mixed batch has the visual tokens of batches of other samples in smaller buckets."""
    config = change(tiny_config(), **VARIANTS[variant])
    connector = make_connector(config.model)
    rng = np.random.default_rng(4)
    width, patches, queries, words = 16, 16, 2, 6
    still = rng.standard_normal((1, patches, width))
    clips = {
        "image": rng.standard_normal((1, patches, width)),
        "few_frames": rng.standard_normal((K - 2, patches, width)),
        "as_many_frames_as_events": rng.standard_normal((K, patches, width)),
        "many_frames": rng.standard_normal((LONG, patches, width)),
        "many_frames_less_one": rng.standard_normal((LONG - 1, patches, width)),
        "still_repeated": np.repeat(still, LONG, 0),
        "still_few": np.repeat(still, K - 1, 0),
        "text_only": np.zeros((0, patches, width)),
    }
    texts = rng.standard_normal((len(clips), LONG + 6, queries, width)).astype(np.float32)
    questions = rng.standard_normal((len(clips), words, width)).astype(np.float32)
    lengths = np.arange(len(clips), dtype=np.int32) % words + 1
    oracle = rng.random((len(clips), LONG + 6)) < 0.5
    noise = make_noise(len(clips))

    def randomness(rows):
        whole = row_randomness(jax.random.key(7), len(clips))
        return whole._replace(keys=whole.keys[np.array(rows)], given={"noise": noise[rows]})

    def inputs(rows, frames, train=False):
        features = np.full(
            (len(rows), frames, patches, width), 7.0, np.float32
        )  # padding holds arbitrary values
        mask = np.zeros((len(rows), frames), bool)
        for place, row in enumerate(rows):
            clip = list(clips.values())[row]
            features[place, : len(clip)], mask[place, : len(clip)] = clip, True
        return ConnectorInputs(
            features,
            mask,
            text_queries=texts[rows, :frames] if connector.needs_text_queries else None,
            question=QuestionWords(questions[rows], lengths[rows]),
            oracle_frames=oracle[rows, :frames],
            randomness=randomness(rows) if train else None,
        )

    all_rows = list(range(len(clips)))
    params = {"params": perturb(connector.init(jax.random.key(0), inputs(all_rows, LONG + 6))["params"])}
    failures = []
    for train in (False, True):

        def run(rows, frames, train=train):
            visual = connector.apply(params, inputs(rows, frames, train), train=train)
            return jax.device_get(visual._replace(focus=None))

        together, alone = run(all_rows, LONG + 6), {}
        short = [row for row, clip in enumerate(clips.values()) if len(clip) <= K]
        for rows, frames in ((short[::-1], K), (sorted({*all_rows} - {*short})[::-1], LONG)):
            out = run(rows, frames)
            alone |= {row: jax.tree.map(lambda x, i=i: x[i : i + 1], out) for i, row in enumerate(rows)}
        failures += [f"train={train}, {text}" for text in differences(together, alone, clips)]
    assert not failures, "\n".join(failures)
