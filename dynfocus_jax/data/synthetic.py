"""The synthetic benchmark "needles": short H.264 videos in which three frames hold the answers.

A video has T frames of drifting texture in one to three scenes, spans of grey clutter, and three needles,
which are frames with two coloured objects each. Every shape and every colour occurs exactly once per video,
so each question has one answer, and the other needles are distractors. Images and short sequences with such
objects take the place of the pictures that published vision and language models are pre-trained on.
"""

import functools
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

import av
import numpy as np
from PIL import Image

FORMAT_VERSION = 2
SHAPES = ("disc", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (225, 40, 40),
    "green": (40, 185, 50),
    "blue": (45, 75, 235),
    "yellow": (240, 220, 40),
    "purple": (165, 45, 205),
    "cyan": (45, 215, 225),
}
QUESTION_WORDS = ("what", "shape", "is", "with", "which", "came", "first", "or", "describe", "nothing", "?")
VOCABULARY = (*QUESTION_WORDS, *SHAPES, *COLORS)

NUM_FRAMES = 16  # frames of a needle video
NUM_NEEDLES = 3
SEQUENCE_FRAMES = 3
IMAGE_SIZE = 48  # pixels
QUADRANT = IMAGE_SIZE // 2
OBJECT_SIZE = (19, 23)  # pixels, both ends included
NOISE = 9  # grey levels
ORDER_QUESTIONS = 4
FRAMES_PER_SECOND = 4
# Without look-ahead: on frames this small the encoder reads beyond its buffers, and the bytes would vary.
X264 = {
    "crf": "14",
    "preset": "veryfast",
    "x264-params": "threads=1:bframes=0:scenecut=0:mbtree=0:rc-lookahead=0",
}

VIDEO_SPLITS = ("train", "validation", "heldout")
QUESTION_SPLITS = ("validation", "heldout")  # one record per question; elsewhere one per file, with all turns
SPLITS: tuple[str, ...] = (*VIDEO_SPLITS, "images", "sequences")
_CHUNK = 50  # items per task of the worker pool


class SceneObject(TypedDict):
    """An object of a needle frame, image or sequence."""

    shape: str
    color: str
    frame: int
    quadrant: int  # in reading order, from 0


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
            frames = _draw_frames(rng, 1, objects, clutter, 1)
            Image.fromarray(frames[0]).save(folder / media, compress_level=1)
        elif split == "sequences":
            media, objects = f"media/{split}/{name}.mp4", _place_sequence(rng)
            clutter = [[frame] for frame in range(SEQUENCE_FRAMES) if rng.random() < 0.2]
            write_video(folder / media, _draw_frames(rng, SEQUENCE_FRAMES, objects, clutter, 1))
        else:
            media, objects = f"media/{split}/{name}.mp4", _place_needles(rng)
            clutter = _clutter_spans(rng, {item["frame"] for item in objects})
            scenes = int(rng.integers(1, 4))
            write_video(folder / media, _draw_frames(rng, NUM_FRAMES, objects, clutter, scenes))
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


# ---- Pixels ---------------------------------------------------------------------------------------------


@functools.cache
def shape_mask(shape: str, size: int, oversampling: int = 3) -> np.ndarray:
    """Return the coverage of the pixels of a square by a shape, float32 [size, size] in [0, 1]."""
    n = size * oversampling
    axis = (np.arange(n, dtype=np.float32) + 0.5) * (2 / n) - 1
    u, v = axis[None, :], axis[:, None]  # right, down; both in (-1, 1)
    radius = np.hypot(u, v)
    match shape:
        case "disc":
            inside = radius <= 1
        case "ring":
            inside = (radius <= 1) & (radius >= 0.55)
        case "square":
            inside = np.maximum(np.abs(u), np.abs(v)) <= 0.88
        case "triangle":
            inside = (np.abs(u) <= (v + 0.95) / 1.9) & (v <= 0.95)
        case "cross":
            inside = np.minimum(np.abs(u), np.abs(v)) <= 0.32
        case "star":
            inside = _star(u, v, radius)
        case _:
            raise ValueError(f"unknown shape {shape!r}, expected one of {SHAPES}")
    return inside.reshape(size, oversampling, size, oversampling).mean((1, 3), dtype=np.float32)


