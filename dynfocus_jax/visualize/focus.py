"""The focus picture: the frames that a connector chose, their scores, and the model's answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

CHOSEN, OTHER = "#c1272d", "#9aa0a6"  # colours of chosen and other frames


class FocusStrip(NamedTuple):
    """A row of the picture: a video, the connector's choice of frames, and an answer."""

    frames: np.ndarray  # uint8 [T, H, W, 3]
    times: np.ndarray  # [T], seconds
    scores: np.ndarray  # [T], importance of each frame, in [0, 1]
    chosen: np.ndarray  # bool [T], frames in focus
    question: str
    prediction: str
    answer: str | None = None  # the correct answer, None if unknown


def draw_focus(path: str | Path, strips: Sequence[FocusStrip]) -> None:
    """Draw the frames, scores and answer of each strip; the suffix of `path` sets the format."""
    columns = max(len(strip.frames) for strip in strips)
    figure = Figure(figsize=(0.62 * columns + 1.0, 2.05 * len(strips)), dpi=200, layout="constrained")
    rows = figure.subfigures(len(strips), 1, squeeze=False)[:, 0]
    with matplotlib.rc_context({"font.size": 7, "font.family": "DejaVu Sans"}):
        for row, strip in zip(rows, strips, strict=True):
            _draw_strip(row, strip, columns)
        figure.savefig(path)


def _draw_strip(figure, strip: FocusStrip, columns: int) -> None:
    grid = figure.add_gridspec(2, columns, height_ratios=(1, 0.62))
    count = len(strip.frames)
    for index in range(count):
        axes = figure.add_subplot(grid[0, index])
        axes.imshow(strip.frames[index], interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        color, width = (CHOSEN, 2.2) if strip.chosen[index] else (OTHER, 0.6)
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=width)
        axes.set_xlabel(f"{strip.times[index]:.1f} s", fontsize=5.5, labelpad=1.5)

    axes = figure.add_subplot(grid[1, :])
    colors = [CHOSEN if chosen else OTHER for chosen in strip.chosen]
    axes.bar(np.arange(count), np.maximum(strip.scores, 0.012), color=colors, width=0.55)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(0, 1.12), yticks=(0, 1), xticks=())
    axes.set_ylabel("score", labelpad=-2)
    axes.spines[["top", "right"]].set_visible(False)
    for color, label in ((CHOSEN, "in focus"), (OTHER, "other frames")):
        axes.bar([0], [0], color=color, label=label)
    axes.legend(loc="upper right", frameon=False, ncols=2, fontsize=6, borderpad=0, bbox_to_anchor=(1, 1.28))

    title = f"“{strip.question}”  →  {strip.prediction or '(no answer)'}"
    if strip.answer is not None:
        title += "  ✓" if strip.prediction == strip.answer else f"  ✗ (correct: {strip.answer})"
    figure.suptitle(title, x=0.01, ha="left", fontsize=8, fontweight="bold")
