"""The programs that are planned: the train step, prefill and decode, with abstract arguments on the mesh.

They are the functions that training and evaluation run; nothing is allocated.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.batch import Batch, padding_sample
from dynfocus_jax.features.store import blank_frame
from dynfocus_jax.parallel.sharding import batch_sharding, row_shares
from dynfocus_jax.serving.programs import make_programs, serving_layout
from dynfocus_jax.training.optimizer import make_optimizer, make_schedule
from dynfocus_jax.training.stage_data import stage_budget, with_steps
from dynfocus_jax.training.state import abstract_state, state_shardings
from dynfocus_jax.training.step import make_train_step
from dynfocus_jax.video_language_model import build_model, stage_connector


class Step(NamedTuple):
    """A program to be planned.

    Attributes:
      name: "train", "prefill" or "decode"; where: the config section that its size comes from.
      function: jitted; arguments: abstract, with shardings.
      held: what the arguments are, {"optimizer": tree, ...}.
      rows, tokens: of the global batch; tokens count visual ones and padding.
      plain: the same function without remat and chunks, whose arithmetic is the model's own.
    """

    name: str
    where: str
    function: Callable
    arguments: tuple
    held: dict[str, object]
    rows: int
    tokens: int
    plain: Callable


def train_step(config: ConfigDict, index: int, mesh: Mesh) -> Step:
    """The train step of stage `index`, of its largest bucket."""
    if config.stages[index].steps is None:
        config = with_steps(config, index, 1)  # how many is not known before the data; no size depends on it
    stage = config.stages[index]
    state = abstract_state(config, index, mesh)
    budget = stage_budget(config, index)
    num_frames, max_text = budget.buckets[-1]
    batch = _abstract_batch(mesh, config, stage.batch_size, num_frames, max_text, stage.max_subtitle)

    def build(config, stage):
        return make_train_step(
            build_model(config, index),
            make_optimizer(stage, state.trained),
            make_schedule(stage),
            stage,
            jax.random.key(config.seed),
            state_shardings(state),
        )

    held = {
        "trained parameters": state.trained,
        "frozen parameters": state.frozen,
        "optimizer": (state.opt_state, state.step),
        "batch": batch,
    }
    length = max_text + budget.visual_tokens[num_frames]
    return Step(
        "train",
        f"config.stages[{index}]",
        build(config, stage),
        (state, batch),
        held,
        stage.batch_size,
        stage.batch_size * length,
        build(_without_remat(config), _without_chunks(stage)),
    )


def serving_steps(config: ConfigDict, mesh: Mesh) -> tuple[Step, Step]:
    """Prefill of one batch of `config.evaluation`, and the decoding of one token for each of its rows.

    Rows are as many as the mesh can share: `config.evaluation.batch_size`, rounded up.
    """
    evaluation, index = config.evaluation, len(config.stages) - 1
    shares = row_shares(mesh)
    rows = -(-evaluation.batch_size // shares) * shares
    programs = make_programs(build_model(config, index), mesh, (0,), 0)
    params = trees.unflatten(serving_layout(config, mesh))
    frames, text = evaluation.media_frames, evaluation.max_text
    batch = _abstract_batch(mesh, config, rows, frames, text, evaluation.max_subtitle)
    length = text + _visual_tokens(config, index, frames) + evaluation.max_subtitle
    held = {"parameters": params, "batch": batch}

    state = programs.empty_state.eval_shape(rows, length + evaluation.max_new_tokens)
    answers = {"parameters": params, "batch": state._replace(cache=None), "key-value cache": state.cache}
    where, prefill, decode = "config.evaluation", programs.encode_and_prefill, programs.decode
    return (
        Step("prefill", where, prefill, (params, batch), held, rows, rows * length, prefill),
        Step("decode", where, decode, (params, state), answers, rows, rows, decode),
    )


def _abstract_batch(
    mesh: Mesh, config: ConfigDict, rows: int, frames: int, text: int, subtitle: int
) -> Batch:
    size, blank = config.model.vision.image_size, blank_frame(config)
    sample = padding_sample(*(frames, size, text, config.data.max_query), max_subtitle=subtitle, blank=blank)
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *np.shape(x)), np.asarray(x).dtype, sharding=sharding), sample
    )


def _visual_tokens(config: ConfigDict, index: int, frames: int) -> int:
    """Visual tokens of a sample of a bucket of so many frames, padding included."""
    return stage_connector(config, index).length(frames)


def _without_remat(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    for section in ("vision", "text_encoder", "language"):
        config.model[section].remat = "none"
    return config


def _without_chunks(stage: ConfigDict) -> ConfigDict:
    """The stage with its loss in one piece: chunks of the logits are computed again for the backward pass."""
    stage = stage.copy_and_resolve_references()
    stage.loss_chunk = 0
    return stage
