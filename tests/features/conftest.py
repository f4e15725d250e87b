"""Videos and images, a configuration of two stages that reads them, and a checkpoint with a vision tower."""

import json
import pickle

import jax
import numpy as np
import pytest
from PIL import Image

from dynfocus_jax import trees
from dynfocus_jax.data.synthetic import VOCABULARY
from dynfocus_jax.data.synthetic_frames import write_video
from dynfocus_jax.extract import extract_features
from dynfocus_jax.parameters import init_params, param_shapes
from dynfocus_jax.training.checkpoints import save_params
from dynfocus_jax.video_language_model import build_model
from dynfocus_jax.weights.conversion import belongs_to_connector
from tests.features.extract_config import BATCH_SIZE, FRAMES, make_config
from tests.tiny import SIZE, mesh_of, perturb, tiny_config


def entry(name, media, *, question="what is red ?", answer="square", **fields):
    """Return an entry of a LLaVA file."""
    media_field = {} if media is None else {"image" if media.endswith(".png") else "video": media}
    prompt = question if media is None else f"<image>\n{question}"
    conversation = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": conversation} | media_field | fields


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The data root, with media and annotations."""
    root = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for name, count in FRAMES.items():
        frames = rng.integers(0, 256, (count, 24, 32, 3), dtype=np.uint8)
        write_video(root / name, np.full_like(frames, 90) if name == "still.mp4" else frames)
    for i in range(2):
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    align = [
        *(entry(f"v{i}", name) for i, name in enumerate(FRAMES)),
        entry("part", "long.mp4", start=1.0, end=3.0),
        entry("words", None, question="describe", answer="nothing"),
        entry("again", "short.mp4", question="what shape is blue ?", answer="ring"),
        entry("picture", "0.png"),
    ]
    instruct = [entry("one", "middle.mp4"), entry("two", "1.png"), entry("three", "long.mp4")]
    for name, entries in (("align", align), ("instruct", instruct)):
        (root / f"{name}.json").write_text(json.dumps(entries))
    (root / "vocabulary.json").write_text(json.dumps(VOCABULARY))
    return root


@pytest.fixture(scope="session")
def initial(tmp_path_factory):
    """A checkpoint of a whole model without its connector, all of whose parameters affect the output."""
    config = tiny_config()
    config.model.dtype = "float32"
    index = len(config.stages) - 1
    shapes = param_shapes(config, index)
    mesh = mesh_of()
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)
        for path, leaf in shapes.items()
        if not belongs_to_connector(path)
    }
    model = build_model(config, index)
    params = perturb(trees.unflatten(init_params(model, jax.random.key(5), shapes)))
    path = tmp_path_factory.mktemp("initial")
    save_params(path, jax.device_get(params))
    return path


@pytest.fixture
def config(folder, initial):
    """Two stages with a frozen vision tower, the first with two buckets."""
    return make_config(folder, initial)


@pytest.fixture(scope="session")
def extracted(folder, initial, tmp_path_factory):
    """Folders with the features of all media, by dtype."""
    folders = {}
    for dtype in ("float32", "bfloat16"):
        folders[dtype] = tmp_path_factory.mktemp(f"features_{dtype}")
        extract_features(make_config(folder, initial, dtype), folders[dtype], batch_size=BATCH_SIZE)
    return folders


@pytest.fixture
def movie():
    """`movie(path, frames, seed=0)` writes and returns movie features for the tiny vision tower."""

    def write(path, frames, seed=0, tokens=(SIZE // 4) ** 2, width=16, text=None):
        values = np.random.default_rng(seed).standard_normal((frames, tokens, width)).astype(np.float16)
        text = text or "".join(f"<image>word {i}" if i % 2 else "<image>..." for i in range(frames))
        path.write_bytes(pickle.dumps({"feats": values, "inputs": text}))
        return values

    return write
