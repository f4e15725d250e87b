"""Frames of the benchmark "needles": scenes with coloured shapes, drawn and encoded."""

import functools
from pathlib import Path
from typing import TypedDict

import av
import numpy as np

SHAPES = ("disc", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (225, 40, 40),
    "green": (40, 185, 50),
    "blue": (45, 75, 235),
    "yellow": (240, 220, 40),
    "purple": (165, 45, 205),
    "cyan": (45, 215, 225),
}

IMAGE_SIZE = 48  # pixels
QUADRANT = IMAGE_SIZE // 2
OBJECT_SIZE = (19, 23)  # pixels, both ends included
NOISE = 9  # grey levels
FRAMES_PER_SECOND = 4
# Without look-ahead: on frames this small the encoder reads beyond its buffers, and the bytes would vary.
X264 = {
    "crf": "14",
    "preset": "veryfast",
    "x264-params": "threads=1:bframes=0:scenecut=0:mbtree=0:rc-lookahead=0",
}


class SceneObject(TypedDict):
    """An object of a needle frame, image or sequence."""

    shape: str
    color: str
    frame: int
    quadrant: int  # in reading order, from 0


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


def draw_frames(
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