def _star(u: np.ndarray, v: np.ndarray, radius: np.ndarray, inner: float = 0.4) -> np.ndarray:
    """Return a five-pointed star: by symmetry, one edge from a tip (radius 1) to a notch (radius `inner`)."""
    sector = np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + sector) % (2 * sector) - sector)  # 0 at a tip, `sector` at a notch
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    notch_x, notch_y = inner * np.cos(sector), inner * np.sin(sector)
    return (1 - x) * notch_y >= y * (1 - notch_x)


def _draw_frames(
    rng: np.random.Generator,
    num_frames: int,
    objects: list[SceneObject],
    clutter: list[list[int]],
    scenes: int,
) -> np.ndarray:
    """Draw background, clutter (spans of frames) and objects: uint8 [T, IMAGE_SIZE, IMAGE_SIZE, 3]."""
    frames = _background(rng, num_frames, scenes)
    for span in clutter:
        taken = {item["quadrant"] for item in objects if item["frame"] in span}
        _draw_clutter(rng, frames, span, [quadrant for quadrant in range(4) if quadrant not in taken])
    for item in objects:
        size = int(rng.integers(OBJECT_SIZE[0], OBJECT_SIZE[1] + 1))
        color = np.asarray(COLORS[item["color"]], np.float32) + rng.uniform(-8, 8, 3)
        _draw_object(rng, frames, [item["frame"]], item["shape"], size, item["quadrant"], color)
    frames += rng.uniform(-NOISE, NOISE, frames.shape)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, num_frames: int, scenes: int) -> np.ndarray:
    """Draw scenes of a muted colour with a drifting sinusoid: float32 [num_frames, size, size, 3]."""
    cuts = np.sort(rng.choice(np.arange(1, num_frames), scenes - 1, replace=False)) if scenes > 1 else []
    scene = np.searchsorted(cuts, np.arange(num_frames), side="right")  # [num_frames]
    base = (rng.uniform(70, 170, (scenes, 1)) + rng.uniform(-22, 22, (scenes, 3)))[scene]
    wave = rng.uniform(-0.5, 0.5, (scenes, 2))[scene]  # radians per pixel, along x and y
    speed, phase = rng.uniform(-0.8, 0.8, scenes)[scene], rng.uniform(0, 2 * np.pi, scenes)[scene]
    strength = rng.uniform(6, 20, (scenes, 3))[scene]
    x, y = np.meshgrid(np.arange(IMAGE_SIZE), np.arange(IMAGE_SIZE))
    angle = (wave[:, 0, None, None] * x + wave[:, 1, None, None] * y) + (
        phase + speed * np.arange(num_frames)
    )[:, None, None]
    texture = base[:, None, None, :] + strength[:, None, None, :] * np.sin(angle)[..., None]
    return texture.astype(np.float32)


def _draw_clutter(
    rng: np.random.Generator, frames: np.ndarray, span: list[int], quadrants: list[int]
) -> None:
    """Draw one to three grey shapes into some of the quadrants, the same in every frame of the span."""
    count = min(len(quadrants), int(rng.integers(1, 4)))
    for quadrant in rng.permutation(quadrants)[:count]:
        grey = rng.uniform(30, 225) + rng.uniform(-10, 10, 3)
        size = int(rng.integers(12, OBJECT_SIZE[1] + 1))
        _draw_object(rng, frames, span, str(rng.choice(SHAPES)), size, int(quadrant), grey)


def _draw_object(
    rng: np.random.Generator,
    frames: np.ndarray,
    span: list[int],
    shape: str,
    size: int,
    quadrant: int,
    color: np.ndarray,
) -> None:
    """Draw a shape at a random position of a quadrant into some of `frames` [T, H, W, 3], in place."""
    row, column = divmod(quadrant, 2)
    top = row * QUADRANT + int(rng.integers(0, QUADRANT - size + 1))
    left = column * QUADRANT + int(rng.integers(0, QUADRANT - size + 1))
    place = (span, slice(top, top + size), slice(left, left + size))
    frames[place] += shape_mask(shape, size)[..., None] * (color - frames[place])


def write_video(path: str | Path, frames: np.ndarray, options: dict[str, str] = X264) -> None:
    """Encode frames uint8 [T, H, W, 3] as H.264 (yuv420p), in one thread for reproducible bytes."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=dict(options))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
