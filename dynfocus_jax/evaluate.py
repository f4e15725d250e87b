r"""Evaluate a trained model on a published benchmark.

    python -m dynfocus_jax.evaluate --benchmark videomme --checkpoint runs/instruct --output runs/videomme \
        --annotations videomme/test-00000-of-00001.parquet --media videomme/data

Answers are decoded greedily and appended to OUTPUT/predictions.jsonl. To resume an interrupted evaluation,
rerun the same command; questions that have an answer are not repeated. results.json and table.txt are written
once every question has an entry. A question counts as wrong, and is listed, if its video cannot be read, if
it gets no answer, or if its answer cannot be parsed. Frames are read from the videos, even if the model was
trained on extracted features.

configs/benchmarks.py has the prompts and the number of frames of each benchmark; set a field with
--config.BENCHMARK.FIELD=VALUE, list the fields with --fields=config. Open answers are scored by exact match
and token F1, and also by a judge if config.judge.model is set:

    --config.judge.model=NAME         name of the model at the endpoint
    --config.judge.base_url=URL       any OpenAI-compatible endpoint (https://api.openai.com/v1)
    --config.judge.key_variable=NAME  environment variable with the key (OPENAI_API_KEY); empty: no key
    --config.judge.concurrency=8      concurrent requests; see --fields=config.judge

The judge gets the published prompts (evaluation/judge_prompts.toml). Their versions are in results.json, its
replies in OUTPUT/judge.jsonl.

To evaluate with several processes, set config.distributed and start each process with the same arguments, as
in training. The processes split the questions; each holds the whole model on its own devices.
"""

import re
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import jax
import tqdm
from absl import flags
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.command import CONFIG_FLAG, run_command
from dynfocus_jax.data.prepare import make_media_reader
from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.answering import Progress, assign_questions
from dynfocus_jax.evaluation.benchmark_run import Processes, prepare_output, run_benchmark
from dynfocus_jax.evaluation.benchmarks import BENCHMARKS, find_benchmark, read_benchmark
from dynfocus_jax.evaluation.configuration import check_evaluate_config, evaluate_sections
from dynfocus_jax.evaluation.judge import Judge
from dynfocus_jax.evaluation.judge_settings import JudgeSettings
from dynfocus_jax.evaluation.question_prompts import ClipReader
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
    "checkpoint", None, "Workdir of a training run, or WORKDIR/checkpoints/STAGE/STEP."
)
_BENCHMARK = flags.DEFINE_string("benchmark", None, f"One of {', '.join(BENCHMARKS)}.")
_ANNOTATIONS = flags.DEFINE_string("annotations", None, "The benchmark's published file, or folder of files.")
_MEDIA = flags.DEFINE_string("media", None, "Folder of the benchmark's videos.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder for predictions and results: new, or of a run to resume."
)


class Paths(NamedTuple):
    """Files and folders of an evaluation."""

    checkpoint: Path
    annotations: Path
    media: Path
    output: Path


def main() -> None:
    # --- Settings -------------------------------------------------------------------------------------
    name = _require(_BENCHMARK)
    paths = Paths(
        checkpoint=Path(_require(_CHECKPOINT)).expanduser(),
        annotations=Path(_require(_ANNOTATIONS)).expanduser(),
        media=Path(_require(_MEDIA)).expanduser(),
        output=Path(_require(_OUTPUT)).expanduser().absolute(),
    )
    find_benchmark(name)
    config = CONFIG_FLAG.require("configs/benchmarks.py")
    if name not in config:
        raise UserError(f"--config has no section {name!r}; use configs/benchmarks.py, or add the section.")
    check_evaluate_config(config)
    connect_processes(config.distributed)
    with _open_judge(config.judge, paths.output) as judge:
        evaluate(name, paths, config, judge)


