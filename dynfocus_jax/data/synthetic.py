"""The synthetic benchmark "needles": short H.264 videos in which three frames hold the answers.

A video has T frames of drifting texture in one to three scenes, spans of grey clutter, and three needles,
which are frames with two coloured objects each. Every shape and every colour occurs exactly once per video,
so each question has one answer, and the other needles are distractors. Images and short sequences with such
objects take the place of the pictures that published vision and language models are pre-trained on.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from dynfocus_jax.data.synthetic_frames import (
    COLORS,
    FRAMES_PER_SECOND,
    IMAGE_SIZE,
    NOISE,
    OBJECT_SIZE,
    SHAPES,
    X264,
    SceneObject,
    draw_frames,
    write_video,
)

FORMAT_VERSION = 2
QUESTION_WORDS = ("what", "shape", "is", "with", "which", "came", "first", "or", "describe", "nothing", "?")
VOCABULARY = (*QUESTION_WORDS, *SHAPES, *COLORS)

NUM_FRAMES = 16  # frames of a needle video
NUM_NEEDLES = 3
SEQUENCE_FRAMES = 3
ORDER_QUESTIONS = 4
VIDEO_SPLITS = ("train", "validation", "heldout")
QUESTION_SPLITS = ("validation", "heldout")  # one record per question; elsewhere one per file, with all turns
SPLITS: tuple[str, ...] = (*VIDEO_SPLITS, "images", "sequences")
_CHUNK = 50  # items per task of the worker pool


class _Turn(TypedDict):
    """A question with its answer."""

    type: str
    question: str
    answer: str
    frames: list[int]  # that show the answer


_Entry = dict[str, Any]  # of a LLaVA file


def generate_needles(
    root: str | Path,
    *,
    seed: int = 0,
    num_train: int = 1600,
    num_validation: int = 64,
    num_heldout: int = 128,
    num_images: int = 8000,
    num_sequences: int = 4000,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the benchmark, unless it exists, and return its folder.

    The folder holds a LLaVA JSON file per split (`validation`, `heldout`: one record per question; `train`,
    `images`, `sequences`: one record per file, with all questions as turns), `truth.json` (the objects of
    each file), `vocabulary.json` and `media/`. It gets its name once it is complete.

    Args:
      root: parent of the folder. The folder's name contains a hash of everything that determines its content.
      seed: seed of the content.
      num_train, num_validation, num_heldout, num_images, num_sequences: numbers of files.
      workers: number of processes; does not affect the content.
      progress: called as `progress(done, total)` while files are written.
    """
    counts = dict(
        zip(SPLITS, (num_train, num_validation, num_heldout, num_images, num_sequences), strict=True)
    )
    folder = Path(root) / f"needles-{_spec_hash(seed, counts)}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".needles-", dir=folder.parent))
    try:
        _write_benchmark(partial, seed, counts, workers, progress or (lambda done, total: None))
        partial.chmod(0o755)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():  # if it does, another process was faster and wrote the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _spec_hash(seed: int, counts: dict[str, int]) -> str:
    spec = {
        "version": FORMAT_VERSION,
        "seed": seed,
        "counts": counts,
        "words": VOCABULARY,
        "colors": COLORS,
        "numbers": (
            NUM_FRAMES,
            NUM_NEEDLES,
            SEQUENCE_FRAMES,
            IMAGE_SIZE,
            OBJECT_SIZE,
            NOISE,
            ORDER_QUESTIONS,
        ),
        "codec": (X264, FRAMES_PER_SECOND),
    }
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]


def _write_benchmark(
    folder: Path, seed: int, counts: dict[str, int], workers: int, progress: Callable[[int, int], None]
) -> None:
    tasks = [
        (split, range(start, min(start + _CHUNK, count)))
        for split, count in counts.items()
        for start in range(0, count, _CHUNK)
    ]
    for split in SPLITS:
        (folder / "media" / split).mkdir(parents=True)
    results, done, total = {}, 0, sum(counts.values())
    # spawn: the caller may hold threads and devices that do not survive a fork
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_write_items, folder, seed, *task): task for task in tasks}
        for future in as_completed(futures):
            split, indices = futures[future]
            results[split, indices.start] = future.result()
            done += len(indices)
            progress(done, total)
    truth = {}
    for split in SPLITS:
        items = [item for task in tasks if task[0] == split for item in results[split, task[1].start]]
        _write_json(folder / f"{split}.json", [record for _, _, records in items for record in records])
        truth.update({media: scene for media, scene, _ in items})
    _write_json(folder / "truth.json", truth)
    _write_json(folder / "vocabulary.json", VOCABULARY)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_items(
    folder: Path, seed: int, split: str, indices: range
) -> list[tuple[str, list[SceneObject], list[_Entry]]]:
    """Write the media files of some items of a split; return (media path, objects, records) of each."""
    items = []
    for index in indices:
        rng = np.random.default_rng((seed, SPLITS.index(split), index))
        name = f"{split}-{index:05d}"
        if split == "images":
            media, objects = f"media/{split}/{name}.png", _place_image(rng)
            clutter = [[0]] if rng.random() < 0.3 else []
            frames = draw_frames(rng, 1, objects, clutter, 1)
            Image.fromarray(frames[0]).save(folder / media, compress_level=1)
        elif split == "sequences":
            media, objects = f"media/{split}/{name}.mp4", _place_sequence(rng)
            clutter = [[frame] for frame in range(SEQUENCE_FRAMES) if rng.random() < 0.2]
            write_video(folder / media, draw_frames(rng, SEQUENCE_FRAMES, objects, clutter, 1))
        else:
            media, objects = f"media/{split}/{name}.mp4", _place_needles(rng)
            clutter = _clutter_spans(rng, {item["frame"] for item in objects})
            scenes = int(rng.integers(1, 4))
            write_video(folder / media, draw_frames(rng, NUM_FRAMES, objects, clutter, scenes))
        turns = _shape_turns(objects) + _with_turns(objects) + _order_turns(rng, objects)
        if split in ("images", "sequences"):
            turns.insert(0, _caption_turn(objects))
        records = _single_turn_records if split in QUESTION_SPLITS else _multi_turn_record
        items.append((media, objects, records(name, media, turns)))
    return items


