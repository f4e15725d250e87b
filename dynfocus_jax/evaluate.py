"""Evaluate a trained model on a published benchmark.

    python -m dynfocus_jax.evaluate --checkpoint runs/instruct --benchmark videomme \
        --annotations videomme/test.json --media videomme/data --output runs/instruct_videomme

Answers are greedy, and appended to OUTPUT/predictions.jsonl as they come; started again, only what has no
answer yet is asked. results.json and table.txt are written when every question has an entry: what could not
be read, answered or understood counts as wrong and is listed.

configs/benchmarks.py says how each benchmark is asked; --config.BENCHMARK.FIELD changes it. Free answers are
measured offline (exact match, token F1), and judged too with --config.judge.model NAME.
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
from ml_collections import ConfigDict, config_flags

from dynfocus_jax.command import run_command
from dynfocus_jax.config import UserError, to_dict
from dynfocus_jax.data.prepare import make_media_reader
from dynfocus_jax.data.sampling import Sampling
from dynfocus_jax.evaluation.answering import Progress, share_of
from dynfocus_jax.evaluation.benchmark_run import Share, begin, run
from dynfocus_jax.evaluation.benchmarks import find_benchmark, read_benchmark
from dynfocus_jax.evaluation.judge import Judge
from dynfocus_jax.evaluation.judge_endpoint import JudgeSettings
from dynfocus_jax.evaluation.prompting import Clips
from dynfocus_jax.evaluation.report import format_table
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.parallel.start import first_goes_ahead, is_first, own_name, say, start
from dynfocus_jax.serving.load import load_engine, load_run
from dynfocus_jax.validation import validate

_CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "benchmarks.py"

_CONFIG = config_flags.DEFINE_config_file("config", None, "How benchmarks are asked: configs/benchmarks.py.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a training run, or of one of its checkpoints."
)
_BENCHMARK = flags.DEFINE_string("benchmark", None, "Its name, such as videomme.")
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
    config = _CONFIG.value
    if name not in config:
        raise UserError(f"--config has no section {name!r}; take configs/benchmarks.py, or add it.")
    settings = config[name]
    for key in ("batch_size", "threads"):
        if config[key] < 1:
            raise UserError(f"config.{key} is {config[key]}, expected at least 1.")
    start(config.distributed)
    with _judge(config.judge, output) as judge:
        evaluate(name, output, config, settings, judge)


def evaluate(name: str, output: Path, config: ConfigDict, settings: ConfigDict, judge: Judge | None) -> None:
    """Answers the questions of this process; the first one reports."""

    # --- Questions ------------------------------------------------------------------------------------
    questions = read_benchmark(name, Path(_ANNOTATIONS.value).expanduser(), Path(_MEDIA.value).expanduser())
    videos = {question.media for question in questions}
    missing = sum(not video.exists() for video in videos)
    if settings.subtitles and not any(question.subtitles for question in questions):
        raise UserError(f"config.{name}.subtitles is set, but there is no subtitle file in {_MEDIA.value!r}.")
    say(f"{len(questions)} questions about {len(videos)} videos, {missing} of which are missing")

    # --- Model ----------------------------------------------------------------------------------------
    trained = load_run(Path(_CHECKPOINT.value).expanduser())
    trained.config.data.sampling.update(settings.sampling)
    if settings.num_frames is not None:
        trained.config.generation.update({"num_frames": settings.num_frames, "frames": ()})
    validate(trained.config)
    mesh = make_mesh(mesh_shape(config.mesh, jax.local_device_count()), jax.local_devices())
    engine = load_engine(trained, mesh)
    with first_goes_ahead():
        if is_first():
            about = {"checkpoint": str(trained.folder), "settings": to_dict(settings)}
            begin(output, name, questions, about)

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
    hidden = not (is_first() and sys.stderr.isatty())
    total = len(share_of(questions, *share))
    with tqdm.tqdm(total=total, desc=name, unit="question", disable=hidden) as bar:

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
            file_name=own_name("predictions.jsonl"),
        )
    say(format_table(results))
    say(f"predictions, results.json and table.txt are in {output}")


def _judge(section: ConfigDict, output: Path) -> AbstractContextManager[Judge | None]:
    """The judge of free answers; None where none is named."""
    if section.model is None:
        return nullcontext()
    return Judge(
        JudgeSettings(
            section.model,
            base_url=section.base_url,
            key_variable=section.key_variable,
            cache=output / "judge.jsonl",
            concurrency=section.concurrency,
        )
    )


if __name__ == "__main__":
    # Not the flag's default: what is wrong with --config.FIELD is said only of a file that is named.
    if not any(re.match(r"--?config(=|$)", argument) for argument in sys.argv):
        sys.argv.insert(1, f"--config={_CONFIGS}")
    run_command(main)
