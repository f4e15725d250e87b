"""Mistakes in configurations and on the command line, found before anything is built."""

import json

import pytest
from ml_collections.config_dict import ConfigDict

from dynfocus_jax import command as command_lib
from dynfocus_jax.config import default_config, from_dict, stage
from dynfocus_jax.data.prepare import make_tokenizer, prepare_data_root
from dynfocus_jax.errors import UserError
from dynfocus_jax.sections import to_dict
from dynfocus_jax.validation import validate
from tests.commands import command
from tests.tiny import TOY, tiny_config


def toy(arg=""):
    import runpy

    return runpy.run_path(str(TOY))["get_config"](arg)


def assert_invalid(config, *parts, devices=1):
    """Check that `validate` raises one sentence that contains all the parts."""
    with pytest.raises(UserError) as error:
        validate(config, devices)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    for part in parts:
        assert part in sentence, sentence


# --- Values -------------------------------------------------------------------------------------------


def test_tiny_and_toy_are_valid():
    validate(tiny_config())
    validate(toy(), devices=2)


VARIANTS = (
    *("rods_only", "rods3", "uniform", "random_select", "question_conditioned", "plain_j2"),
    *("kmeans", "released", "oracle"),
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_toy_are_valid_and_differ(variant):
    config = toy(f"variant={variant}")
    validate(config)
    assert to_dict(config) != to_dict(toy())


def test_every_variant_of_the_toy_is_tested():
    import runpy

    assert set(runpy.run_path(str(TOY))["VARIANTS"]) == set(VARIANTS)


@pytest.mark.parametrize("arg", ["variant=rods_onyl", "varinat=rods_only", "rods_only"])
def test_unknown_variant(arg):
    with pytest.raises(UserError, match=r"configs/toy\.py has no (variant|option)"):
        toy(arg)


@pytest.mark.parametrize("arg", ["", "variant=released", "variant=question_conditioned"])
def test_to_dict_round_trip(arg):
    config = toy(arg)
    fields = json.loads(json.dumps(to_dict(config)))
    again = from_dict(fields)
    assert to_dict(again) == to_dict(config)
    assert again == config
    assert again.model.connector.cce.levels == ((4, 5), (2, 2))
    assert isinstance(again.stages[0], ConfigDict)
    validate(again)


def test_from_dict_refuses_unknown_fields():
    fields = to_dict(toy())
    fields["model"]["connector"]["dpe"]["num_prototype"] = 3
    with pytest.raises(UserError, match=r"connector.*dpe\.num_prototype .*did you mean 'num_prototypes'"):
        from_dict(fields)


@pytest.mark.parametrize(
    ("section", "field", "value", "parts"),
    [
        ("dpe", "num_selected", 9, ("num_selected (J) is 9", "num_prototypes (K) = 8")),
        ("dpe", "num_selected", 0, ("num_selected is 0", "at least 1")),
        ("dpe", "ratio", 0.0, ("dpe.ratio is 0.0", "greater than 0 and at most 1")),
        ("dpe", "ratio", 1.01, ("dpe.ratio is 1.01", "greater than 0 and at most 1")),
        ("dpe", "ratio", -0.5, ("dpe.ratio",)),
        ("dpe", "ratio", float("nan"), ("dpe.ratio",)),
        ("dpe", "sigma", -0.1, ("dpe.sigma",)),
        ("dpe", "samples", 0, ("dpe.samples",)),
        ("dpe", "num_prototypes", 0, ("num_prototypes",)),
        ("dpe", "clustering", "k-means", ("dpe.clustering is 'k-means'", "kmeans", "dpc_knn")),
        ("dpe", "selection", "best", ("dpe.selection",)),
        ("dpe", "jacobian", "Full", ("dpe.jacobian", "'full'", "'diagonal'")),
        ("cce", "cones", "all", ("cce.cones", "multi_grained")),
        ("cce", "rods", ("content", "contex"), ("cce.rods", "contex", "context")),
        ("cce", "levels", (), ("cce.levels is empty",)),
        ("cce", "levels", ((37, 5), (2, 2)), ("cce.levels[0]", "36")),
        ("cce", "levels", ((4, 5), (5, 2)), ("cce.levels[1]", "4")),
        ("cce", "levels", ((4, 5, 6),), ("cce.levels[0]",)),
        ("cce", "levels", (4, 2), ("cce.levels[0]",)),
        ("connector", "pool", (4, 4), ("connector.pool", "divisors of 6")),
        ("connector", "pool", (2, 2, 2), ("connector.pool",)),
        ("connector", "projector", "conv", ("connector.projector",)),
        ("vision", "image_size", 50, ("image_size is 50", "patch_size = 8")),
        ("vision", "heads", 5, ("vision.width is 64", "heads = 5")),
        ("vision", "mean", (0.5, 0.5), ("vision.mean",)),
        ("vision", "activation", "relu", ("vision.activation", "gelu_tanh", "quick_gelu")),
        ("vision", "select_layer", 0, ("select_layer is 0", "-1 (the last of the 3 blocks)", "-3")),
        ("vision", "select_layer", -4, ("select_layer is -4", "-3 (the first)")),
        ("vision", "select_layer", -2, ("final_norm", "select_layer is -2")),
        ("vision", "eps", 0.0, ("vision.eps is 0.0",)),
        ("language", "kv_heads", 3, ("kv_heads = 3",)),
        ("language", "head_dim", 25, ("head_dim is 25", "even")),
        ("language", "attention", "flash", ("language.attention",)),
        ("language", "remat", "some", ("language.remat",)),
        ("language", "rope_scaling", "yarn", ("rope_scaling is 'yarn'", "'linear'", "'llama3'")),
        ("language", "rope_factor", 2.0, ("rope_factor is 2.0", "rope_scaling is 'none'")),
        ("language", "rope_factor", 0.0, ("rope_factor is 0.0",)),
        ("language", "rope_low_freq", 4.0, ("rope_low_freq is 4.0", "rope_high_freq = 4.0")),
        ("language", "rope_original_length", 0, ("rope_original_length is 0",)),
        ("language", "eps", -1e-5, ("language.eps",)),
        ("text_encoder", "vision_eps", 0.0, ("text_encoder.vision_eps",)),
        ("text_encoder", "heads", 0, ("text_encoder.heads",)),
    ],
)
def test_values_of_the_model(section, field, value, parts):
    config = toy()
    of_connector = section in config.model.connector
    (config.model.connector if of_connector else config.model)[section][field] = value
    assert_invalid(config, *parts)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"name": "a b"}, ("name is 'a b'",)),
        ({"name": "../a"}, ("name is '../a'",)),
        ({"steps": None}, ("stages[1] has neither steps nor epochs",)),
        ({"steps": 0}, ("stages[1].steps is 0",)),
        ({"annotations": None}, ("stages[1] has neither annotations nor sources",)),
        ({"trainable": ()}, ("stages[1].trainable is empty",)),
        ({"trainable": ("language/(",)}, ("'language/('", "regular expression")),
        ({"schedule": "step"}, ("schedule is 'step'", "cosine")),
        ({"warmup": 1.0}, ("warmup is 1.0", "at least 0 and less than 1")),
        ({"batch_size": 15}, ("stages[1].batch_size is 15", "2 devices")),
        ({"microbatches": 3}, ("batch_size is 16", "3 microbatches x 2 devices", "a multiple of 6")),
        ({"microbatches": 0}, ("stages[1].microbatches is 0",)),
        ({"loss_chunk": -1}, ("stages[1].loss_chunk is -1",)),
        ({"learning_rate": 0.0}, ("learning_rate is 0.0",)),
        ({"name": "instruct"}, ("two stages with the same name",)),
        ({"max_turns": 0}, ("max_turns is 0",)),
        ({"random_steps": -1}, ("random_steps is -1",)),
        ({"weight_decay": -0.1}, ("weight_decay is -0.1",)),
        ({"lr_scale": ("language/.*", 2.0)}, ("lr_scale",)),
    ],
    ids=str,
)
def test_values_of_a_stage(fields, parts):
    config = toy()
    config.stages[1].update(fields)
    assert_invalid(config, *parts, devices=2)


