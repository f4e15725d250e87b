"""Exact match of greedy answers, and how often the frames that matter were in focus."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dynfocus_jax.batch import Batch
from dynfocus_jax.data.sources import Record
from dynfocus_jax.models.connectors import VisualTokens
from dynfocus_jax.serving.generate import Answers


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


def focused_frames(visual: VisualTokens, num_frames: int) -> np.ndarray | None:
    """bool `[B, T]`: frames encoded as cones; None when the connector selects nothing."""
    selection = visual.selection
    if selection is None or selection.frames.shape[1] == 0:
        return None
    frames, valid = np.asarray(selection.frames), np.asarray(selection.valid)
    focus = np.zeros((len(frames), num_frames), bool)
    rows = np.repeat(np.arange(len(frames))[:, None], frames.shape[1], axis=1)
    focus[rows[valid], frames[valid]] = True
    return focus


class Answered(NamedTuple):
    """A batch of answers with what judging them needs: `index [B]` and `frame_mask [B, T]` of the batch."""

    index: jax.Array
    frame_mask: jax.Array
    answers: Answers


def answered(batch: Batch, answers: Answers) -> Answered:
    """The answers to a batch, without the large arrays of what the model looked at."""
    visual = answers.visual._replace(tokens=None, mask=None)
    if visual.selection is not None:
        visual = visual._replace(selection=visual.selection._replace(events=None, indicators=None))
    return Answered(batch.index, batch.frame_mask, answers._replace(visual=visual))


def predict(
    batches: Iterable[Answered],
    records: Sequence[Record],
    decode: Callable[[Sequence[int]], str],
) -> list[Prediction]:
    """The predictions of answered batches (numpy; their `index` points into `records`), in their order."""
    predictions = []
    for index_of_row, frame_mask, answers in batches:
        focus = focused_frames(answers.visual, frame_mask.shape[1])
        for row, index in enumerate(index_of_row):
            if index < 0:
                continue
            record = records[index]
            text = decode(answers.tokens[row])
            recall = chance = scores = None
            if focus is not None:
                scores = answers.visual.selection.frame_scores[row]
                if record.needle_frames:
                    needles = list(record.needle_frames[-1])
                    recall = float(focus[row, needles].mean())
                    chance = _chance(answers.visual.selection, row, needles)
            predictions.append(
                Prediction(
                    record,
                    text,
                    text == record.turns[-1][1],
                    int(answers.visual.count[row]),
                    int(frame_mask[row].sum()),
                    recall,
                    chance,
                    scores,
                    None if focus is None else focus[row],
                )
            )
    return predictions


def _chance(selection, row: int, needles: list[int]) -> float:
    """Expected recall when as many of the candidate frames are chosen at random."""
    candidates = selection.centers[row][selection.prototype_valid[row]]
    kept = selection.valid[row].sum()
    return float(np.isin(needles, candidates).mean() * kept / len(candidates))


def summarize(predictions: Sequence[Prediction], total: int) -> dict:
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
