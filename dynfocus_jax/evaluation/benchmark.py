"""The interface of benchmarks: what a module in `benchmarks/` declares."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dynfocus_jax.evaluation.grading import GradedAnswer
from dynfocus_jax.evaluation.measures import Measure
from dynfocus_jax.evaluation.questions import Question
from dynfocus_jax.media.folder import MediaFolder

# Video-MME's prompt, which multiple-choice benchmarks without a prompt of their own use too
CHOICE_PROMPT = (
    "Select the best answer to the following multiple-choice question based on the {seen}. Respond with only "
    "the letter ({letters}) of the correct option.\n{question}\n{options}\nThe best answer is:"
)
# One frame per second; 200 evenly spaced frames where that gives more than 2000 (published rule)
LONG_VIDEO = {"sampling": {"kind": "fps"}}


class Benchmark(NamedTuple):
    """A published benchmark.

    title: its published name.
    read: turns an annotation file (or folder) and a media folder into questions.
    measure: of closed questions; None if all are open.
    submission: the list that is sent to its authors.
    judged_mean: name of the mean over the dimensions that a judge marks.
    num_dimensions: their number.
    settings: fields of its section of evaluate's configuration (`configuration.BENCHMARK`) that differ from
      the defaults: its published prompt, its sampling of frames.
    """

    title: str
    read: Callable[[Path, MediaFolder], list[Question]]
    measure: Measure | None = None
    submission: Callable[[Sequence[GradedAnswer]], list[dict[str, str]]] | None = None
    judged_mean: str = "mean"
    num_dimensions: int = 1
    settings: Mapping[str, Any] = {}
