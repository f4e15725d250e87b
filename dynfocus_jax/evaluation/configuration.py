"""The configuration of `dynfocus_jax.evaluate`: its fields, declared once, and their checks."""

from typing import Any

from ml_collections.config_dict import ConfigDict

from dynfocus_jax.config import DATA, MESH
from dynfocus_jax.evaluation.benchmarks import BENCHMARKS
from dynfocus_jax.evaluation.judge_settings import JUDGE
from dynfocus_jax.parallel.processes import DISTRIBUTED
from dynfocus_jax.sections import Field, Section, check_section, fill_section, new_section

BENCHMARK: Section = {
    "num_frames": Field(
        int, "number of frames of a video; None: as in the model's own evaluation", at_least=1
    ),
    "sampling": DATA["sampling"],
    "prompt": Field(
        "{question}", "prompt of a question; may contain {question}, {options}, {letters} and {seen}"
    ),
    "option": Field("{letter}. {option}", "format of one line of {options}"),
    "answer_start": Field("", "first words of the answer, given to the model"),
    "free_prompt": Field("{question}", "prompt of open-ended questions in benchmarks that have both kinds"),
    "when_prompt": Field(
        "{question}\nAnswer with the seconds from which and to which it is seen, as: from 1.5 to 4.0 "
        "seconds.",
        "prompt of questions that ask for a time span",
    ),
    "guidance": Field("{question}", "input of the text encoder"),
    "subtitles": Field(False, "whether the prompt has the subtitles shown at the sampled frames"),
    "max_new_tokens": Field(16, "maximum number of tokens in an answer", at_least=1),
    "free_max_new_tokens": Field(
        512, "maximum number of tokens in an answer to an open-ended question", at_least=1
    ),
}

COMMON: Section = {
    "batch_size": Field(16, "questions per batch", at_least=1),
    "threads": Field(2, "number of threads that decode videos ahead of time", at_least=1),
    "judge": JUDGE,
    # Every process holds the whole model on its own devices
    "mesh": {
        **MESH,
        "data": MESH["data"]._replace(default=1),
        "fsdp": MESH["fsdp"]._replace(default=-1),
    },
    "distributed": DISTRIBUTED,
}


def benchmark_settings(**changes: Any) -> ConfigDict:
    """Return the section of one benchmark; raise UserError if there is no such field."""
    return fill_section(BENCHMARK, changes, "benchmark_settings(...)")


def evaluate_config() -> ConfigDict:
    """Return the configuration of `dynfocus_jax.evaluate`, with a section for each benchmark."""
    config = new_section(COMMON)
    for name, benchmark in BENCHMARKS.items():
        config[name] = benchmark_settings(**benchmark.settings)
    return config.lock()


def evaluate_sections(config: ConfigDict | None = None) -> dict[str, Section]:
    """Return the fields of the configuration by the full name of their section, for --fields."""
    return {"config": COMMON, "config.BENCHMARK": BENCHMARK}


def check_evaluate_config(config: ConfigDict) -> None:
    """Check all fields; raise UserError with one sentence that names the field, its value and the remedy."""
    benchmarks = {name: BENCHMARK for name in config if name not in COMMON}
    check_section(config, {**COMMON, **benchmarks}, "config")
