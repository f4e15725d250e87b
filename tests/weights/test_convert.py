"""`python -m dynfocus_jax.convert`, and training from its checkpoints."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from dynfocus_jax import trees
from dynfocus_jax.data.prepare import make_tokenizer, prepare_data_root
from dynfocus_jax.errors import UserError
from dynfocus_jax.models.llama import Llama
from dynfocus_jax.training.checkpoints import read_params, save_params
from dynfocus_jax.training.initial_params import check_initial
from dynfocus_jax.training.loop import StageRun
from dynfocus_jax.validation import validate
from dynfocus_jax.weights.conversion import abstract_params, export_model, read_model
from dynfocus_jax.weights.export import atomic_folder
from dynfocus_jax.weights.merge import DTYPES
from tests.commands import command
from tests.tiny import mesh_of, with_kind
from tests.weights import published
from tests.weights.conftest import small_config

W_Q = "text_encoder/query_projection"


def same(actual: dict, expected: dict, without: tuple[str, ...] = ()) -> None:
    """Check that two trees have the same paths (except those `without`), dtypes and bits."""
    actual, expected = trees.flatten(actual), trees.flatten(expected)
    assert actual.keys() == {path for path in expected if not path.startswith(without)}
    for path, leaf in actual.items():
        assert leaf.dtype == expected[path].dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[path]), path)


def to_torch(tensors: dict) -> dict:
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}


def write_files(folder: Path, params: dict) -> dict[str, str]:
    """Write each part to a file or folder in another layout; return {part: path}."""
    folder.mkdir(exist_ok=True)
    torch.save(to_torch(published.eva_lavis(params["vision"])), folder / "eva_vit_g.pth")
    text = {"model": to_torch(published.qformer_lavis(params["text_encoder"]))}
    torch.save(text, folder / "instruct_blip_vicuna7b_trimmed.pth")
    torch.save(to_torch(published.llama_vid_connector(params)), folder / "mm_projector.bin")
    language = folder / "vicuna"
    language.mkdir()
    tensors = published.decoder(params["language"])
    index = {}
    for number in range(3):
        shard = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)[number::3]}
        file = f"model-{number + 1:05}-of-00003.safetensors"
        save_file(shard, language / file)
        index |= dict.fromkeys(shard, file)
    (language / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return {
        "vision": str(folder / "eva_vit_g.pth"),
        "text_encoder": str(folder / "instruct_blip_vicuna7b_trimmed.pth"),
        "language": str(language),
        "connector": str(folder / "mm_projector.bin"),
    }


@pytest.fixture(scope="session")
def files(params, tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("published"), params)


def config_with(files: dict, **fields):
    """Return the small configuration with these files in `config.weights`."""
    config = small_config(**fields)
    config.weights.update(files)
    return config


def convert(*arguments) -> tuple[int, str, str]:
    """Run the command; return its exit code, stdout and stderr."""
    return command("convert", *arguments)


# --- Published files to a checkpoint ------------------------------------------------------------------


def test_every_part_from_its_own_file(files, params, capsys):
    converted = read_model(config_with(files), None)
    same(converted, params, without=("connector/dpe",))
    printed = capsys.readouterr().out
    assert "so training initialises them randomly: connector/dpe\n" in printed
    assert "the model uses the first 3 of the file's 4 layers: blocks.3." in printed
    assert f"{W_Q}: {files['connector']}, 0.000 M parameters, float32" in printed


def test_all_parts_from_one_checkpoint(tmp_path, params, capsys):
    file = tmp_path / "llama_vid.pth"
    torch.save(to_torch(published.llama_vid(params)), file)
    parts = ("vision", "text_encoder", "language", "connector")
    same(read_model(config_with(dict.fromkeys(parts, str(file))), None), params, without=("connector/dpe",))


def test_instruct_blip_combined_checkpoint(tmp_path, params, capsys):
    tensors = {name: np.asarray(t, np.float32) for name, t in published.instruct_blip(params).items()}
    tensors["qformer.embeddings.position_ids"] = np.arange(8)[None]
    torch.save(to_torch(tensors), tmp_path / "pytorch_model.bin")
    named = dict.fromkeys(("vision", "text_encoder", "language"), str(tmp_path))
    same(read_model(config_with(named), None), params, without=("connector", W_Q))
    assert "training initialises them randomly: connector, text_encoder/query_projection\n" in (
        capsys.readouterr().out
    )


def test_single_parts(files, params, capsys):
    for part in ("vision", "language"):
        converted = read_model(config_with({part: files[part]}), "bfloat16")
        expected = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), {part: params[part]})
        same(converted, expected)
    converted = read_model(config_with({"connector": files["connector"]}), None)
    held = {
        "connector": params["connector"],
        "text_encoder": {"query_projection": params["text_encoder"]["query_projection"]},
    }
    same(converted, held, without=("connector/dpe",))


@pytest.fixture(scope="session")
def converted(files, tmp_path_factory):
    """A checkpoint written by the command, its stdout, and its arguments."""
    folder = tmp_path_factory.mktemp("converted")
    (folder / "small.py").write_text(
        "from tests.weights.conftest import small_config\n\nget_config = lambda arg='': small_config()\n"
    )
    named = [f"--config.weights.{part}={path}" for part, path in files.items()]
    arguments = (f"--config={folder}/small.py", *named, f"--output={folder}/checkpoint")
    code, stdout, stderr = convert(*arguments)
    assert code == 0, stderr
    assert sorted(os.listdir(folder)) == ["checkpoint", "small.py"]
    return folder / "checkpoint", stdout, arguments


def test_command(converted, params):
    folder, stdout, arguments = converted
    assert f"written to {folder}" in stdout
    same(read_params(folder), params, without=("connector/dpe",))
    code, _, stderr = convert(*arguments)
    assert code == 2
    assert f"{folder} already exists" in stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--config.weights.vision=nowhere.pth"],
            "config.weights: these files do not exist: vision=nowhere.pth. Download them",
        ),
        (["--config.model.vision.mlp_dim=23"], "9 mis-shaped"),
        (["--dtype=int8"], "dtype"),
    ],
)
def test_a_failed_command_leaves_no_files(converted, tmp_path, change, message):
    *arguments, _ = converted[2]
    code, _, stderr = convert(*arguments, f"--output={tmp_path}/new", *change)
    assert code == 2
    assert message in stderr
    assert "Traceback" not in stderr
    assert os.listdir(tmp_path) == []


def test_missing_arguments(converted):
    for arguments, message in (
        ([], "expected one of --output and --export"),
        (["--output=x", "--export=y"], "expected one of --output and --export"),
        (["--export=y"], "use --export (the folder to write) and --checkpoint (what to export) together"),
    ):
        code, _, stderr = convert(converted[2][0], *arguments)
        assert (code, message in stderr) == (2, True), stderr


def test_an_interrupted_write_leaves_no_files(tmp_path, params):
    def write():
        with atomic_folder(tmp_path / "new") as folder:
            save_params(folder, params["connector"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert os.listdir(tmp_path) == []


# --- Errors -------------------------------------------------------------------------------------------


def assert_error(config, match: str) -> None:
    """Check that converting the files of a configuration fails with a message."""
    with pytest.raises(UserError, match=match):
        read_model(config, None)


def test_no_file_is_set():
    assert_error(small_config(), r"config\.weights: no file is set")


def test_a_part_that_the_model_lacks(files):
    config = config_with({"text_encoder": files["text_encoder"]}, cce__rods=("content",))
    assert_error(config, r"config\.weights\.text_encoder: .* is set, but the model has no text_encoder")


def test_a_file_for_another_part(files):
    assert_error(
        config_with({"vision": files["language"]}), r"config\.weights\.vision: .*It seems to contain Llama"
    )


def test_skip_cannot_leave_a_backbone_incomplete(files):
    config = config_with(files)
    config.weights.skip = (r"lm_head\.weight",)
    assert_error(config, "leaves out parameters that the model needs: language/head")
    config.weights.skip = ("nothing.like.this",)
    assert_error(config, r"'nothing\.like\.this' matches no published name")


def test_skip_may_leave_out_parts_of_the_connector(files, params, capsys):
    config = config_with(files)
    config.weights.skip = (r"model\.vlm_att_key_projector\..*",)
    same(read_model(config, None), params, without=("connector/dpe", "connector/cce/context/key"))
    assert "training initialises them randomly: connector/cce/context/key, connector/dpe\n" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "heads is 6, expected 3"),
        ({"rms_norm_eps": 1e-6, "num_key_value_heads": 3}, "eps is 1e-05, expected 1e-06"),
        ({"rms_norm_eps": 1e-5, "rope_theta": 5e5}, "rope_theta is 10000.0, expected 500000.0"),
        (
            {"rms_norm_eps": 1e-5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling is 'none', expected 'linear'; rope_factor is 1.0, expected 2.0",
        ),
        (
            {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_scaling is 'none', expected 'yarn'",
        ),
        ({"text_config": {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}}, "tied_embeddings is False"),
    ],
)
def test_settings_that_shapes_do_not_show(tmp_path, params, settings, wrong):
    """The config.json beside the weights must agree: weights of 6 heads of width 6 also fit 3 of width 12."""
    path = write_files(tmp_path / "published", params)["language"]
    (Path(path) / "config.json").write_text(json.dumps({"rms_norm_eps": 1e-5} | settings))
    assert_error(
        config_with({"language": path}), rf"config\.model\.language differs from .*config\.json.*{wrong}"
    )


def test_a_config_json_of_another_part_is_ignored(tmp_path, params, capsys):
    """LLaMA-VID's config.json describes the language model, not the vision tower in the same file."""
    torch.save(to_torch(published.llama_vid(params)), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "num_attention_heads": 6}))
    read_model(config_with({"vision": str(tmp_path)}), None)


