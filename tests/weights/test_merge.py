"""Tables of all families against layouts written out by hand, and the strictness of the merge."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dynfocus_jax import trees
from dynfocus_jax.errors import UserError
from dynfocus_jax.models.vit import resize_positions
from dynfocus_jax.weights.conversion import abstract_params
from dynfocus_jax.weights.merge import DTYPES, load_part, merge_part, published_arrays
from dynfocus_jax.weights.tables import FAMILIES
from tests.weights import published
from tests.weights.conftest import small_config


def write(folder, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name)
    return folder / name


def check(loaded, expected, without=()):
    """Check that two trees have the same paths (except those `without`), dtypes and bits."""
    loaded, expected = trees.flatten(loaded), trees.flatten(expected)
    assert loaded.keys() == {path for path in expected if not path.startswith(tuple(without))}
    for path, leaf in loaded.items():
        assert leaf.dtype == expected[path].dtype, path
        np.testing.assert_array_equal(leaf, expected[path], path)


def quiet(_line):
    pass


@functools.cache
def params_of(part, **fields):
    """Return shapes and random parameters of one part of a modified model."""
    shapes = abstract_params(small_config(**fields))[part]
    return shapes, published.random_params({part: shapes})[part]


CLIP = {"vision__pre_norm": True, "vision__patch_bias": False}
SIGLIP = {"vision__cls_token": False, "vision__final_norm": True}
# Family -> (part, changes of the model, function that gives the published tensors, our paths not among them)
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
    check(load_part(file, shapes, family, say=quiet), params, lacks)
    merged = merge_part(file, shapes)
    assert merged.family == family
    check(merged.params, params, lacks)


@EVERY_LAYOUT
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exported_weights_load_bit_for_bit(tmp_path, family, dtype):
    part, fields, _, lacks = LAYOUTS[family]
    shapes, params = params_of(part, **fields)
    params = jax.tree.map(lambda leaf: leaf.astype(DTYPES[dtype]), params)
    tensors = published_arrays(params, FAMILIES[family])
    check(load_part(write(tmp_path, tensors), shapes, say=quiet), params, lacks)


@EVERY_LAYOUT
def test_export_gives_the_published_tensors(family):
    part, fields, write_down, _ = LAYOUTS[family]
    _, params = params_of(part, **fields)
    exported, expected = published_arrays(params, FAMILIES[family]), write_down(params)
    assert exported.keys() <= expected.keys()
    for name, array in exported.items():
        np.testing.assert_array_equal(array, expected[name], name)
    left_out = expected.keys() - exported.keys()
    table = FAMILIES[family]
    spare = {name for name in left_out if name.startswith("blocks.3.")}  # of EVA's file
    assert all(table.reason_to_ignore(name) or table.match(name)[0].unless for name in left_out - spare)


def test_combined_checkpoint(tmp_path, shapes, params):
    """The Hugging Face InstructBLIP checkpoint holds three parts; each ignores the others' weights."""
    file = write(tmp_path, {k: v.astype(np.float32) for k, v in published.instruct_blip(params).items()})
    for part in ("vision", "text_encoder", "language"):
        lines = []
        loaded = load_part(file, shapes[part], say=lines.append)
        check(loaded, params[part], ["query_projection"])
        assert any("belongs to the" in line for line in lines)


def test_llama_vid_checkpoint(tmp_path, shapes, params):
    file = write(tmp_path, published.llama_vid(params))
    for part in ("vision", "text_encoder", "language"):
        check(load_part(file, shapes[part], say=quiet), params[part])
    merged = merge_part(file, shapes["connector"])
    assert merged.family == "llama_vid"
    check(merged.params, params["connector"], ["dpe"])
    assert {path.split("/")[0] for path in merged.absent} == {"dpe"}
    projection = load_part(file, shapes["text_encoder"]["query_projection"], "query_projection", say=quiet)
    check(projection, params["text_encoder"]["query_projection"])


def test_prefixes_of_other_models(tmp_path, shapes, params):
    """The language models of InstructBLIP and LLaVA, and a vision tower without its prefix."""
    for index, prefix in enumerate(("language_model.", "model.language_model.")):
        tensors = {
            prefix + name.removeprefix("model." * index): value
            for name, value in published.decoder(params["language"]).items()
        }
        check(
            load_part(write(tmp_path / str(index), tensors), shapes["language"], say=quiet),
            params["language"],
        )
    bare = {
        name.removeprefix("vision_model."): value
        for name, value in published.instruct_blip_vision(params["vision"]).items()
    }
    check(load_part(write(tmp_path / "bare", bare), shapes["vision"], say=quiet), params["vision"])


