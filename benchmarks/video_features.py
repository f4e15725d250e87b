"""Synthetic features that resemble those of a vision tower, as benchmark input instead of white noise."""

import math

import numpy as np

SCENE = (16, 49)  # range of scene lengths, end excluded, frames
WAVES = 4  # spatial frequencies of a scene's layout, per axis
OBJECTS = 3  # per scene
PAN = 0.1  # drift of a scene per frame


def video_features(frames: int, patches: int, width: int, seed: int = 0) -> np.ndarray:
    """Return the features, float32 [T, N, C], of a synthetic video.

    All patches share one offset, as in real towers. The video consists of scenes of 16 to 48 frames; a third
    of them return to an earlier place. A place has a layout (smooth over the patch grid) and three objects
    (blobs of patches with their own features) that move across it. The whole scene drifts slowly in a
    changing direction, and every patch has noise. One scene in five is still: nothing moves, and the noise
    is a tenth.

    Args:
      frames: T.
      patches: N, a square number.
      width: C.
      seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    side = math.isqrt(patches)
    rows, columns = (
        axis.ravel() for axis in np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j].astype(np.float32)
    )
    waves = [
        np.cos(np.pi * i * rows) * np.cos(np.pi * j * columns) for i in range(WAVES) for j in range(WAVES)
    ]
    waves = np.stack(waves, axis=1) / WAVES  # [N, waves]

    offset = 2 * normal(width)
    features = np.empty((frames, patches, width), np.float32)
    places, start = [], 0
    while start < frames:
        if not places or rng.random() < 2 / 3:
            layout, objects = waves @ normal(WAVES**2, width), normal(OBJECTS, width)
            places.append((layout, objects))
        else:
            layout, objects = places[rng.integers(len(places))]
        still = rng.random() < 0.2
        motion, noise = (0.0, 0.03) if still else (1.0, 0.3)
        drift, pan = 0.2 * normal(width), PAN * normal(width)
        position, velocity = rng.random((OBJECTS, 2)), 0.05 * normal(OBJECTS, 2)
        for t in range(start, min(frames, start + rng.integers(*SCENE))):
            pan = 0.9 * pan + 0.1 * PAN * normal(width)
            drift = drift + motion * pan
            position = position + motion * velocity
            squared_distance = (rows[:, None] - position[:, 0]) ** 2 + (
                columns[:, None] - position[:, 1]
            ) ** 2
            blobs = np.exp(-squared_distance / 0.02).astype(np.float32)  # [N, objects]
            features[t] = offset + layout + drift + blobs @ objects + noise * normal(patches, width)
        start = t + 1
    return features
