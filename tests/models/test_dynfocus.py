"""The assembled model: lower precision, where the vision tower's tokens go."""

import jax
import jax.numpy as jnp
import numpy as np

from dynfocus_jax.models.vit import VisionTransformer
from tests.tiny import change, forward, make_sample, model_of, pad, random_params, shaken, stack, tiny_config


def test_bfloat16_runs_and_is_close():
    rng = np.random.default_rng(0)
    samples = [make_sample(rng, 1, 8, 3), make_sample(rng, 4, 10, 5), make_sample(rng, 0, 6, 2)]
    batch = stack([pad(sample, 5, 10) for sample in samples])
    single = model_of(tiny_config())
    params = random_params(single, batch)
    half = model_of(change(tiny_config(), dtype="bfloat16"))
    visual, losses = forward(half, True)(params, batch, rng.standard_normal((3, 20, 5)).astype(np.float32))
    assert visual.tokens.dtype == jnp.bfloat16
    assert losses.dtype == jnp.float32
    assert visual.selection.scores.dtype == jnp.float32
    exact, expected = forward(single, True)(params, batch, np.zeros((3, 20, 5), np.float32))
    np.testing.assert_array_equal(visual.count, exact.count)
    np.testing.assert_allclose(losses, expected, rtol=0.05)
    half_params = change(tiny_config(), dtype="bfloat16", param_dtype="bfloat16")
    init = jax.eval_shape(model_of(half_params).init, jax.random.key(0), batch)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(init))


def test_vision_tower_sees_pixels_in_place():
    """Without blocks to mix them, patch (r, c) is the linear map of its own normalised pixels, and the class
    token, where there is one, stands before them."""
    sizes = {"image_size": 8, "patch_size": 4, "width": 6, "depth": 1, "heads": 2, "mlp_dim": 5}
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    for cls_token in (False, True):
        tower = VisionTransformer(**sizes, mean=mean, std=std, cls_token=cls_token)
        params = shaken(tower.init(jax.random.key(0), frames)["params"])
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


def test_class_token_does_not_reach_the_connector_but_the_text_encoder():
    config = tiny_config()
    config.model.vision.cls_token = True
    model = model_of(config)
    rng = np.random.default_rng(1)
    batch = stack([pad(make_sample(rng, 3, 6, 3), 3, 6)])
    params = random_params(model, batch)
    visual = model.apply({"params": params}, batch, method="visual_tokens")
    assert visual.count[0] == 2 * 1 + 2 * (4 + 6)  # as without class token: P = 4, M = 4 + 2, J = 2
    assert params["vision"]["position"].shape == (17, 16)
