"""Evaluate a trained model on a published benchmark.

    python -m dynfocus_jax.evaluate --benchmark=videomme --checkpoint=runs/instruct --output=runs/videomme
        --annotations=videomme/test-00000-of-00001.parquet --media=videomme/data

Answers are greedy, and appended to OUTPUT/predictions.jsonl as they come; started again, only what has no
answer yet is asked. results.json and table.txt are written when every question has an entry: what could not
be read, answered or understood counts as wrong and is listed. Frames are read from the videos, also for a
model that was trained on extracted features.

configs/benchmarks.py says how each benchmark is asked; --config.BENCHMARK.FIELD=VALUE changes it. Free
answers are measured offline (exact match, token F1), and by a judge besides if one is named:

    --config.judge.model=NAME         as its endpoint calls it
    --config.judge.base_url=URL       any OpenAI-compatible endpoint (https://api.openai.com/v1)
    --config.judge.key_variable=NAME  environment variable with its key (OPENAI_API_KEY); empty: it needs none
    --config.judge.concurrency=8      questions under way at once; more: timeout, attempts, parameters

Its prompts are the published ones (evaluation/judge_prompts.toml), their versions are in results.json, its
replies in OUTPUT/judge.jsonl.

Several processes share the questions when each is started with the same arguments and config.distributed says
how they find each other, as for training. Each holds the whole model on its own devices.
"""

import re
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import jax
import tqdm
from absl import flags
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.command import CONFIG_FLAG, run_command
from dynfocus_jax.data.prepare import make_media_reader
from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.answering import Progress, share_of
from dynfocus_jax.evaluation.benchmark_run import Share, begin, run
from dynfocus_jax.evaluation.benchmarks import BENCHMARKS, find_benchmark, read_benchmark
from dynfocus_jax.evaluation.judge import Judge
from dynfocus_jax.evaluation.judge_settings import JudgeSettings
from dynfocus_jax.evaluation.question_prompts import Clips
from dynfocus_jax.evaluation.results import format_results
from dynfocus_jax.media.frame_sampling import Sampling
from dynfocus_jax.parallel.digest import params_digest
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.parallel.processes import (
    connect_processes,
    is_process_zero,
    print_once,
    process_file_name,
    process_zero_first,
)
from dynfocus_jax.sections import to_dict
from dynfocus_jax.serving.engine import Engine, serving_layout
from dynfocus_jax.serving.load import TrainedRun, load_run
from dynfocus_jax.training.checkpoints import read_params
from dynfocus_jax.validation import validate

_CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "benchmarks.py"

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a training run, or of one of its checkpoints."
)
_BENCHMARK = flags.DEFINE_string("benchmark", None, f"One of {', '.join(BENCHMARKS)}.")
_ANNOTATIONS = flags.DEFINE_string("annotations", None, "Its published file, or folder of files.")
_MEDIA = flags.DEFINE_string("media", None, "Folder of its videos.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of predictions and results; may hold some already.")


def main() -> None:
    # --- Settings -------------------------------------------------------------------------------------
    given = {"checkpoint": _CHECKPOINT, "benchmark": _BENCHMARK, "annotations": _ANNOTATIONS}
    for name, flag in (given | {"media": _MEDIA, "output": _OUTPUT}).items():
        if not flag.value:
            raise UserError(f"--{name} is missing; see --help.")
    name, output = _BENCHMARK.value, Path(_OUTPUT.value).expanduser().absolute()
    find_benchmark(name)
    config = CONFIG_FLAG.value
    if config is None:
        raise UserError("--config is missing; name configs/benchmarks.py of the source, or one like it.")
    if name not in config:
        raise UserError(f"--config has no section {name!r}; use configs/benchmarks.py, or add the section.")
    settings = config[name]
    for key in ("batch_size", "threads"):
        if config[key] < 1:
            raise UserError(f"config.{key} is {config[key]}, expected at least 1.")
    connect_processes(config.distributed)
    with _judge(config.judge, output) as judge:
        evaluate(name, output, config, settings, judge)


