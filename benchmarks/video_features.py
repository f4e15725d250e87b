"""Features as a vision tower might give them for a video: what benchmarks run on instead of white noise."""

import math

import numpy as np

SCENE = (16, 49)  # shortest length, and one more than the longest, in frames
WAVES = 4  # spatial frequencies a side of a scene's layout
OBJECTS = 3
PAN = 0.1  # drift of a scene from frame to frame


def video_features(frames: int, patches: int, width: int, seed: int = 0) -> np.ndarray:
    """Features [T, N, C] float32 of a made-up video.

    Every patch shares one offset, as in real towers. The video is cut into scenes of 16 to 48 frames; a third
    of them return to an earlier place. A place has a layout (smooth over the patch grid) and three objects
    (blobs of patches with features of their own) that cross it; the whole scene drifts slowly in a direction
    that changes, and every patch has noise. One scene in five is a still: nothing moves, and a tenth of the
    noise is left.

    Args:
      frames: T; patches: N, a square number; width: C.
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
            apart = (rows[:, None] - position[:, 0]) ** 2 + (columns[:, None] - position[:, 1]) ** 2
            blobs = np.exp(-apart / 0.02).astype(np.float32)  # [N, objects]
            features[t] = offset + layout + drift + blobs @ objects + noise * normal(patches, width)
        start = t + 1
    return features
