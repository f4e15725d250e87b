"""The published system at full size, as shapes only: nothing is allocated."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from dynfocus_jax import trees
from dynfocus_jax.batch import padding_sample
from dynfocus_jax.config import default_config
from dynfocus_jax.video_language_model import build_model

C, D = 1408, 4096
FRAMES, WORDS, QUESTION = 200, 48, 256


@pytest.fixture(scope="module")
def full_size():
    """The default configuration's model; shapes of a batch (a video of 200 frames) and of its variables."""
    model = build_model(default_config())
    sample = padding_sample(FRAMES, 224, WORDS, QUESTION)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)), np.asarray(x).dtype), sample)
    variables = jax.eval_shape(lambda key, batch: model.init(key, batch), jax.random.key(0), batch)
    return model, batch, variables


def count(params, *prefixes):
    return sum(
        math.prod(leaf.shape) for path, leaf in trees.flatten(params).items() if path.startswith(prefixes)
    )


def torch_sizes(model_class, config):
    """Return the size of every parameter of a Hugging Face module, by name."""
    with torch.device("meta"):
        model = model_class(config)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def test_parameter_counts_of_the_paper(full_size):
    params = full_size[2]["params"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert count(params, "connector/dpe/score_net") == 12_897_281  # 12.897 M
    connector = count(params, "connector/projector", "connector/cce/context")
    mlp = (C + 1) * D + (D + 1) * D
    assert connector == mlp + (C + 1) * C + (C + 1) * D == 30_307_712  # 30.31 M
    assert count(params, "connector") == connector + 12_897_281
    assert 0.98e9 < count(params, "vision") < 0.99e9
    assert count(params, "language") == 6_738_415_616  # Vicuna-7B


def test_parameter_counts_of_the_published_backbones(full_size):
    """Hugging Face modules with their default, published sizes have as many parameters."""
    params = full_size[2]["params"]
    vision = torch_sizes(InstructBlipVisionModel, InstructBlipVisionConfig())
    norm = sum(size for name, size in vision.items() if name.startswith("post_layernorm"))
    assert count(params, "vision") == sum(vision.values()) - norm
    text = torch_sizes(InstructBlipQFormerModel, InstructBlipQFormerConfig(vocab_size=30523))
    queries, projection = 32 * 768, (768 + 1) * C
    assert count(params, "text_encoder") == sum(text.values()) + norm + queries + projection
    language = torch_sizes(LlamaForCausalLM, LlamaConfig())
    assert count(params, "language") == sum(language.values())


def test_forward_of_200_frames(full_size):
    """The video has 20 cones of 40 tokens and 180 rods of 2 tokens, in a forward pass and in prefill."""
    model, batch, variables = full_size
    output = jax.eval_shape(model.apply, variables, batch)
    cones = 20  # J = ceil(0.8 * 25)
    visual = 40 * cones + 2 * (FRAMES - cones)
    assert output.visual.tokens.shape == (1, visual, D)
    assert output.visual.tokens.dtype == jnp.bfloat16
    assert output.logits.shape == (1, WORDS, 32000)
    assert output.logits.dtype == jnp.float32

    def prefill(module, batch):
        return module.prefill(batch, module.visual_tokens(batch))

    logits, cache = jax.eval_shape(lambda *inputs: model.apply(*inputs, method=prefill), variables, batch)
    assert logits.shape == (1, 32000)
    assert cache.keys.shape == cache.values.shape == (32, 1, 32, visual + WORDS, 128)
    assert cache.keys.dtype == jnp.bfloat16
