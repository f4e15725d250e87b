"""Every family's table against layouts spelled out by hand, and the strictness of the merge."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dynfocus_jax import trees
from dynfocus_jax.errors import UserError
from dynfocus_jax.models.vit import resize_positions
from dynfocus_jax.weights import merge
from dynfocus_jax.weights.parts import abstract_params
from dynfocus_jax.weights.tables import FAMILIES
from tests.weights import published
from tests.weights.conftest import small_config


def write(folder, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name)
    return folder / name


def check(loaded, expected, without=()):
    """The same paths (but for those `without`) and bits."""
    loaded, expected = trees.flatten(loaded), trees.flatten(expected)
    assert loaded.keys() == {path for path in expected if not path.startswith(tuple(without))}
    for path, leaf in loaded.items():
        assert leaf.dtype == expected[path].dtype, path
        np.testing.assert_array_equal(leaf, expected[path], path)


def quiet(_line):
    pass


@functools.cache
def params_of(part, **fields):
    """Shapes and random parameters of a part of a changed model."""
    shapes = abstract_params(small_config(**fields))[part]
    return shapes, published.random_params({part: shapes})[part]


CLIP = {"vision__pre_norm": True, "vision__patch_bias": False}
SIGLIP = {"vision__cls_token": False, "vision__final_norm": True}
# Family -> (part, changes of the model, the published tensors of the part's parameters, what they lack)
LAYOUTS = {
    "eva_lavis": ("vision", {}, published.eva_lavis, ()),
    "instruct_blip_vision": ("vision", {}, published.instruct_blip_vision, ()),
    "clip": ("vision", CLIP, published.contrastive, ()),
    "siglip": ("vision", SIGLIP, published.contrastive, ()),
    "qformer_lavis": ("text_encoder", {}, published.qformer_lavis, ("query_projection",)),
    "llama": ("language", {}, published.decoder, ()),
    "qwen2": ("language", {"language__qkv_bias": True}, published.decoder, ()),
    "qwen3": ("language", {"language__qk_norm": True}, published.decoder, ()),
}
EVERY_LAYOUT = pytest.mark.parametrize("family", LAYOUTS)


@EVERY_LAYOUT
def test_layout(tmp_path, family):
    part, fields, write_down, lacks = LAYOUTS[family]
    shapes, params = params_of(part, **fields)
    file = write(tmp_path, write_down(params))
    check(merge.load(file, family, shapes, say=quiet), params, lacks)
    merged = merge.read_part(file, None, shapes)
    assert merged.family == family
    check(merged.params, params, lacks)


@EVERY_LAYOUT
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_is_read_back_bit_for_bit(tmp_path, family, dtype):
    part, fields, _, lacks = LAYOUTS[family]
    shapes, params = params_of(part, **fields)
    params = jax.tree.map(lambda leaf: leaf.astype(merge.DTYPES[dtype]), params)
    tensors = merge.export(params, FAMILIES[family])
    check(merge.load(write(tmp_path, tensors), None, shapes, say=quiet), params, lacks)


@EVERY_LAYOUT
def test_export_gives_the_published_tensors(family):
    part, fields, write_down, _ = LAYOUTS[family]
    _, params = params_of(part, **fields)
    exported, expected = merge.export(params, FAMILIES[family]), write_down(params)
    assert exported.keys() <= expected.keys()
    for name, array in exported.items():
        np.testing.assert_array_equal(array, expected[name], name)
    left_out = expected.keys() - exported.keys()
    table = FAMILIES[family]
    spare = {name for name in left_out if name.startswith("blocks.3.")}  # of EVA's file
    assert all(table.reason_to_ignore(name) or table.match(name)[0].unless for name in left_out - spare)


def test_combined_checkpoint(tmp_path, shapes, params):
    """The Hugging Face InstructBLIP holds three parts; each leaves the others to the others."""
    file = write(tmp_path, {k: v.astype(np.float32) for k, v in published.instruct_blip(params).items()})
    for part in ("vision", "text_encoder", "language"):
        lines = []
        loaded = merge.load(file, None, shapes[part], say=lines.append)
        check(loaded, params[part], ["query_projection"])
        assert any("belongs to the" in line for line in lines)


def test_llama_vid_checkpoint(tmp_path, shapes, params):
    file = write(tmp_path, published.llama_vid(params))
    for part in ("vision", "text_encoder", "language"):
        check(merge.load(file, None, shapes[part], say=quiet), params[part])
    merged = merge.read_part(file, None, shapes["connector"])
    assert merged.family == "llama_vid"
    check(merged.params, params["connector"], ["dpe"])
    assert {path.split("/")[0] for path in merged.absent} == {"dpe"}
    projection = merge.load(file, "query_projection", shapes["text_encoder"]["query_projection"], say=quiet)
    check(projection, params["text_encoder"]["query_projection"])


def test_prefixes_of_other_models(tmp_path, shapes, params):
    """The language model of InstructBLIP and of LLaVA; the vision tower alone."""
    for index, prefix in enumerate(("language_model.", "model.language_model.")):
        tensors = {
            prefix + name.removeprefix("model." * index): value
            for name, value in published.decoder(params["language"]).items()
        }
        check(
            merge.load(write(tmp_path / str(index), tensors), None, shapes["language"], say=quiet),
            params["language"],
        )
    bare = {
        name.removeprefix("vision_model."): value
        for name, value in published.instruct_blip_vision(params["vision"]).items()
    }
    check(merge.load(write(tmp_path / "bare", bare), None, shapes["vision"], say=quiet), params["vision"])


# --- Layers and positions -----------------------------------------------------------------------------


def test_the_spare_block_of_the_eva_file_is_named(tmp_path, shapes, params):
    lines = []
    file = write(tmp_path, published.eva_lavis(params["vision"]))
    merge.load(file, None, shapes["vision"], say=lines.append)
    (line,) = [line for line in lines if "4 layers" in line]
    assert "the first 3 are built" in line
    assert "blocks.3.attn.q_bias" in line


def test_two_spare_blocks_are_too_many(tmp_path, shapes, params):
    file = write(tmp_path, published.eva_lavis(params["vision"], spare=2))
    with pytest.raises(UserError, match=r"blocks\.\[3-4\]\.mlp\.fc1\.bias(.|\n)*5 layers, the model 3"):
        merge.load(file, None, shapes["vision"])


def test_layers_behind_the_selected_one(tmp_path):
    """`depth` tells how many layers the file should have; other numbers are mistakes."""
    shapes, params = params_of("vision", **CLIP, vision__select_layer=-2, vision__depth=4)
    file = write(tmp_path, published.contrastive(params, later=1))
    lines = []
    check(merge.load(file, None, shapes, depth=4, say=lines.append), params)
    assert any("4 layers, of which the first 3 are built" in line for line in lines)
    check(merge.load(write(tmp_path / "x", published.contrastive(params)), None, shapes, depth=4), params)
    with pytest.raises(UserError, match="the model 3"):
        merge.load(file, None, shapes)
    with pytest.raises(UserError, match="the model 3"):
        merge.load(write(tmp_path / "y", published.contrastive(params, later=2)), None, shapes, depth=4)


@pytest.mark.parametrize(("family", "fields"), [("eva_lavis", {}), ("siglip", SIGLIP)])
def test_positions_of_another_grid_are_resized_and_it_is_said(tmp_path, family, fields):
    shapes, _ = params_of("vision", **fields)
    _, params = params_of("vision", **fields, vision__image_size=24)
    lines = []
    loaded = merge.load(write(tmp_path, LAYOUTS[family][2](params)), None, shapes, say=lines.append)
    assert "positions resized (bicubic) from 6 x 6 to 4 x 4 patches" in lines
    expected = resize_positions(params["position"], 4, cls_token=family == "eva_lavis")
    check(loaded, params | {"position": expected})


def test_positions_that_form_no_square_are_an_error(tmp_path, shapes, params):
    tensors = published.eva_lavis(params["vision"])
    tensors["pos_embed"] = tensors["pos_embed"][:, :-1]
    with pytest.raises(UserError, match=r"pos_embed has \(1, 16, 18\), expected \(1, 17, 18\)"):
        merge.load(write(tmp_path, tensors), None, shapes["vision"])


# --- dtypes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["float16", "bfloat16"])
def test_the_dtype_of_the_file_is_kept_or_cast(tmp_path, shapes, params, kept):
    dtype = merge.DTYPES[kept]
    tensors = {k: v.astype(dtype) for k, v in published.decoder(params["language"]).items()}
    file = write(tmp_path, tensors)
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype), params["language"])
    check(merge.load(file, None, shapes["language"], say=quiet), expected)
    cast = jax.tree.map(lambda leaf: leaf.astype(np.float32), expected)
    check(merge.load(file, None, shapes["language"], dtype="float32", say=quiet), cast)


def test_zero_biases_have_the_dtype_of_the_others(tmp_path, shapes, params):
    tensors = {k: v.astype(np.float16) for k, v in published.eva_lavis(params["vision"]).items()}
    loaded = merge.load(write(tmp_path, tensors), None, shapes["vision"], say=quiet)
    bias = loaded["blocks"]["attention"]["key"]["bias"]
    assert bias.dtype == np.float16
    assert not bias.any()


def test_a_mix_of_dtypes_is_an_error(tmp_path, shapes, params):
    tensors = published.decoder(params["language"])
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    file = write(tmp_path, tensors)
    with pytest.raises(UserError, match=rf"Several dtypes .*bfloat16: 1 like {name}.*--dtype"):
        merge.load(file, None, shapes["language"])
    loaded = merge.load(file, None, shapes["language"], dtype="float32", say=quiet)
    expected = trees.flatten(params["language"])
    expected["blocks/up/kernel"] = expected["blocks/up/kernel"].copy()
    expected["blocks/up/kernel"][3] = tensors[name].astype(np.float32).T
    check(loaded, trees.unflatten(expected))


def test_ignored_weights_may_have_any_dtype(tmp_path, shapes, params):
    tensors = published.qformer_lavis(params["text_encoder"])
    assert tensors["Qformer.bert.embeddings.position_ids"].dtype == np.int64
    merge.load(write(tmp_path, tensors), None, shapes["text_encoder"], say=quiet)


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.float64])
def test_quantised_weights_are_an_error(tmp_path, shapes, params, kind, dtype):
    tensors = published.decoder(params["language"])
    tensors = {k: v.astype(kind) if v.ndim == 2 else v for k, v in tensors.items()}
    with pytest.raises(UserError, match=rf"not quantised.*{np.dtype(kind).name}"):
        merge.load(write(tmp_path, tensors), None, shapes["language"], dtype=dtype)


# --- What does not fit --------------------------------------------------------------------------------


def test_every_misfit_is_listed_at_once(tmp_path, shapes, params):
    tensors = published.decoder(params["language"])
    for layer in (1, 2, 4):
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    del tensors["model.norm.weight"]
    tensors |= {"model.extra": np.ones(2, np.float32), "model.layers.0.self_attn.q_proj.bias": np.ones(36)}
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        tensors[name] = tensors[name][:-1]
    tensors["lm_head.weight"] = np.ones((41, 24), np.float32)
    file = write(tmp_path, tensors)
    with pytest.raises(UserError) as caught:
        merge.load(file, "llama", shapes["language"])
    first, *lines = str(caught.value).splitlines()
    assert first == f"{file} does not fit the model as {FAMILIES['llama'].title}:"
    assert lines == [
        "  4 missing: model.layers.[1-2,4].mlp.up_proj.weight, model.norm.weight",
        "  2 unexpected: model.extra, model.layers.0.self_attn.q_proj.bias",
        "  3 mis-shaped: lm_head.weight has (41, 24), expected (40, 24); "
        "model.layers.[0-1].self_attn.k_proj.weight has (17, 24), expected (18, 24)",
    ]


@pytest.mark.parametrize(
    ("held", "wanted", "title"),
    [
        ("language", "vision", "Llama"),
        ("vision", "language", "EVA-CLIP ViT of LAVIS"),
        ("text_encoder", "vision", "Q-Former of LAVIS"),
        ("vision", "connector", "EVA-CLIP"),
    ],
)
def test_a_file_of_another_part(tmp_path, shapes, params, held, wanted, title):
    layouts = {"language": "llama", "vision": "eva_lavis", "text_encoder": "qformer_lavis"}
    file = write(tmp_path, LAYOUTS[layouts[held]][2](params[held]))
    with pytest.raises(UserError, match=rf"seems to hold [^:]*{title}"):
        merge.load(file, None, shapes[wanted])


@pytest.mark.parametrize(
    ("held", "fields", "wanted", "title"),
    [
        ("clip", CLIP, "eva_lavis", "CLIP vision model"),
        ("eva_lavis", {}, "instruct_blip_vision", "EVA-CLIP ViT of LAVIS"),
        ("qwen2", {"language__qkv_bias": True}, "llama", "Qwen2"),
        ("llama", {}, "qwen3", "Llama"),
    ],
)
def test_a_file_of_another_family(tmp_path, held, fields, wanted, title):
    part, wanted_fields, _, _ = LAYOUTS[wanted]
    shapes, _ = params_of(part, **wanted_fields)
    _, params = params_of(part, **fields)
    file = write(tmp_path, {k: np.asarray(v, np.float32) for k, v in LAYOUTS[held][2](params).items()})
    with pytest.raises(UserError, match=rf"it seems to hold [^:]*{title}"):
        merge.load(file, wanted, shapes)


def test_unknown_names(tmp_path, shapes):
    file = write(tmp_path, {"foo.1": np.ones(2, np.float32), "foo.0": np.ones(2, np.float32)})
    with pytest.raises(UserError, match=r"its names are of the kind foo\.0, foo\.1"):
        merge.load(file, None, shapes["language"])


def test_two_names_for_one_parameter(tmp_path, shapes, params):
    tensors = published.decoder(params["language"])
    tensors["norm.weight"] = tensors["model.norm.weight"]
    with pytest.raises(UserError, match=r"norm\.weight and .*norm\.weight fill the same parameter"):
        merge.load(write(tmp_path, tensors), None, shapes["language"])


def test_a_tied_head_must_equal_the_embedding(tmp_path):
    shapes, params = params_of("language", language__tied_embeddings=True)
    tensors = published.decoder(params)
    check(merge.load(write(tmp_path / "a", tensors), None, shapes, say=quiet), params)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    check(merge.load(write(tmp_path / "b", tensors), None, shapes, say=quiet), params)
    tensors["lm_head.weight"][3, 5] += 1e-3
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding(.|\n)*tied_embeddings"):
        merge.load(write(tmp_path / "c", tensors), None, shapes)


def test_a_missing_head_names_the_setting(tmp_path, shapes, params):
    tensors = published.decoder(params["language"])
    del tensors["lm_head.weight"]
    with pytest.raises(UserError, match=r"1 missing: lm_head\.weight(.|\n)*tied_embeddings to True"):
        merge.load(write(tmp_path, tensors), None, shapes["language"])


def test_skip(tmp_path, shapes, params):
    """Extra weights may be skipped; what the model needs is then absent, or missing if only some of it is."""
    tensors = published.decoder(params["language"]) | {"model.extra.0": np.ones(2, np.float32)}
    file = write(tmp_path, tensors)
    with pytest.raises(UserError, match=r"1 unexpected: model\.extra\.0"):
        merge.load(file, None, shapes["language"])
    merged = merge.read_part(file, None, shapes["language"], skip=(r"model\.extra\..*", "unused"))
    check(merged.params, params["language"])
    assert merged.skipped == {r"model\.extra\..*"}
    merged = merge.read_part(file, None, shapes["language"], skip=(r"model\.extra\..*", r"lm_head\.weight"))
    check(merged.params, params["language"], ["head"])
    assert merged.absent == ["head/kernel"]
    with pytest.raises(UserError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        merge.load(file, None, shapes["language"], skip=(r"model\.extra\..*", r".*layers\.1\.mlp\.up_proj.*"))


def test_a_key_bias_has_no_place_in_the_file_of_lavis(params):
    vision = trees.flatten(params["vision"])
    vision["blocks/attention/key/bias"] = vision["blocks/attention/key/bias"] + 1
    with pytest.raises(UserError, match="no place for blocks/attention/key/bias"):
        merge.export(trees.unflatten(vision), FAMILIES["eva_lavis"])
