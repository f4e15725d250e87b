"""The vision tower: resized position embeddings, selected layer, norms. Values are tested in tests/parity."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from dynfocus_jax.models.vit import VisionTransformer, resize_positions
from tests.tiny import perturb

SIZES = {
    "image_size": 8,
    "patch_size": 4,
    "width": 6,
    "depth": 3,
    "heads": 2,
    "mlp_dim": 5,
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
}


def make_tower(**changes):
    tower = VisionTransformer(**(SIZES | changes))
    frames = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8, 3), dtype=np.uint8)
    return tower, frames, perturb(jax.jit(tower.init)(jax.random.key(0), frames)["params"])


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize(("source", "target"), [(3, 7), (7, 3), (5, 6), (16, 24), (24, 16), (1, 4), (4, 1)])
def test_resized_positions_equal_those_of_torch(source, target, cls_token):
    """As in EVA-CLIP's `interpolate_pos_embed` and Hugging Face's `interpolate_pos_encoding`."""
    table = np.random.default_rng(source).standard_normal((source**2 + cls_token, 5)).astype(np.float32)
    first, patches = table[: int(cls_token)], torch.from_numpy(table[int(cls_token) :])
    square = patches.reshape(1, source, source, 5).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        square, size=(target, target), mode="bicubic", align_corners=False
    )
    expected = expected.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    resized = resize_positions(table, target, cls_token)
    assert resized.dtype == np.float32
    np.testing.assert_array_equal(resized[: int(cls_token)], first)
    np.testing.assert_allclose(resized[int(cls_token) :], expected, rtol=1e-5, atol=1e-5)


def test_positions_of_the_right_size_are_returned_and_dtypes_kept():
    table = np.random.default_rng(0).standard_normal((10, 4)).astype(ml_dtypes.bfloat16)
    assert resize_positions(table, 3, True) is table
    resized = resize_positions(table, 5, True)
    assert resized.dtype == ml_dtypes.bfloat16
    assert resized.shape == (26, 4)
    exact = resize_positions(table.astype(np.float32), 5, True)
    np.testing.assert_array_equal(resized, exact.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(("rows", "cls_token"), [(10, False), (9, True), (1, True), (0, False)])
def test_positions_of_a_grid_that_is_not_square(rows, cls_token):
    with pytest.raises(ValueError, match="do not form a square grid"):
        resize_positions(np.zeros((rows, 4), np.float32), 2, cls_token)


def test_selected_layer_is_the_output_of_its_block():
    whole, frames, params = make_tower()
    for select_layer in (-1, -2, -3):
        tower, _, alone = make_tower(select_layer=select_layer)
        built = 4 + select_layer
        assert all(leaf.shape[0] == built for leaf in jax.tree.leaves(alone["blocks"]))
        cut = params | {"blocks": jax.tree.map(lambda leaf, built=built: leaf[:built], params["blocks"])}
        shorter = whole.clone(depth=built).apply({"params": cut}, frames)
        np.testing.assert_array_equal(tower.apply({"params": cut}, frames), shorter)


def test_norms_and_bias_of_the_embeddings():
    """`pre_norm` comes before the blocks and `final_norm` after them; `patch_bias` adds a bias."""
    _, _, plain = make_tower()
    tower, frames, params = make_tower(pre_norm=True, final_norm=True, patch_bias=False, eps=1e-4)
    assert set(params) - set(plain) == {"pre_norm", "final_norm"}
    assert set(plain["patch_embedding"]) - set(params["patch_embedding"]) == {"bias"}
    # Blocks that add zero leave two norms in sequence, applied to the embeddings.
    for name, last in (("attention", "out"), ("mlp", "down")):
        params["blocks"][name][last] = jax.tree.map(jnp.zeros_like, params["blocks"][name][last])

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-4)
        return x * np.asarray(params[name]["scale"]) + np.asarray(params[name]["bias"])

    pixels = (frames[1, 0, 4:, :4] / 255.0 - SIZES["mean"]) / SIZES["std"]  # row 1, column 0
    embedded = pixels.reshape(-1) @ np.asarray(params["patch_embedding"]["kernel"])
    expected = norm(norm(embedded + np.asarray(params["position"])[1 + 2], "pre_norm"), "final_norm")
    out = tower.apply({"params": params}, frames)[1, 0, 2]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_frames_of_another_size():
    tower, frames, params = make_tower()
    with pytest.raises(ValueError, match="frames are 8x6 pixels, expected 8x8"):
        tower.apply({"params": params}, frames[..., :6, :])