# --- Export -------------------------------------------------------------------------------------------

VARIANTS = {
    "paper": {},
    "released": {"cce__levels": ((4, 3), (2, 2)), "mode": "released"},
    "clip_qwen2": {"vision__pre_norm": True, "vision__patch_bias": False, "language__qkv_bias": True},
    "siglip_qwen3": {
        "vision__cls_token": False,
        "vision__final_norm": True,
        "vision__activation": "gelu_tanh",
        "language__qk_norm": True,
        "language__tied_embeddings": True,
        "connector__projector": "residual",
        "dpe__question_conditioned": True,
        "cce__cones": "cross_attention",
    },
    "clip_before_last": {"vision__pre_norm": True, "vision__patch_bias": False, "vision__select_layer": -2},
}


def variant(name: str):
    fields = dict(VARIANTS[name])
    mode = fields.pop("mode", "paper")
    config = small_config(**fields)
    config.model.connector.mode = mode
    return config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_export_converts_back_bit_for_bit(tmp_path, name, dtype, capsys):
    config = variant(name)
    params = published.random_params(abstract_params(config), seed=3)
    params = jax.tree.map(lambda leaf: leaf.astype(DTYPES[dtype]), params)
    with atomic_folder(tmp_path / "out") as folder:
        export_model(folder, params, config, shard_bytes=3000)
    parts = ("connector", "language", "text_encoder", "vision")
    assert sorted(os.listdir(tmp_path / "out")) == list(parts)
    assert len(list((tmp_path / "out" / "language").glob("model-*-of-*.safetensors"))) > 1
    config.weights.update({part: str(tmp_path / "out" / part) for part in parts})
    same(read_model(config, None), params)
    assert "not in the checkpoint" not in capsys.readouterr().out