# --- Layers and positions -----------------------------------------------------------------------------


def test_the_spare_block_of_the_eva_file_is_reported(tmp_path, shapes, params):
    lines = []
    file = write(tmp_path, published.eva_lavis(params["vision"]))
    load_part(file, shapes["vision"], say=lines.append)
    (line,) = [line for line in lines if "4 layers" in line]
    assert "the model uses the first 3" in line
    assert "blocks.3.attn.q_bias" in line


def test_two_spare_blocks_are_too_many(tmp_path, shapes, params):
    file = write(tmp_path, published.eva_lavis(params["vision"], spare=2))
    with pytest.raises(UserError, match=r"blocks\.\[3-4\]\.mlp\.fc1\.bias(.|\n)*5 layers, the model has 3"):
        load_part(file, shapes["vision"])


def test_layers_after_the_selected_one(tmp_path):
    """`depth` is the number of layers that the file must have; any other number is an error."""
    shapes, params = params_of("vision", **CLIP, vision__select_layer=-2, vision__depth=4)
    file = write(tmp_path, published.contrastive(params, later=1))
    lines = []
    check(load_part(file, shapes, depth=4, say=lines.append), params)
    assert any("the first 3 of the file's 4 layers" in line for line in lines)
    check(load_part(write(tmp_path / "x", published.contrastive(params)), shapes, depth=4), params)
    with pytest.raises(UserError, match="the model has 3"):
        load_part(file, shapes)
    with pytest.raises(UserError, match="the model has 3"):
        load_part(write(tmp_path / "y", published.contrastive(params, later=2)), shapes, depth=4)


@pytest.mark.parametrize(("family", "fields"), [("eva_lavis", {}), ("siglip", SIGLIP)])
def test_positions_of_another_grid_are_resized_and_reported(tmp_path, family, fields):
    shapes, _ = params_of("vision", **fields)
    _, params = params_of("vision", **fields, vision__image_size=24)
    lines = []
    loaded = load_part(write(tmp_path, LAYOUTS[family][2](params)), shapes, say=lines.append)
    assert "positions resized (bicubic) from 6 x 6 to 4 x 4 patches" in lines
    expected = resize_positions(params["position"], 4, cls_token=family == "eva_lavis")
    check(loaded, params | {"position": expected})


def test_positions_of_a_grid_that_is_not_square_are_an_error(tmp_path, shapes, params):
    tensors = published.eva_lavis(params["vision"])
    tensors["pos_embed"] = tensors["pos_embed"][:, :-1]
    with pytest.raises(UserError, match=r"pos_embed has \(1, 16, 18\), expected \(1, 17, 18\)"):
        load_part(write(tmp_path, tensors), shapes["vision"])


# --- dtypes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["float16", "bfloat16"])
def test_the_dtype_of_a_file_is_kept_or_cast(tmp_path, shapes, params, kept):
    dtype = DTYPES[kept]
    tensors = {k: v.astype(dtype) for k, v in published.decoder(params["language"]).items()}
    file = write(tmp_path, tensors)
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype), params["language"])
    check(load_part(file, shapes["language"], say=quiet), expected)
    cast = jax.tree.map(lambda leaf: leaf.astype(np.float32), expected)
    check(load_part(file, shapes["language"], dtype="float32", say=quiet), cast)


def test_zero_biases_have_the_dtype_of_the_others(tmp_path, shapes, params):
    tensors = {k: v.astype(np.float16) for k, v in published.eva_lavis(params["vision"]).items()}
    loaded = load_part(write(tmp_path, tensors), shapes["vision"], say=quiet)
    bias = loaded["blocks"]["attention"]["key"]["bias"]
    assert bias.dtype == np.float16
    assert not bias.any()


def test_a_mix_of_dtypes_is_an_error(tmp_path, shapes, params):
    tensors = published.decoder(params["language"])
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    file = write(tmp_path, tensors)
    with pytest.raises(UserError, match=rf"Several dtypes: .*bfloat16 \(1, such as {name}\).*--dtype"):
        load_part(file, shapes["language"])
    loaded = load_part(file, shapes["language"], dtype="float32", say=quiet)
    expected = trees.flatten(params["language"])
    expected["blocks/up/kernel"] = expected["blocks/up/kernel"].copy()
    expected["blocks/up/kernel"][3] = tensors[name].astype(np.float32).T
    check(loaded, trees.unflatten(expected))


