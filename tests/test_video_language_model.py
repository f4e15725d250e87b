"""The assembled model: bfloat16, the class token and subtitles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynfocus_jax.models.vit import VisionTransformer
from dynfocus_jax.training.losses import answer_loss
from tests.tiny import (
    change,
    forward,
    make_sample,
    model_of,
    pad,
    perturb,
    random_params,
    stack,
    tiny_config,
    with_kind,
)


def test_bfloat16_is_close_to_float32():
    rng = np.random.default_rng(0)
    samples = [make_sample(rng, 1, 8, 3), make_sample(rng, 4, 10, 5), make_sample(rng, 0, 6, 2)]
    batch = stack([pad(sample, 5, 10) for sample in samples])
    single = model_of(tiny_config())
    params = random_params(single, batch)
    half = model_of(change(tiny_config(), dtype="bfloat16"))
    visual, losses = forward(half, True)(params, batch, rng.standard_normal((3, 20, 5)).astype(np.float32))
    assert visual.tokens.dtype == jnp.bfloat16
    assert losses.dtype == jnp.float32
    assert visual.focus.scores.dtype == jnp.float32
    exact, expected = forward(single, True)(params, batch, np.zeros((3, 20, 5), np.float32))
    np.testing.assert_array_equal(visual.count, exact.count)
    np.testing.assert_allclose(losses, expected, rtol=0.05)
    half_params = change(tiny_config(), dtype="bfloat16", param_dtype="bfloat16")
    init = jax.eval_shape(model_of(half_params).init, jax.random.key(0), batch)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(init))


def test_vision_tower_embeds_normalised_patches():
    """With blocks that add zero, a patch is the linear map of its own normalised pixels.

    The class token, if there is one, comes first.
    """
    sizes = {"image_size": 8, "patch_size": 4, "width": 6, "depth": 1, "heads": 2, "mlp_dim": 5}
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    for cls_token in (False, True):
        tower = VisionTransformer(**sizes, mean=mean, std=std, cls_token=cls_token)
        params = perturb(tower.init(jax.random.key(0), frames)["params"])
        for name in ("attention", "mlp"):
            last = "out" if name == "attention" else "down"
            params["blocks"][name][last] = jax.tree.map(jnp.zeros_like, params["blocks"][name][last])
        out = tower.apply({"params": params}, frames, keep_cls=True)
        assert out.shape == (2, 3, 4 + cls_token, 6)
        np.testing.assert_array_equal(tower.apply({"params": params}, frames), out[:, :, int(cls_token) :])
        embedding = jax.tree.map(np.asarray, params["patch_embedding"])
        patch = (frames[1, 2, 0:4, 4:8] / 255.0 - mean) / std  # row 0, column 1
        expected = patch.reshape(-1) @ embedding["kernel"] + embedding["bias"]
        expected = expected + np.asarray(params["position"])[1 + cls_token]
        np.testing.assert_allclose(out[1, 2, 1 + cls_token], expected, rtol=1e-5, atol=1e-5)


def test_class_token_does_not_reach_the_connector():
    config = tiny_config()
    config.model.vision.cls_token = True
    model = model_of(config)
    rng = np.random.default_rng(1)
    batch = stack([pad(make_sample(rng, 3, 6, 3), 3, 6)])
    params = random_params(model, batch)
    visual = jax.jit(lambda: model.apply({"params": params}, batch, method="visual_tokens"))()
    assert visual.count[0] == 2 * 1 + 2 * (4 + 6)  # as without a class token: P = 4, M = 4 + 2, J = 2
    assert params["vision"]["position"].shape == (17, 16)


@pytest.mark.parametrize("kind", ["dynfocus", "pooled"])
def test_subtitles_follow_their_frames(kind):
    """Subtitles are embedded as text, and do not change the visual tokens."""
    config = tiny_config()
    config.stages[-1].connector = with_kind(config, kind)
    model = model_of(config)
    rng = np.random.default_rng(2)
    places = [(0, 0, 2, 4, 4, 4), (5,), ()]  # frame of each subtitle token, in clips of 5, 6 and 1 frames
    samples = [
        make_sample(rng, frames, 6, 3, subtitle_frames=some)
        for frames, some in zip((5, 6, 1), places, strict=True)
    ]
    silent = [each._replace(subtitles=np.zeros(0, int), subtitle_frames=np.zeros(0, int)) for each in samples]
    batch, plain = (
        stack([pad(each, 6, 7, subtitle=7) for each in samples]),
        stack([pad(s, 6, 7) for s in silent]),
    )
    params = random_params(model, plain)
    run = jax.jit(lambda batch: model.apply({"params": params}, batch, method="visual_tokens"))
    subtitled, visual = run(batch), run(plain)
    embedding = np.asarray(params["language"]["embedding"]["embedding"])
    for row, sample in enumerate(samples):
        tokens, expected = iter(visual.tokens[row, : visual.count[row]]), []
        for frame in range(len(sample.frames)):
            expected += [next(tokens) for _ in range(_num_tokens(visual.focus, row, frame))]
            expected += list(embedding[sample.subtitles[sample.subtitle_frames == frame]])
        assert not list(tokens)
        assert subtitled.count[row] == len(expected) == visual.count[row] + len(places[row])
        np.testing.assert_array_equal(subtitled.tokens[row, : subtitled.count[row]], np.array(expected))


def _num_tokens(focus, row, frame):
    """Return the number of visual tokens of a frame: that in the focus, or P for a pooled connector."""
    return 4 if focus is None else focus.tokens[row, frame]


def test_subtitles_affect_the_loss_and_have_gradients():
    """The loss depends on the subtitles but not on their padding, and their embeddings have gradients."""
    config = tiny_config()
    config.stages[-1].connector = with_kind(config, "pooled")  # compiles faster
    model = model_of(config)
    sample = make_sample(np.random.default_rng(5), 4, 8, 3, subtitle_frames=(1, 3))
    batch = stack([pad(sample, 5, 9, subtitle=4)])
    params = random_params(model, batch)

    @jax.jit
    def losses(params, batch):
        return answer_loss(model.apply({"params": params}, batch).logits, batch)[0][0]

    loss, gradient = jax.value_and_grad(losses)(params, batch)
    other, padding = batch.subtitles.copy(), batch.subtitles.copy()
    other[0, 1] = 4 + (other[0, 1] - 3) % 36
    padding[0, 2:] = 9
    assert abs(losses(params, batch._replace(subtitles=other)) - loss) > 1e-4
    assert losses(params, batch._replace(subtitles=padding)) == loss
    word = int(set(sample.subtitles.tolist()).difference(sample.tokens.tolist()).pop())
    assert np.abs(gradient["language"]["embedding"]["embedding"][word]).max() > 0