@pytest.mark.parametrize(
    ("field", "value", "parts"),
    [
        ("num_frames", 0, ("num_frames is 0",)),
        ("max_new_tokens", 0, ("max_new_tokens is 0",)),
        ("max_length", -1, ("max_length is -1",)),
        ("temperature", -0.5, ("temperature is -0.5",)),
        ("top_p", 0.0, ("top_p is 0.0",)),
        ("top_k", -1, ("top_k is -1",)),
        ("text", (), ("generation.text is ()",)),
        ("text", (128, 32), ("generation.text is (128, 32)", "ascending")),
        ("batch", (0, 4), ("generation.batch is (0, 4)",)),
        ("frames", (4, 4), ("generation.frames is (4, 4)",)),
        ("cache", 0, ("generation.cache is 0",)),
        ("cached_clips", -1, ("cached_clips is -1",)),
    ],
)
def test_values_of_generation(field, value, parts):
    config = toy()
    config.generation[field] = value
    assert_invalid(config, *parts)


def test_other_values():
    config = toy()
    config.evaluation.batch_size = 63
    assert_invalid(config, "evaluation.batch_size is 63", "2 devices", devices=2)
    config = toy()
    config.stages = ()
    assert_invalid(config, "config.stages is empty")
    config = toy()
    config.data.max_query = 9
    assert_invalid(config, "max_query is 9", "max_text = 8")
    config = toy()
    config.data.template = "vicuna"
    assert_invalid(config, "data.template", "vicuna_v1")
    config = toy()
    config.initial = "/nowhere/checkpoints/s/1"
    assert_invalid(config, "config.initial", "/nowhere")
    config = toy()
    config.model.connector.cce.update({"cones": "none", "rods": ()})
    assert_invalid(config, "neither cones nor rods")
    config = toy("variant=released")
    config.model.connector.cce.levels = ((4, 5),)
    assert_invalid(config, "1 levels", "released")
    for changes in ({"cones": "single_grained"}, {"rods": ("coarse", "context")}):
        config = toy("variant=released")
        config.model.connector.cce.update(changes)
        assert_invalid(config, "'released' merges the levels")
    config = toy()
    config.weights.skip = ("lm_head(",)
    assert_invalid(config, "config.weights.skip", "'lm_head('", "regular expression")
    config = toy()
    config.data.max_skip_share = 1.5
    assert_invalid(config, "max_skip_share")


