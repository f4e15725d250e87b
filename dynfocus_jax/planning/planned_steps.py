"""Programs to plan: the train step, prefill and decode step, with abstract arguments on the mesh.

They are the functions that training and evaluation run. Nothing is allocated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dynfocus_jax import trees
from dynfocus_jax.batch import Batch, padding_sample
from dynfocus_jax.features.store import blank_frame
from dynfocus_jax.parallel.sharding import batch_sharding, num_row_shards
from dynfocus_jax.serving.programs import make_programs, serving_layout
from dynfocus_jax.training.optimizer import make_optimizer, make_schedule
from dynfocus_jax.training.stage_data import stage_budget, with_steps
from dynfocus_jax.training.state import abstract_state, state_shardings
from dynfocus_jax.training.step import make_train_step
from dynfocus_jax.video_language_model import build_model, stage_connector


class PlannedStep(NamedTuple):
    """A program to plan.

    Attributes:
      name: "train", "prefill" or "decode".
      where: the config section that sets its sizes.
      function: the jitted function.
      arguments: abstract arrays with shardings.
      held: the arguments by what they hold: {"optimizer": tree, "batch": tree, ...}.
      rows: rows of the global batch.
      tokens: tokens of the global batch, including visual tokens and padding.
      without_recomputation: the function without remat and loss chunks, to count the model's own FLOPs.
    """

    name: str
    where: str
    function: Callable
    arguments: tuple
    held: dict[str, Any]
    rows: int
    tokens: int
    without_recomputation: Callable


def planned_train_step(config: ConfigDict, index: int, mesh: Mesh) -> PlannedStep:
    """Return the train step of stage `index`, for its largest bucket."""
    if config.stages[index].steps is None:
        # The number of steps of a pass depends on the data, which are not read; no size depends on it.
        config = with_steps(config, index, 1)
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
    return PlannedStep(
        name="train",
        where=f"config.stages[{index}]",
        function=build(config, stage),
        arguments=(state, batch),
        held=held,
        rows=stage.batch_size,
        tokens=stage.batch_size * length,
        without_recomputation=build(_without_remat(config), _without_chunks(stage)),
    )


def planned_serving_steps(config: ConfigDict, mesh: Mesh) -> tuple[PlannedStep, PlannedStep]:
    """Return the prefill of one batch of `config.evaluation`, and a decode step of its rows.

    The number of rows is `config.evaluation.batch_size`, rounded up to a multiple that the mesh can split.
    """
    evaluation, index = config.evaluation, len(config.stages) - 1
    shards = num_row_shards(mesh)
    rows = -(-evaluation.batch_size // shards) * shards
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
        PlannedStep("prefill", where, prefill, (params, batch), held, rows, rows * length, prefill),
        PlannedStep("decode", where, decode, (params, state), answers, rows, rows, decode),
    )


def _abstract_batch(
    mesh: Mesh, config: ConfigDict, rows: int, frames: int, text: int, subtitle: int
) -> Batch:
    """Return the shapes, dtypes and shardings of a global batch."""
    size, blank = config.model.vision.image_size, blank_frame(config)
    sample = padding_sample(*(frames, size, text, config.data.max_query), max_subtitle=subtitle, blank=blank)
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *np.shape(x)), np.asarray(x).dtype, sharding=sharding), sample
    )


def _visual_tokens(config: ConfigDict, index: int, frames: int) -> int:
    """Return the number of visual tokens of a sample with `frames` frames, padding included."""
    return stage_connector(config, index).length(frames)


def _without_remat(config: ConfigDict) -> ConfigDict:
    plain = config.copy_and_resolve_references()
    for section in ("vision", "text_encoder", "language"):
        plain.model[section].remat = "none"
    return plain


def _without_chunks(stage: ConfigDict) -> ConfigDict:
    """Return the stage without loss chunks, whose logits are recomputed in the backward pass."""
    whole = stage.copy_and_resolve_references()
    whole.loss_chunk = 0
    return whole