# ---- Objects --------------------------------------------------------------------------------------------


def _objects(rng: np.random.Generator, frames: list[int]) -> list[SceneObject]:
    """Return an object per entry of `frames`: no shape, colour or quadrant of a frame occurs twice."""
    shapes, colors = rng.permutation(SHAPES), rng.permutation(list(COLORS))
    free = {frame: rng.permutation(4).tolist() for frame in frames}
    return [
        {"shape": str(shape), "color": str(color), "frame": frame, "quadrant": free[frame].pop()}
        for shape, color, frame in zip(shapes, colors, frames, strict=False)
    ]


def _place_needles(rng: np.random.Generator) -> list[SceneObject]:
    needles = np.sort(rng.choice(NUM_FRAMES, NUM_NEEDLES, replace=False)).tolist()
    return _objects(rng, [frame for frame in needles for _ in range(2)])


def _place_image(rng: np.random.Generator) -> list[SceneObject]:
    return _objects(rng, [0] * int(rng.integers(0, 5)))


def _place_sequence(rng: np.random.Generator) -> list[SceneObject]:
    counts = rng.integers(0, 3, SEQUENCE_FRAMES)
    return _objects(rng, np.repeat(np.arange(SEQUENCE_FRAMES), counts).tolist())


def _clutter_spans(rng: np.random.Generator, needles: set[int]) -> list[list[int]]:
    """Return two spans of two to four frames, without the needles."""
    starts, lengths = rng.integers(0, NUM_FRAMES - 3, 2), rng.integers(2, 5, 2)
    return [
        [frame for frame in range(start, start + length) if frame not in needles]
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]


# ---- Questions ------------------------------------------------------------------------------------------


def _shape_turns(objects: list[SceneObject]) -> list[_Turn]:
    return [
        _turn("shape", f"what shape is {item['color']} ?", item["shape"], [item["frame"]]) for item in objects
    ]


def _with_turns(objects: list[SceneObject]) -> list[_Turn]:
    turns = []
    for item in objects:
        others = [other for other in objects if other["frame"] == item["frame"] and other is not item]
        if len(others) == 1:
            answer = f"{others[0]['color']} {others[0]['shape']}"
            turns.append(_turn("with", f"what is with {item['color']} ?", answer, [item["frame"]]))
    return turns


def _order_turns(rng: np.random.Generator, objects: list[SceneObject]) -> list[_Turn]:
    """Ask for the order of colours in different frames; every other question names the earlier one first."""
    pairs = [(a, b) for a in objects for b in objects if a["frame"] < b["frame"]]
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:ORDER_QUESTIONS]]
    flip = int(rng.integers(2))
    turns = []
    for i, (early, late) in enumerate(chosen):
        first, second = (early, late) if (i + flip) % 2 else (late, early)
        question = f"which came first {first['color']} or {second['color']} ?"
        turns.append(_turn("order", question, early["color"], [early["frame"], late["frame"]]))
    return turns


def _caption_turn(objects: list[SceneObject]) -> _Turn:
    """Ask for a caption, which names all objects in order of time and position."""
    ordered = sorted(objects, key=lambda item: (item["frame"], item["quadrant"]))
    caption = " ".join(f"{item['color']} {item['shape']}" for item in ordered)
    return _turn("caption", "describe", caption or "nothing", sorted({item["frame"] for item in objects}))


def _turn(kind: str, question: str, answer: str, frames: list[int]) -> _Turn:
    return {"type": kind, "question": question, "answer": answer, "frames": frames}


def _conversation(turns: list[_Turn]) -> list[dict[str, str]]:
    messages = []
    for i, turn in enumerate(turns):
        marker = "<image>\n" if i == 0 else ""
        messages.append({"from": "human", "value": marker + turn["question"]})
        messages.append({"from": "gpt", "value": turn["answer"]})
    return messages


def _single_turn_records(name: str, media: str, turns: list[_Turn]) -> list[_Entry]:
    """Return one record per question, with its type."""
    return [
        {"type": turn["type"], **_multi_turn_record(f"{name}-{i:02d}", media, [turn])[0]}
        for i, turn in enumerate(turns)
    ]


def _multi_turn_record(name: str, media: str, turns: list[_Turn]) -> list[_Entry]:
    """Return one record with all questions."""
    return [
        {
            "id": name,
            "image" if media.endswith(".png") else "video": media,
            "conversations": _conversation(turns),
            "needle_frames": [turn["frames"] for turn in turns],
        }
    ]
