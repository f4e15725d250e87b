"""The published benchmarks: readers of their files, and measures of the answers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dynfocus_jax.errors import UserError
from dynfocus_jax.evaluation.benchmarks import (
    lvbench,
    mlvu,
    mvbench,
    nextqa,
    open_qa,
    vcg,
    videohallucer,
    videomme,
    vnbench,
)
from dynfocus_jax.evaluation.grading import GradedAnswer
from dynfocus_jax.evaluation.measures import Measure
from dynfocus_jax.evaluation.questions import Question, make_ids_unique
from dynfocus_jax.media.folder import MediaFolder


class Benchmark(NamedTuple):
    """A published benchmark.

    title: its published name. read: turns an annotation file (or folder) and a media folder into questions.
    measure: of closed questions; None if all are open. submission: the list that is sent to its authors.
    judged_mean: name of the mean over the dimensions that a judge marks. num_dimensions: their number.
    """

    title: str
    read: Callable[[Path, MediaFolder], list[Question]]
    measure: Measure | None = None
    submission: Callable[[Sequence[GradedAnswer]], list[dict[str, str]]] | None = None
    judged_mean: str = "mean"
    num_dimensions: int = 1


BENCHMARKS = {
    "msvd_qa": Benchmark("MSVD-QA", open_qa.read_msvd),
    "msrvtt_qa": Benchmark("MSRVTT-QA", open_qa.read_msrvtt),
    "activitynet_qa": Benchmark("ActivityNet-QA", open_qa.read_activitynet),
    "vcgbench": Benchmark("VCG-Bench", vcg.read_vcg, num_dimensions=5),
    "videomme": Benchmark("Video-MME", videomme.read_videomme, videomme.measure_videomme),
    "mlvu": Benchmark("MLVU", mlvu.read_dev, mlvu.measure_dev, judged_mean="G-Avg", num_dimensions=2),
    "mlvu_test": Benchmark("MLVU test", mlvu.read_test, mlvu.measure_test, mlvu.make_submission),
    "lvbench": Benchmark("LVBench", lvbench.read_lvbench, lvbench.measure_lvbench),
    "videohallucer": Benchmark(
        "VideoHallucer", videohallucer.read_videohallucer, videohallucer.measure_videohallucer
    ),
    "mvbench": Benchmark("MVBench", mvbench.read_mvbench, mvbench.measure_mvbench),
    "nextqa": Benchmark("NExT-QA", nextqa.read_nextqa_questions, nextqa.measure_nextqa),
    "nextgqa": Benchmark("NExT-GQA", nextqa.read_grounded, nextqa.measure_grounded),
    "vnbench": Benchmark("VNBench", vnbench.read_vnbench, vnbench.measure_vnbench),
}


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