@pytest.mark.parametrize(
    ("section", "fields", "parts"),
    [
        ("mesh", {"data": -1, "fsdp": -1}, ("-1 for data and fsdp", "-1 for at most one axis")),
        ("mesh", {"tensor": 0}, ("mesh.tensor is 0", "at least 1")),
        ("mesh", {"context": -2}, ("mesh.context is -2",)),
        ("distributed", {"mode": "slurm"}, ("distributed.mode is 'slurm'", "'explicit'")),
        ("distributed", {"num_processes": 4}, ("num_processes is 4, but mode is 'none'",)),
        ("distributed", {"mode": "explicit"}, ("distributed.address is not set",)),
        ("distributed", {"timeout": 0}, ("distributed.timeout is 0",)),
        (
            "distributed",
            {"mode": "explicit", "address": "host", "num_processes": 2, "process_id": 0},
            ("address is 'host'", "host:port"),
        ),
        (
            "distributed",
            {"mode": "explicit", "address": "host:1", "num_processes": 2, "process_id": 2},
            ("process_id is 2", "0 to 1"),
        ),
        ("checkpoint", {"keep_every": 0}, ("keep_every is 0",)),
        ("checkpoint", {"every": 200, "keep_every": 300}, ("keep_every is 300", "a multiple of every = 200")),
        ("checkpoint", {"best": "accuracy"}, ("checkpoint.best is 'accuracy'", "'loss'")),
        ("checkpoint", {"best_mode": "least"}, ("best_mode is 'least'",)),
    ],
    ids=str,
)
def test_devices_and_checkpoints(section, fields, parts):
    config = toy()
    config[section].update(fields)
    assert_invalid(config, *parts)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"rank": -1}, ("lora.rank is -1",)),
        ({"alpha": 0.0}, ("lora.alpha is 0.0",)),
        ({"rank": 4, "targets": ()}, ("lora.targets is empty", "rank is 4")),
        ({"targets": ("query", "q_proj")}, ("lora.targets is 'q_proj'", "'query'", "'down'")),
    ],
    ids=str,
)
def test_values_of_lora(fields, parts):
    config = toy()
    config.model.language.lora.update(fields)
    assert_invalid(config, *parts)


def test_unknown_and_mistyped_fields():
    """`validate` finds them too, since a config file need not start from the locked default_config()."""
    config = toy()
    with config.unlocked():
        config.model.connector.dpe.num_prototype = 3
    assert_invalid(config, "config.model.connector.dpe.num_prototype", "did you mean 'num_prototypes'")
    config = toy()
    with config.unlocked():
        del config.model.connector.dpe["ratio"]
    assert_invalid(config, "config.model.connector.dpe.ratio is missing")
    config = toy()
    with config.ignore_type(), config.unlocked():
        config.model.connector.dpe.num_prototypes = "8"
    assert_invalid(config, "num_prototypes is '8' of type str, expected an integer at least 1")
    config = toy()
    with config.ignore_type():
        config.checkpoint.every = True
    assert_invalid(config, "checkpoint.every", "bool", "expected an integer")
    config = toy()
    with config.ignore_type():
        config.model = 3
    assert_invalid(config, "config.model is 3")


def test_unknown_field_of_a_stage():
    with pytest.raises(UserError, match=r"no field 'learning_rat' \(did you mean 'learning_rate'\?\)\."):
        stage(name="a", learning_rat=1e-3)
    with pytest.raises((UserError, TypeError), match="steps"):
        stage(name="a", steps="many")