def test_export_of_a_checkpoint_of_another_model(tmp_path, params):
    with pytest.raises(UserError, match=r"the checkpoint does not fit config\.model \(missing: .*query_norm"):
        export_model(tmp_path, params, small_config(language__qk_norm=True), 1000)
    with pytest.raises(UserError, match="of another shape: language"):
        export_model(tmp_path, params, small_config(language__mlp_dim=33), 1000)
    assert os.listdir(tmp_path) == []


LANGUAGE_VARIANTS = {
    "llama": {},
    "linear": {"rope_scaling": "linear", "rope_factor": 3.0},
    "llama3": {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_length": 16, "rope_theta": 500.0},
    "qwen2": {"qkv_bias": True, "tied_embeddings": True},
    "qwen3": {"qk_norm": True, "rope_theta": 100.0},
}


@pytest.mark.parametrize("name", LANGUAGE_VARIANTS)
def test_transformers_loads_the_exported_language_model(tmp_path, name, capsys):
    config = small_config(**{f"language__{field}": value for field, value in LANGUAGE_VARIANTS[name].items()})
    params = published.random_params(abstract_params(config), seed=4)
    params = jax.tree.map(lambda leaf: 0.4 * leaf, params)
    with atomic_folder(tmp_path / "out") as folder:
        export_model(folder, params, config, shard_bytes=3000)
    reference, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "language", output_loading_info=True
    )
    assert not any(report.values()), report
    assert reference.dtype == torch.float32

    model = Llama(**config.model.language)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 30))

    def logits(module, tokens):
        hidden = module(module.embed(tokens), jnp.full(len(tokens), tokens.shape[1]))
        return module.logits(hidden)

    ours = jax.jit(lambda params: model.apply({"params": params}, tokens, method=logits))(params["language"])
    with torch.no_grad():
        theirs = reference(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_export_command(converted, params, tmp_path, capsys):
    folder, _, arguments = converted
    out = tmp_path / "out"
    code, stdout, stderr = convert(
        arguments[0], f"--checkpoint={folder}", f"--export={out}", "--shard_gib=1e-5"
    )
    assert code == 0, stderr
    assert "connector: 10 weights as DynFocus connector" in stdout
    assert len(list((out / "language").glob("*.safetensors"))) > 1
    parts = ("connector", "language", "text_encoder", "vision")
    same(
        read_model(config_with({part: str(out / part) for part in parts}), None),
        params,
        without=("connector/dpe",),
    )


# --- Training from a converted checkpoint -------------------------------------------------------------


@pytest.fixture(scope="session")
def start(data_root, tmp_path_factory):
    """A function that prepares the stages of a training run that starts from the checkpoint `initial`."""

    def build(initial, names=("align",), change=lambda config: None):
        config = small_config()
        config.data.root = str(data_root)
        config.stages = tuple(stage for stage in config.stages if stage.name in names)
        change(config)
        config.initial = str(initial)
        validate(config)
        root = prepare_data_root(config.data)
        tokenizer = make_tokenizer(config, root / config.data.vocabulary)
        workdir = tmp_path_factory.mktemp("start")
        stages = [
            StageRun(config, index, workdir=workdir, data_root=root, tokenizer=tokenizer, mesh=mesh_of())
            for index in range(len(config.stages))
        ]
        check_initial(config.initial, stages)
        return stages

    return build


def test_training_starts_from_the_converted_parameters(converted, params, start, capsys):
    (stage,) = start(converted[0])
    begun, _ = stage.run(None, stop_at=0)
    begun = trees.flatten(jax.device_get(begun))
    expected = trees.flatten(params)
    for path, leaf in begun.items():
        equal = np.array_equal(leaf, expected[path])
        assert equal == (not path.startswith("connector/dpe/")), path
    assert "new parameters, randomly initialised: connector/dpe\n" in capsys.readouterr().out
    after, _ = stage.run(None, stop_at=2)
    after = trees.flatten(jax.device_get(after))
    for path, leaf in after.items():
        if path.startswith(("vision/", "language/")):
            np.testing.assert_array_equal(leaf, expected[path], path)
    assert not np.array_equal(
        after["connector/projector/up/kernel"], expected["connector/projector/up/kernel"]
    )
    assert not np.array_equal(after[f"{W_Q}/kernel"], expected[f"{W_Q}/kernel"])


def test_dtypes_of_a_converted_checkpoint(files, start, tmp_path, capsys):
    """Frozen parameters have the model's `dtype`, trained ones its `param_dtype`; values are unchanged."""
    converted = read_model(config_with(files), "bfloat16")
    save_params(tmp_path, converted)

    def change(config):
        config.model.dtype = "bfloat16"

    (stage,) = start(tmp_path, change=change)
    begun, _ = stage.run(None, stop_at=0)
    converted = trees.flatten(converted)
    for path, leaf in trees.flatten(begun).items():
        if path in converted:
            assert leaf.dtype == (jnp.float32 if stage.is_trained(path) else jnp.bfloat16), path
            np.testing.assert_array_equal(np.asarray(leaf, np.float32), converted[path].astype(np.float32))


@pytest.mark.parametrize(
    "lost", ["vision", "language", "text_encoder", "vision/blocks/mlp/up", "language/head"]
)
def test_training_refuses_a_missing_backbone(params, start, tmp_path, lost):
    flat = {path: leaf for path, leaf in trees.flatten(params).items() if not path.startswith(lost)}
    save_params(tmp_path, trees.unflatten(flat))
    with pytest.raises(UserError, match=rf"initial .* does not fit config\.model \(missing: .*{lost}"):
        start(tmp_path)


def test_parameters_that_a_later_stage_trains_may_be_missing(params, start, tmp_path):
    flat = {path: leaf for path, leaf in trees.flatten(params).items() if not path.startswith("text_encoder")}
    save_params(tmp_path, trees.unflatten(flat))
    start(tmp_path, names=("align", "instruct"))


def test_training_refuses_a_checkpoint_of_another_model(params, start, tmp_path):
    save_params(tmp_path, params)

    def change(config):
        config.model.language.mlp_dim = 33
        config.model.text_encoder.depth = 2

    with pytest.raises(
        UserError, match=r"not in the model: text_encoder/blocks_2; of another shape: language"
    ):
        start(tmp_path, change=change)


def test_parts_that_an_earlier_stage_does_not_use_are_kept(params, start, tmp_path):
    """The pooled connector uses no text; the text encoder is passed on to the next stage."""
    save_params(tmp_path, params)

    def change(config):
        config.stages[0].connector = with_kind(config, "pooled")
        config.stages[0].trainable = ("connector/projector/.*",)

    first, second = start(tmp_path, names=("align", "instruct"), change=change)
    after, _ = first.run(None, stop_at=0)
    assert "text_encoder" not in after
    begun, _ = second.run(after, stop_at=0)
    same({"text_encoder": begun["text_encoder"]}, {"text_encoder": params["text_encoder"]})


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint; use"):
        read_params(tmp_path)
    config = small_config()
    config.data.root = config.initial = str(tmp_path)
    with pytest.raises(
        UserError, match=r"config\.initial .* expected WORKDIR/checkpoints/STAGE/STEP .*convert"
    ):
        validate(config)
