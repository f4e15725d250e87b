"""Exact match of greedy answers, and how often the frames that matter were in focus."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dynfocus_jax.records.records import Record
from dynfocus_jax.serving.engine import BatchAnswers


class Prediction(NamedTuple):
    """One answered question. `frame_scores [T]` and `focus [T]` (bool) are None without a selection."""

    record: Record
    answer: str
    correct: bool
    visual_tokens: int
    frames: int
    recall: float | None
    chance: float | None
    frame_scores: np.ndarray | None
    focus: np.ndarray | None


def predict(
    batches: Iterable[BatchAnswers], records: Sequence[Record], decode: Callable[[Sequence[int]], str]
) -> list[Prediction]:
    """The predictions of answered batches, whose `index` points into `records`, in their order."""
    predictions = []
    for index_of_row, tokens, clips in batches:
        for row, index in enumerate(index_of_row):
            if index < 0:
                continue
            record = records[index]
            text = decode(tokens[row])
            recall = chance = scores = focus = None
            if clips.focus is not None:
                scores, focus = np.asarray(clips.focus.scores[row]), np.asarray(clips.focus.chosen[row])
                if record.needle_frames:
                    needles = list(record.needle_frames[-1])
                    recall = float(focus[needles].mean())
                    chance = _chance(focus, np.asarray(clips.focus.candidates[row]), needles)
            predictions.append(
                Prediction(
                    record,
                    text,
                    text == record.turns[-1][1],
                    int(clips.count[row]),
                    int(clips.frames[row]),
                    recall,
                    chance,
                    scores,
                    focus,
                )
            )
    return predictions


def _chance(focus: np.ndarray, candidates: np.ndarray, needles: list[int]) -> float:
    """Expected recall when as many of the candidate frames are chosen at random."""
    return float(candidates[needles].mean() * focus.sum() / candidates.sum())


def summarize_predictions(predictions: Sequence[Prediction], total: int) -> dict:
    """The measures of `eval.json`; questions that could not be read (of `total`) count as wrong."""
    by_kind = defaultdict(list)
    for prediction in predictions:
        by_kind[prediction.record.kind].append(prediction.correct)

    def mean(values):
        values = [value for value in values if value is not None]
        return float(np.mean(values)) if values else None

    return {
        "questions": total,
        "unread": total - len(predictions),
        "accuracy": sum(p.correct for p in predictions) / total,
        "accuracy_by_type": {kind: float(np.mean(correct)) for kind, correct in sorted(by_kind.items())},
        "needle_recall": mean(p.recall for p in predictions),
        "selection_chance": mean(p.chance for p in predictions),
        "visual_tokens": mean(p.visual_tokens for p in predictions),
        "frames": mean(p.frames for p in predictions),
    }
