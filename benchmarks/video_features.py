"""Features as a vision tower might give them for a video: what benchmarks run on instead of white noise."""

import math

import numpy as np

SCENE = (8, 25)  # shortest length, and one more than the longest, in frames
WAVES = 4  # spatial frequencies a side of a scene's layout
OBJECTS = 3


def video_features(frames: int, patches: int, width: int, seed: int = 0) -> np.ndarray:
    """Features [T, N, C] float32 of a made-up video.

    Every patch shares one offset, as in real towers. The video is cut into scenes of 8 to 24 frames; a third
    of them return to an earlier place. A place has a layout (smooth over the patch grid) and three objects
    (a blob of patches with features of its own) that cross it; from frame to frame the whole scene drifts by
    a random walk and every patch has its own noise. One scene in five is a still: nothing moves, and only a
    tenth of the noise is left.

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
        motion, noise = (0.0, 0.04) if still else (1.0, 0.4)
        drift, position, velocity = normal(width) * 0.2, rng.random((OBJECTS, 2)), 0.05 * normal(OBJECTS, 2)
        for t in range(start, min(frames, start + rng.integers(*SCENE))):
            drift = drift + 0.05 * motion * normal(width)
            position = position + motion * velocity
            apart = (rows[:, None] - position[:, 0]) ** 2 + (columns[:, None] - position[:, 1]) ** 2
            blobs = np.exp(-apart / 0.02).astype(np.float32)  # [N, objects]
            features[t] = offset + layout + drift + blobs @ objects + noise * normal(patches, width)
        start = t + 1
    return features
