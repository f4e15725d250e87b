"""The published benchmarks: how each one's files are read, and what is measured of the answers."""

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
from dynfocus_jax.evaluation.grading import Graded
from dynfocus_jax.evaluation.measures import Measure
from dynfocus_jax.evaluation.questions import Question, with_unique_ids
from dynfocus_jax.media.folder import MediaFolder


class Benchmark(NamedTuple):
    """A published benchmark.

    title: its published name; read: annotation file or folder and media folder to questions.
    measure: of closed answers, None where all are open; submission: what is sent to its authors.
    judged_mean: what the mean over the judged dimensions is called; dimensions: how many there are.
    """

    title: str
    read: Callable[[Path, MediaFolder], list[Question]]
    measure: Measure | None = None
    submission: Callable[[Sequence[Graded]], list[dict]] | None = None
    judged_mean: str = "mean"
    dimensions: int = 1


BENCHMARKS = {
    "msvd_qa": Benchmark("MSVD-QA", open_qa.read_msvd),
    "msrvtt_qa": Benchmark("MSRVTT-QA", open_qa.read_msrvtt),
    "activitynet_qa": Benchmark("ActivityNet-QA", open_qa.read_activitynet),
    "vcgbench": Benchmark("VCG-Bench", vcg.read_vcg, dimensions=5),
    "videomme": Benchmark("Video-MME", videomme.read_videomme, videomme.measure_videomme),
    "mlvu": Benchmark("MLVU", mlvu.read_dev, mlvu.measure_dev, judged_mean="G-Avg", dimensions=2),
    "mlvu_test": Benchmark("MLVU test", mlvu.read_test, mlvu.measure_test, mlvu.submission),
    "lvbench": Benchmark("LVBench", lvbench.read_lvbench, lvbench.measure_lvbench),
    "videohallucer": Benchmark(
        "VideoHallucer", videohallucer.read_videohallucer, videohallucer.measure_videohallucer
    ),
    "mvbench": Benchmark("MVBench", mvbench.read_mvbench, mvbench.measure_mvbench),
    "nextqa": Benchmark("NExT-QA", nextqa.read_nextqa, nextqa.measure_nextqa),
    "nextgqa": Benchmark("NExT-GQA", nextqa.read_grounded, nextqa.measure_grounded),
    "vnbench": Benchmark("VNBench", vnbench.read_vnbench, vnbench.measure_vnbench),
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
      UserError: there is none.
    """
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UserError(f"--benchmark {name!r} is not known; there are {known}.")
    return BENCHMARKS[name]


def read_benchmark(name: str, annotations: Path, media: Path) -> list[Question]:
    """All questions of a benchmark, each under an id of its own.

    annotations: the file (or folder of files) as published; media: folder of its videos.

    Raises:
      UserError: something is missing or not as published, or there is not one of the videos.
    """
    benchmark = find_benchmark(name)
    if not annotations.exists():
        raise UserError(
            f"--annotations {str(annotations)!r} does not exist; name the files of {name} as published."
        )
    if not media.is_dir():
        raise UserError(f"--media {str(media)!r} is not a folder; name the folder of the videos of {name}.")
    questions = with_unique_ids(benchmark.read(annotations, MediaFolder(media)))
    if not any(question.media.exists() for question in questions):
        raise UserError(
            f"--media {str(media)!r} has none of the videos of {len(questions)} questions, such as "
            f"{questions[0].media}; name the folder in which they are."
        )
    return questions
