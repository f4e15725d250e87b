"""A smaller version of the toy configuration, with batches, parameters and meshes for it."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dynfocus_jax import trees
from dynfocus_jax.batch import Batch, padding_sample
from dynfocus_jax.connectors.registry import change_kind
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.training.losses import answer_loss
from dynfocus_jax.video_language_model import build_model, row_randomness

TOY = Path(__file__).resolve().parents[1] / "configs" / "toy.py"
SIZE, MAX_QUERY, VOCABULARY = 16, 8, 40
K, J, SAMPLES = 5, 2, 20  # prototypes, selected ones, noise samples


def tiny_config(arg: str = ""):
    """Return `configs/toy.py:arg` with smaller widths and fewer prototypes, steps and videos."""
    config = runpy.run_path(str(TOY))["get_config"](arg)
    model = config.model
    model.vision.update(
        {"image_size": SIZE, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "mlp_dim": 24}
    )
    model.text_encoder.update(
        {"vocab_size": VOCABULARY, "max_text": MAX_QUERY, "width": 16, "heads": 2, "mlp_dim": 24}
    )
    model.language.update(
        {
            "vocab_size": VOCABULARY,
            "width": 24,
            "depth": 1,
            "heads": 2,
            "kv_heads": 1,
            "head_dim": 8,
            "mlp_dim": 32,
        }
    )
    model.connector.dpe.update({"num_prototypes": K, "neighbors": 3, "samples": SAMPLES})
    model.connector.dpe.num_selected = min(model.connector.dpe.num_selected, J)
    config.data.max_query = MAX_QUERY
    config.data.workers = 1
    config.data.needles.update(
        {"num_train": 6, "num_validation": 2, "num_heldout": 3, "num_images": 12, "num_sequences": 8}
    )
    for stage in config.stages:
        stage.update({"steps": 4, "batch_size": 4, "random_steps": min(stage.random_steps, 2)})
    config.evaluation.batch_size = 8
    config.log_every = 2
    return config


def change(config, **fields):
    """Set fields of `config.model` (`language__depth=3`) or of its connector (`dpe__ratio=0.5`)."""
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        in_connector = (section or field) in config.model.connector
        model = config.model.connector if in_connector else config.model
        (model[section] if section else model)[field] = value
    return config


def with_kind(config, kind):
    """Return the section of another kind of connector; fields that both kinds have keep their values."""
    return change_kind(config.model.connector, kind, "connector")


def make_sample(
    rng,
    frames: int | np.ndarray,
    text: int,
    query: int,
    *,
    at_end: bool = False,
    oracle: tuple[int, ...] = (),
    subtitle_frames: tuple[int, ...] = (),
) -> Batch:
    """Return a sample without padding. The second half of its text is in the loss mask.

    Args:
      rng: random generator of frames and words.
      frames: number of random frames, or the frames themselves.
      text: text tokens.
      query: tokens of the query.
      at_end: put the visual tokens in the middle of the text instead of after its first token.
      oracle: indices of the frames that the question needs.
      subtitle_frames: the frame of each token of the subtitles.
    """
    if isinstance(frames, int):
        frames = rng.integers(0, 256, (frames, SIZE, SIZE, 3), dtype=np.uint8)
    return Batch(
        frames=frames,
        frame_mask=np.ones(len(frames), bool),
        query_tokens=rng.integers(4, VOCABULARY, query, dtype=np.int32),
        query_length=np.int32(query),
        tokens=rng.integers(4, VOCABULARY, text, dtype=np.int32),
        length=np.int32(text),
        visual_position=np.int32(text // 2 if at_end else 1),
        loss_mask=np.arange(text) >= text // 2,
        oracle_frames=np.isin(np.arange(len(frames)), oracle),
        index=np.int32(0),
        subtitles=rng.integers(4, VOCABULARY, len(subtitle_frames), dtype=np.int32),
        subtitle_frames=np.array(subtitle_frames, np.int32),
    )


def pad(sample: Batch, frames: int, text: int, query: int = MAX_QUERY, subtitle: int = 0) -> Batch:
    """Pad a sample to `frames` frames and to `text`, `query` and `subtitle` tokens."""
    out = padding_sample(frames, SIZE, text, query, max_subtitle=subtitle)
    scalars = {}
    for name, value in sample._asdict().items():
        if np.ndim(value):
            getattr(out, name)[: len(value)] = value
        else:
            scalars[name] = value
    return out._replace(**scalars)


def stack(samples) -> Batch:
    """Stack padded samples into a batch."""
    return jax.tree.map(lambda *rows: np.stack(rows), *samples)


def perturb(params: dict, seed: int = 0) -> dict:
    """Add noise to all parameters, so that none has its initial value of zero or one."""
    rng = np.random.default_rng(seed)
    return trees.unflatten(
        {
            path: leaf + jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)
            for path, leaf in sorted(trees.flatten(params).items())
        }
    )


def random_params(model, batch: Batch, seed: int = 0) -> dict:
    """Return perturbed initial parameters of a whole model."""
    init = jax.jit(lambda key, batch: model.init(key, batch, train=False)["params"])
    return perturb(init(jax.random.key(seed), batch), seed)


def model_of(config):
    """Return the model of the last stage."""
    return build_model(config)


def mesh_of(**axes: int):
    """Return a mesh of the given axis sizes, on the first devices; other axes have size 1."""
    shape = mesh_shape({"data": 1} | axes, int(np.prod(list(axes.values()), dtype=int)))
    return make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])


def forward(model, train: bool):
    """Return the jitted function (params, batch, noise) -> (visual tokens, loss of each sample)."""

    @jax.jit
    def run(params, batch, noise=None):
        given = {} if noise is None else {"noise": noise}
        randomness = row_randomness(jax.random.key(7), len(batch.index), **given) if train else None
        output = model.apply({"params": params}, batch, train=train, randomness=randomness)
        return output.visual, answer_loss(output.logits, batch)[0]

    return run
