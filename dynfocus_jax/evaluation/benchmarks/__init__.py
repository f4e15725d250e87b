"""The published benchmarks, a module each: readers of their files, measures of the answers, and prompts.

To add a benchmark, add a module that defines `BENCHMARKS`, {name: Benchmark}.
"""

import importlib
import pkgutil
from pathlib import Path

from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.benchmark import Benchmark
from dynfocus_jax.evaluation.questions import Question, make_ids_unique
from dynfocus_jax.media.folder import MediaFolder


def _discover() -> dict[str, Benchmark]:
    """Return the benchmarks that the modules of this folder declare, by name."""
    modules = [importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__)]
    return {name: benchmark for module in modules for name, benchmark in module.BENCHMARKS.items()}


BENCHMARKS = _discover()


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by name.

    Raises:
      UserError: there is none of that name.
    """
    if name not in BENCHMARKS:
        raise UserError(f"--benchmark is {name!r}, expected one of {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


def read_benchmark(name: str, annotations: Path, media: Path) -> list[Question]:
    """Return all questions of a benchmark, with unique ids.

    Args:
      annotations: the published file or folder of files.
      media: folder of the videos.

    Raises:
      UserError: a file is missing or differs from the published format, or none of the videos exists.
    """
    benchmark = find_benchmark(name)
    if not annotations.exists():
        raise UserError(
            f"--annotations {str(annotations)!r} does not exist; set it to the published files of {name}."
        )
    if not media.is_dir():
        raise UserError(
            f"--media {str(media)!r} is not a folder; set it to the folder of the videos of {name}."
        )
    questions = make_ids_unique(benchmark.read(annotations, MediaFolder(media)))
    if not any(question.media.exists() for question in questions):
        raise UserError(
            f"--media {str(media)!r} has none of the videos of {len(questions)} questions, such as "
            f"{questions[0].media}; set it to the folder that has them."
        )
    return questions
