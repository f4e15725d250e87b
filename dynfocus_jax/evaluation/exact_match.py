"""Exact match of greedy answers, and recall of the needle frames among the frames in focus."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynfocus_jax.records.records import Record
from dynfocus_jax.serving.engine import BatchAnswers


class ChosenFrames(NamedTuple):
    """A connector's choice of the frames of one clip, padded."""

    scores: np.ndarray  # [T], importance of each frame
    candidates: np.ndarray  # bool [T], frames that could be chosen
    chosen: np.ndarray  # bool [T]


class Prediction(NamedTuple):
    """One answered question."""

    record: Record
    answer: str
    correct: bool
    visual_tokens: int
    num_frames: int
    focus: ChosenFrames | None  # None for a connector that chooses no frames
    recall: float | None  # fraction of the needle frames that were chosen; None without any
    chance: float | None  # expected recall of a random choice


def collect_predictions(
    batches: Iterable[BatchAnswers], records: Sequence[Record], decode: Callable[[list[int]], str]
) -> list[Prediction]:
    """Return the predictions of answered batches, whose `index` points into `records`, in their order."""
    predictions = []
    for batch in batches:
        clips = batch.clips
        for row, index in enumerate(batch.index):
            if index < 0:
                continue
            record = records[index]
            answer = decode(batch.tokens[row])
            focus = recall = chance = None
            if clips.focus is not None:
                focus = ChosenFrames(
                    np.asarray(clips.focus.scores[row]),
                    np.asarray(clips.focus.candidates[row]),
                    np.asarray(clips.focus.chosen[row]),
                )
                if record.needle_frames:
                    needles = list(record.needle_frames[-1])
                    recall, chance = float(focus.chosen[needles].mean()), _random_recall(focus, needles)
            predictions.append(
                Prediction(
                    record,
                    answer,
                    answer == record.turns[-1][1],
                    int(clips.count[row]),
                    int(clips.frames[row]),
                    focus,
                    recall,
                    chance,
                )
            )
    return predictions


def _random_recall(focus: ChosenFrames, needles: list[int]) -> float:
    """Return the expected recall if as many of the candidate frames were chosen at random."""
    return float(focus.candidates[needles].mean() * focus.chosen.sum() / focus.candidates.sum())


def summarize_predictions(predictions: Sequence[Prediction], total: int) -> dict[str, Any]:
    """Return the measures of `eval.json`.

    total: number of questions; those without a prediction, because they could not be read, count as wrong.
    """
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for prediction in predictions:
        by_kind[prediction.record.kind].append(prediction.correct)
    return {
        "questions": total,
        "unread": total - len(predictions),
        "accuracy": sum(p.correct for p in predictions) / total,
        "accuracy_by_type": {kind: float(np.mean(correct)) for kind, correct in sorted(by_kind.items())},
        "needle_recall": _mean(p.recall for p in predictions),
        "selection_chance": _mean(p.chance for p in predictions),
        "visual_tokens": _mean(p.visual_tokens for p in predictions),
        "frames": _mean(p.num_frames for p in predictions),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