def evaluate(name: str, paths: Paths, config: ConfigDict, judge: Judge | None) -> None:
    """Answer the questions of this process; the first process prints the results."""
    settings = config[name]

    # --- Questions ------------------------------------------------------------------------------------
    questions = read_benchmark(name, paths.annotations, paths.media)
    videos = {question.media for question in questions}
    missing = sum(not video.exists() for video in videos)
    if settings.subtitles and not any(question.subtitles for question in questions):
        raise UserError(
            f"config.{name}.subtitles is True, but {str(paths.media)!r} has no subtitle files; add them, or "
            "set the field to False."
        )
    print_once(f"{len(questions)} questions about {len(videos)} videos, {missing} of them missing")

    # --- Model ----------------------------------------------------------------------------------------
    trained = load_run(paths.checkpoint)
    trained.config.data.sampling.update(settings.sampling)
    if settings.num_frames is not None:
        trained.config.generation.update({"num_frames": settings.num_frames, "frames": ()})
    validate(trained.config)
    engine, weights = _load(trained, config.mesh)
    with process_zero_first():
        if is_process_zero():
            about = _describe(trained, weights, engine.num_frames) | {"asked": to_dict(settings)}
            prepare_output(paths.output, name, questions, about, str(trained.folder))

    # --- Answers and results --------------------------------------------------------------------------
    vision = trained.config.model.vision
    clips = ClipReader(
        make_media_reader(trained.config),
        engine.num_frames,
        Sampling.from_config(trained.config.data.sampling),
        layout=trained.config.data.image_layout,
        mean=vision.mean,
    )
    processes = Processes(jax.process_index(), jax.process_count())
    total = len(assign_questions(questions, *processes))
    update_seconds = 0.1 if sys.stderr.isatty() else 60.0
    with tqdm.tqdm(
        total=total,
        desc=name,
        unit="question",
        mininterval=update_seconds,
        maxinterval=2 * update_seconds,
        disable=not is_process_zero(),
    ) as bar:

        def progress(done: Progress) -> None:
            bar.update(done.answered + done.failed - bar.n)
            bar.set_postfix_str(f"{done.failed} failed", refresh=False)

        results = run_benchmark(
            paths.output,
            name,
            questions,
            engine,
            clips,
            settings,
            processes=processes,
            judge=judge,
            batch_size=config.batch_size,
            threads=config.threads,
            progress=progress,
            file_name=process_file_name("predictions.jsonl"),
        )
    print_once(format_results(results))
    print_once(f"predictions, results.json and table.txt are in {paths.output}")


def _require(flag: flags.FlagHolder[str | None]) -> str:
    """Return the value of a flag; raise UserError if it is missing or empty."""
    if not flag.value:
        raise UserError(f"--{flag.name} is missing; set it (see --help).")
    return flag.value


def _load(trained: TrainedRun, axes: ConfigDict) -> tuple[Engine, str]:
    """Return the engine, with the whole model on this process's devices, and a digest of the weights."""
    mesh = make_mesh(mesh_shape(axes, jax.local_device_count()), jax.local_devices())
    params = read_params(trained.folder, serving_layout(trained.config, mesh))
    return Engine(trained.config, params, trained.tokenizer, mesh), params_digest(trees.flatten(params), mesh)


def _describe(trained: TrainedRun, weights: str, num_frames: int) -> dict:
    """Return everything that the answers depend on, besides the questions and their prompts."""
    config, (stage, step) = trained.config, trained.folder.parts[-2:]
    model = to_dict(config.model) | {"num_frames": num_frames}
    model |= {key: config.data[key] for key in ("template", "text_guidance", "max_query", "image_layout")}
    model |= {key: config.generation[key] for key in ("max_length", "end_tokens")}
    return {"checkpoint": {"stage": stage, "step": step, "weights": weights}, "model": model}


def _open_judge(section: ConfigDict, output: Path) -> AbstractContextManager[Judge | None]:
    """Return the judge of open answers; None if none is named, and in all processes but the first."""
    if section.model is None or not is_process_zero():
        return nullcontext()
    return Judge(JudgeSettings(cache=output / "judge.jsonl", **to_dict(section)))


if __name__ == "__main__":
    # Not the default of the flag: errors in --config.FIELD are reported only for a file given by --config.
    if _CONFIGS.is_file() and not any(re.match(r"--?config(=|$)", argument) for argument in sys.argv):
        sys.argv.insert(1, f"--config={_CONFIGS}")
    run_command(main, evaluate_sections)
