"""A configuration of two stages for tests of extraction.

Commands read this file with --config; the environment variables DATA and INITIAL name the data and the
checkpoint.
"""

import os

from dynfocus_jax.config import stage
from tests.tiny import tiny_config

FRAMES = {"short.mp4": 3, "long.mp4": 23, "middle.mp4": 11, "still.mp4": 6}  # number of frames of each video
BATCH_SIZE = 16  # frames in one call of the vision tower


def get_config(_options=""):
    return make_config(os.environ["DATA"], os.environ["INITIAL"])


def make_config(folder, initial, dtype="float32"):
    config = tiny_config()
    config.model.dtype = dtype
    config.initial = str(initial)
    config.data.update({"root": str(folder), "generate": None, "max_skip_share": 0.3})
    config.evaluation.annotations = None
    rest = {"batch_size": 4, "steps": 3, "trainable": ("language/.*", "connector/.*", "text_encoder/.*")}
    config.stages = (
        stage(name="align", annotations="align.json", buckets=((2, 32), (16, 32)), **rest),
        stage(name="instruct", annotations="instruct.json", num_frames=8, max_text=32, **rest),
    )
    return config