def test_missing_data(tmp_path):
    config = default_config()
    config.data.root = str(tmp_path / "absent")
    with pytest.raises(UserError, match=r"data\.root is .*absent.* not a folder"):
        prepare_data_root(config.data)
    with pytest.raises(UserError, match=r"vocabulary.*does not exist"):
        make_tokenizer(config, tmp_path / "vocabulary.json")
    (tmp_path / "vocabulary.json").write_text(json.dumps([f"w{i}" for i in range(70)]))
    config.model.language.vocab_size = 64
    with pytest.raises(UserError, match=r"language\.vocab_size is 64.* 74 words"):
        make_tokenizer(config, tmp_path / "vocabulary.json")


# --- The command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        (
            "--config.model.connector.dpe.ration=0.5",
            r"config.model.connector.dpe.ration .*did you mean 'ratio'",
        ),
        ("--config.modle.connector.dpe.ratio=0.5", r"config.modle .*did you mean 'model'"),
        ("--config.stages[1].step=3", r"config.stages\[1\].step .*did you mean 'steps'"),
        ("--config.mesh.fdsp=8", r"config.mesh.fdsp .*did you mean 'fsdp'"),
        ("--config.stages[9].steps=3", r"config.stages has 4 entries"),
        ("--config.model.connector.dpe.ratio.x=3", r"config.model.connector.dpe.ratio.x is not a field"),
    ],
)
def test_overrides_of_unknown_fields(argument, sentence):
    with pytest.raises(UserError, match=sentence):
        command_lib._take_config(["train", f"--config={TOY}", argument])


def test_overrides_of_known_fields():
    arguments = ["--config.stages[2].steps=7", "--config.model.connector.dpe.num_selected=2", "--workdir=x"]
    command_lib._take_config(["train", "--config", str(TOY), *arguments])
    command_lib._take_config(["train", f"--config={TOY}:variant=uniform", *arguments])


def test_missing_config_file():
    with pytest.raises(UserError, match=r"--config is 'configs/tyo.py', which is not a file"):
        command_lib._take_config(["train", "--config", "configs/tyo.py"])
    with pytest.raises(UserError, match=r"has no variant 'x'"):
        command_lib._take_config(["train", f"--config={TOY}:variant=x"])


def train(*arguments, config=TOY):
    """Run `train` as a user does, and log what JAX compiles on stderr."""
    return command("train", f"--config={config}", *arguments, timeout=300, JAX_LOG_COMPILES="1")


def test_help():
    code, stdout, stderr = train("--help")
    assert (code, stderr) == (0, "")
    assert "--config configs/toy.py --workdir" in stdout
    assert "--stop_at" in stdout


MISTAKES = {
    "value": (
        ["--config.model.connector.dpe.num_selected=9"],
        "error: config.model.connector.dpe.num_selected (J) is 9",
    ),
    "type": (["--config.model.connector.dpe.num_prototypes=many"], "error: "),
    "batch": (["--config.stages[0].batch_size=31"], "error: config.stages[0].batch_size is 31"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_the_command(mistake, tmp_path, monkeypatch):
    arguments, sentence = MISTAKES[mistake]
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    workdir = tmp_path / "run"
    code, stdout, stderr = train(f"--workdir={workdir}", f"--config.data.root={tmp_path}/data", *arguments)
    assert code == 2, stderr
    assert stdout == ""
    (line,) = stderr.splitlines()
    assert line.startswith(sentence)
    assert line.endswith(".")
    assert not workdir.exists()
    assert not (tmp_path / "data").exists()


def test_unknown_field_in_the_config_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dynfocus_jax.config import default_config\n"
        "def get_config(arg=''):\n"
        "    config = default_config()\n"
        "    config.model.connector.dpe.rato = 0.5\n"
        "    return config\n"
    )
    code, stdout, stderr = train(f"--workdir={tmp_path}/run", config=file)
    (line,) = stderr.splitlines()
    assert (code, stdout) == (2, "")
    assert "rato" in line
    assert "ratio" in line


def test_missing_annotations_end_the_command(data_root, tmp_path):
    """Missing data of the last stage is reported before the first stage starts."""
    file = tmp_path / "tiny.py"
    file.write_text("from tests.tiny import tiny_config as get_config\n")
    arguments = [f"--workdir={tmp_path}/run", f"--config.data.root={data_root}"]
    code, stdout, stderr = train(*arguments, "--config.stages[3].annotations=absent.json", config=file)
    assert code == 2
    assert "stage" not in stdout
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "absent.json" in line
    assert "Compiling" not in stderr