def evaluate(name: str, output: Path, config: ConfigDict, settings: ConfigDict, judge: Judge | None) -> None:
    """Answer the questions of this process; the first one reports."""

    # --- Questions ------------------------------------------------------------------------------------
    questions = read_benchmark(name, Path(_ANNOTATIONS.value).expanduser(), Path(_MEDIA.value).expanduser())
    videos = {question.media for question in questions}
    missing = sum(not video.exists() for video in videos)
    if settings.subtitles and not any(question.subtitles for question in questions):
        raise UserError(f"config.{name}.subtitles is set, but there is no subtitle file in {_MEDIA.value!r}.")
    print_once(f"{len(questions)} questions about {len(videos)} videos, {missing} of which are missing")

    # --- Model ----------------------------------------------------------------------------------------
    trained = load_run(Path(_CHECKPOINT.value).expanduser())
    trained.config.data.sampling.update(settings.sampling)
    if settings.num_frames is not None:
        trained.config.generation.update({"num_frames": settings.num_frames, "frames": ()})
    validate(trained.config)
    engine, weights = _load(trained, config.mesh)
    with process_zero_first():
        if is_process_zero():
            about = _described(trained, weights, engine.num_frames) | {"asked": to_dict(settings)}
            begin(output, name, questions, about, str(trained.folder))

    # --- Answers and results --------------------------------------------------------------------------
    vision = trained.config.model.vision
    clips = Clips(
        make_media_reader(trained.config),
        engine.num_frames,
        Sampling.from_config(trained.config.data.sampling),
        layout=trained.config.data.image_layout,
        mean=vision.mean,
    )
    share = Share(jax.process_index(), jax.process_count())
    total, every = len(share_of(questions, *share)), 0.1 if sys.stderr.isatty() else 60.0  # seconds
    with tqdm.tqdm(
        total=total,
        desc=name,
        unit="question",
        mininterval=every,
        maxinterval=2 * every,
        disable=not is_process_zero(),
    ) as bar:

        def progress(done: Progress) -> None:
            bar.update(done.answered + done.failed - bar.n)
            bar.set_postfix_str(f"{done.failed} failed", refresh=False)

        results = run(
            output,
            name,
            questions,
            engine,
            clips,
            settings,
            share=share,
            judge=judge,
            batch_size=config.batch_size,
            threads=config.threads,
            progress=progress,
            file_name=process_file_name("predictions.jsonl"),
        )
    print_once(format_results(results))
    print_once(f"predictions, results.json and table.txt are in {output}")


def _load(trained: TrainedRun, axes: ConfigDict) -> tuple[Engine, str]:
    """The whole model on this process's devices, and a digest of its weights."""
    mesh = make_mesh(mesh_shape(axes, jax.local_device_count()), jax.local_devices())
    params = read_params(trained.folder, serving_layout(trained.config, mesh))
    return Engine(trained.config, params, trained.tokenizer, mesh), params_digest(trees.flatten(params), mesh)


def _described(trained: TrainedRun, weights: str, num_frames: int) -> dict:
    """Return what the answers depend on, besides the questions and their prompts."""
    config, (stage, step) = trained.config, trained.folder.parts[-2:]
    model = to_dict(config.model) | {"num_frames": num_frames}
    model |= {key: config.data[key] for key in ("template", "text_guidance", "max_query", "image_layout")}
    model |= {key: config.generation[key] for key in ("max_length", "end_tokens")}
    return {"checkpoint": {"stage": stage, "step": step, "weights": weights}, "model": model}


def _judge(section: ConfigDict, output: Path) -> AbstractContextManager[Judge | None]:
    """The judge of free answers, whom the first process asks; None where none is named."""
    if section.model is None or not is_process_zero():
        return nullcontext()
    return Judge(JudgeSettings(cache=output / "judge.jsonl", **to_dict(section)))


if __name__ == "__main__":
    # Not the flag's default: what is wrong with --config.FIELD is said only of a file that is named.
    if _CONFIGS.is_file() and not any(re.match(r"--?config(=|$)", argument) for argument in sys.argv):
        sys.argv.insert(1, f"--config={_CONFIGS}")
    run_command(main)