def test_ignored_weights_may_have_any_dtype(tmp_path, shapes, params):
    tensors = published.qformer_lavis(params["text_encoder"])
    assert tensors["Qformer.bert.embeddings.position_ids"].dtype == np.int64
    load_part(write(tmp_path, tensors), shapes["text_encoder"], say=quiet)


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.float64])
def test_quantised_weights_are_an_error(tmp_path, shapes, params, kind, dtype):
    tensors = published.decoder(params["language"])
    tensors = {k: v.astype(kind) if v.ndim == 2 else v for k, v in tensors.items()}
    with pytest.raises(UserError, match=rf"Unsupported dtypes: .*{np.dtype(kind).name} .*quantisation"):
        load_part(write(tmp_path, tensors), shapes["language"], dtype=dtype)


# --- Mismatches ---------------------------------------------------------------------------------------


def test_all_mismatches_are_listed(tmp_path, shapes, params):
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
        load_part(file, shapes["language"], "llama")
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
    with pytest.raises(UserError, match=rf"seems to contain [^:]*{title}"):
        load_part(file, shapes[wanted])


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
    with pytest.raises(UserError, match=rf"It seems to contain [^:]*{title}"):
        load_part(file, shapes, wanted)


def test_unknown_names(tmp_path, shapes):
    file = write(tmp_path, {"foo.1": np.ones(2, np.float32), "foo.0": np.ones(2, np.float32)})
    with pytest.raises(UserError, match=r"Its first names are foo\.0, foo\.1"):
        load_part(file, shapes["language"])


def test_two_names_for_one_parameter(tmp_path, shapes, params):
    tensors = published.decoder(params["language"])
    tensors["norm.weight"] = tensors["model.norm.weight"]
    with pytest.raises(UserError, match=r"norm\.weight and .*norm\.weight fill the same parameter"):
        load_part(write(tmp_path, tensors), shapes["language"])


def test_a_tied_head_must_equal_the_embedding(tmp_path):
    shapes, params = params_of("language", language__tied_embeddings=True)
    tensors = published.decoder(params)
    check(load_part(write(tmp_path / "a", tensors), shapes, say=quiet), params)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    check(load_part(write(tmp_path / "b", tensors), shapes, say=quiet), params)
    tensors["lm_head.weight"][3, 5] += 1e-3
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding(.|\n)*tied_embeddings"):
        load_part(write(tmp_path / "c", tensors), shapes)


def test_the_error_of_a_missing_head_names_the_setting(tmp_path, shapes, params):
    tensors = published.decoder(params["language"])
    del tensors["lm_head.weight"]
    with pytest.raises(UserError, match=r"1 missing: lm_head\.weight(.|\n)*tied_embeddings to True"):
        load_part(write(tmp_path, tensors), shapes["language"])


def test_skip(tmp_path, shapes, params):
    """A skipped parameter is absent; skipping only some layers of a stacked parameter is an error."""
    tensors = published.decoder(params["language"]) | {"model.extra.0": np.ones(2, np.float32)}
    file = write(tmp_path, tensors)
    with pytest.raises(UserError, match=r"1 unexpected: model\.extra\.0"):
        load_part(file, shapes["language"])
    merged = merge_part(file, shapes["language"], skip=(r"model\.extra\..*", "unused"))
    check(merged.params, params["language"])
    assert merged.used_skips == {r"model\.extra\..*"}
    merged = merge_part(file, shapes["language"], skip=(r"model\.extra\..*", r"lm_head\.weight"))
    check(merged.params, params["language"], ["head"])
    assert merged.absent == ["head/kernel"]
    with pytest.raises(UserError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_part(file, shapes["language"], skip=(r"model\.extra\..*", r".*layers\.1\.mlp\.up_proj.*"))


def test_a_nonzero_key_bias_has_no_published_name_in_lavis(params):
    vision = trees.flatten(params["vision"])
    vision["blocks/attention/key/bias"] = vision["blocks/attention/key/bias"] + 1
    with pytest.raises(UserError, match="no published name for blocks/attention/key/bias"):
        published_arrays(trees.unflatten(vision), FAMILIES["eva_lavis"])
