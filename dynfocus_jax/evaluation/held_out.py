"""Evaluation of a training run on held-out questions: answers, measures, a picture of the frames in focus."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.data.budget import Budget
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.data.order import BatchOrder
from dynfocus_jax.data.pipeline import make_dataset
from dynfocus_jax.data.prepare import make_media_reader
from dynfocus_jax.data.samples import SampleLoader
from dynfocus_jax.data.skipped import SkippedSamples
from dynfocus_jax.errors import MediaError
from dynfocus_jax.evaluation.exact_match import Prediction, collect_predictions, summarize_predictions
from dynfocus_jax.features.compatibility import check_vision_weights
from dynfocus_jax.features.store import open_features
from dynfocus_jax.parallel.processes import is_process_zero, process_file_name
from dynfocus_jax.parallel.sharding import local_rows, to_devices
from dynfocus_jax.records.sources import read_records
from dynfocus_jax.serving.engine import Engine
from dynfocus_jax.text.conversation import TEMPLATES
from dynfocus_jax.text.tokenizers import Tokenizer
from dynfocus_jax.visualize.focus import FocusStrip, draw_focus


def evaluate_held_out(
    config: ConfigDict, params: dict, *, data_root: Path, tokenizer: Tokenizer, workdir: Path, mesh: Mesh
) -> dict[str, Any]:
    """Answer all questions of `config.evaluation.annotations`; write predictions.jsonl and focus.png.

    The devices of the mesh share each batch of questions. All processes return the results; the first one
    writes the files.

    params: the parameters on the mesh after the last stage. `Engine` copies those whose layout differs.
    """
    evaluation = config.evaluation
    records = read_records(data_root / evaluation.annotations, data_root)
    media = make_media_reader(config, data_root)
    loader = SampleLoader(
        records,
        tokenizer,
        TEMPLATES[config.data.template],
        media,
        Budget.from_buckets(
            [(evaluation.media_frames, evaluation.max_text)], max_subtitle=evaluation.max_subtitle
        ),
        max_query=config.data.max_query,
        guidance=config.data.text_guidance,
        prompt_only=True,
    )
    batches = make_dataset(
        loader,
        BatchOrder.single_epoch(len(loader), evaluation.batch_size),
        rows=local_rows(mesh, evaluation.batch_size),
        skipped=SkippedSamples(
            workdir / process_file_name("skipped.jsonl"), max_share=config.data.max_skip_share
        ),
        num_threads=config.data.threads,
        num_processes=config.data.processes,
    )
    check_vision_weights(media.features, trees.flatten(params), mesh)
    engine = Engine(config, params, tokenizer, mesh)
    answers = (engine.answer_batch(to_devices(batch, mesh), evaluation.max_new_tokens) for batch in batches)
    predictions = collect_predictions(answers, records, tokenizer.decode)
    if is_process_zero():
        _write_predictions(workdir / "predictions.jsonl", predictions)
        pixels = media if media.features is None else make_media_reader(config)
        strips = _choose_strips(predictions, evaluation, pixels)
        if strips:
            draw_focus(workdir / "focus.png", strips)
    return summarize_predictions(predictions, len(records))


def check_held_out_features(config: ConfigDict, data_root: Path) -> None:
    """Check that the features of a run include its held-out questions; raise UserError if not."""
    features, evaluation = open_features(config, data_root), config.evaluation
    if features is not None:
        records = read_records(data_root / evaluation.annotations, data_root)
        features.check_coverage(records, [evaluation.media_frames], config.data.max_skip_share)


def _choose_strips(
    predictions: list[Prediction], evaluation: ConfigDict, media: MediaReader
) -> list[FocusStrip]:
    """Return one question about each of the first videos, of different types if possible."""
    strips: list[FocusStrip] = []
    seen_media, seen_kinds = set(), set()
    kinds = {prediction.record.kind for prediction in predictions}
    for prediction in predictions:
        record = prediction.record
        if len(strips) == evaluation.focus_videos:
            break
        if seen_kinds >= kinds:
            seen_kinds.clear()
        if prediction.focus is None or record.media in seen_media or record.kind in seen_kinds:
            continue
        seen_media.add(record.media)
        try:
            clip = media.read(record, evaluation.media_frames, np.random.default_rng(0))
        except MediaError:  # the video may have been deleted after its features were extracted
            continue
        seen_kinds.add(record.kind)
        count = len(clip.frames)
        strips.append(
            FocusStrip(
                clip.frames,
                clip.times,
                prediction.focus.scores[:count],
                prediction.focus.chosen[:count],
                record.turns[-1][0],
                prediction.answer,
                record.turns[-1][1],
            )
        )
    return strips


def _write_predictions(path: Path, predictions: list[Prediction]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            entry = {
                "id": prediction.record.id,
                "type": prediction.record.kind,
                "question": prediction.record.turns[-1][0],
                "answer": prediction.record.turns[-1][1],
                "prediction": prediction.answer,
                "correct": prediction.correct,
                "focus": None if prediction.focus is None else prediction.focus.chosen.nonzero()[0].tolist(),
                "needles": [frame for turn in prediction.record.needle_frames[-1:] for frame in turn],
            }
            file.write(json.dumps(entry) + "\n")


def format_held_out(results: Mapping[str, Any]) -> str:
    """Return the short table that a training run prints at its end."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    rows = [
        ("questions", f"{results['questions']} ({results['unread']} unread, counted as wrong)"),
        ("accuracy", percent(results["accuracy"])),
        *((f"  {kind}", percent(value)) for kind, value in results["accuracy_by_type"].items()),
        (
            "needle recall",
            f"{percent(results['needle_recall'])} (random {percent(results['selection_chance'])})",
        ),
        ("visual tokens", f"{results['visual_tokens']:.1f} for {results['frames']:.1f} frames"),
        ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in results["seconds_by_stage"].items())),
    ]
    return "\n".join(f"{name:<16}{value}" for name, value in rows)
