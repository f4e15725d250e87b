"""The compiled programs of the engine: encode a clip, prefill prompts, insert them into a batch, decode.

Each program is compiled once per shape. Prompts are prefilled a few at a time and then inserted into the
decode batch, which bounds the memory of a prefill and pads each prompt only to the longest of its group.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float32, Int32
from ml_collections import ConfigDict

from dynfocus_jax.batch import Array, Batch
from dynfocus_jax.connectors.interface import VisualTokens
from dynfocus_jax.models.llama import Cache
from dynfocus_jax.parallel.sharding import LOGICAL_AXES, batch_sharding, num_row_shards, on_mesh, replicated
from dynfocus_jax.parameters import sharded_shapes
from dynfocus_jax.serving.token_sampling import RowSampling, sample_tokens
from dynfocus_jax.video_language_model import Prompts, VideoLanguageModel

_CAST = r"language/.*(kernel|embedding|bias|lora_[ab])"  # parameters that the model casts to its dtype anyway


def serving_layout(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape, dtype and sharding of the parameters as the engine holds them, {path: shape}.

    They are those of training, except that the language model's matrices have the dtype of the computation.
    The model casts them to it in any case, so no value changes, and a decode step, whose time is that of
    reading the matrices, reads half as many bytes.
    """

    def as_served(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = config.model.dtype if re.fullmatch(_CAST, path) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    layout = sharded_shapes(config, len(config.stages) - 1, mesh)
    return {path: as_served(path, leaf) for path, leaf in layout.items()}


class FrameFocus(NamedTuple):
    """A connector's choice of frames, frame by frame, of one clip or of a batch of clips."""

    chosen: Bool[Array, "*B T"]  # frames that the connector chose ...
    candidates: Bool[Array, "*B T"]  # ... of these
    scores: Float32[Array, "*B T"]  # importance of each frame
    tokens: Int32[Array, "*B T"]  # visual tokens spent on each frame


class ClipSummary(NamedTuple):
    """Token and frame counts of a batch of encoded clips, and the connector's choice of frames."""

    count: Int32[Array, " B"]  # valid visual tokens
    frames: Int32[Array, " B"]  # valid frames
    focus: FrameFocus | None  # None for a connector that chooses no frames


class DecodeState(NamedTuple):
    """Answers that are decoded together, one per row."""

    cache: Cache
    last_tokens: Int32[Array, " B"]
    num_generated: Int32[Array, " B"]
    max_tokens: Int32[Array, " B"]  # at which an answer ends; 0 for rows without a request
    done: Bool[Array, " B"]  # True for answers that have ended
    sampling: RowSampling


class Programs(NamedTuple):
    """Jitted functions.

    encode_clips: (params, batch of clips, its text unused) -> visual tokens [B, Lv, D], ClipSummary
    prefill: (params, prompts [R], tuple of R visual tokens [1, Lv, D], counts [R]) -> logits [R, V], Cache
    encode_and_prefill: (params, batch of R prompts) -> ClipSummary, logits [R, V], Cache
    empty_state: (B, S) -> DecodeState in which every answer has ended
    insert: (state, slot, logits, cache, sampling, max_tokens) -> state, first tokens int32 [R]. Of the R rows
      of a prefill, the r rows of each block of devices (see `batch_layout`) go to its slots `slot` to
      `slot + r - 1`. Donates the state.
    decode: (params, state) -> state, tokens int32 [B], the pad token where an answer has ended. Donates the
      state.
    """

    encode_clips: Callable[..., tuple[jax.Array, ClipSummary]]
    prefill: Callable[..., tuple[jax.Array, Cache]]
    encode_and_prefill: Callable[..., tuple[ClipSummary, jax.Array, Cache]]
    empty_state: Callable[[int, int], DecodeState]
    insert: Callable[..., tuple[DecodeState, jax.Array]]
    decode: Callable[..., tuple[DecodeState, jax.Array]]


def make_programs(model: VideoLanguageModel, mesh: Mesh, end_ids: Iterable[int], pad_id: int) -> Programs:
    """Return the programs of a model on a mesh.

    end_ids: tokens that end an answer. pad_id: the token that stands in rows whose answer has ended.
    """
    rows: Any = batch_sharding(mesh)  # Any, because it stands for an array in the structures below
    copies = replicated(mesh)
    heads = "tensor" if model.config.language.kv_heads % mesh.shape["tensor"] == 0 else None
    keys: Any = NamedSharding(mesh, PartitionSpec(None, LOGICAL_AXES["batch"], heads, None, None))
    cache_layout = Cache(keys, keys, rows)
    layout = DecodeState(cache_layout, rows, rows, rows, rows, RowSampling(rows, rows, rows, rows))
    ends = np.asarray(sorted(end_ids), np.int32)

    def apply(method: Callable, params: dict, *inputs) -> Any:
        with on_mesh(mesh):
            return model.apply({"params": params}, *inputs, method=method)

    @partial(jax.jit, out_shardings=copies)
    def encode_clips(params: dict, batch: Batch):
        visual = apply(VideoLanguageModel.visual_tokens, params, batch)
        return visual.tokens, _summarize(visual, batch.frame_mask)

    @partial(jax.jit, out_shardings=(rows, cache_layout))
    def prefill(params: dict, prompts: Prompts, tokens: tuple[jax.Array, ...], count: jax.Array):
        stacked = jnp.concatenate(tokens)
        visual = VisualTokens(stacked, jnp.arange(stacked.shape[1]) < count[:, None], count)
        return apply(VideoLanguageModel.prefill, params, prompts, visual)

    @partial(jax.jit, out_shardings=(copies, rows, cache_layout))
    def encode_and_prefill(params: dict, batch: Batch):
        visual = apply(VideoLanguageModel.visual_tokens, params, batch)
        logits, cache = apply(VideoLanguageModel.prefill, params, batch, visual)
        return _summarize(visual, batch.frame_mask), logits, cache

    @partial(jax.jit, static_argnums=(0, 1), out_shardings=layout)
    def empty_state(batch: int, length: int) -> DecodeState:
        cache = apply(lambda module, *size: module.language.empty_cache(*size), {}, batch, length)
        zeros, reals = jnp.zeros(batch, jnp.int32), jnp.zeros(batch)
        sampling = RowSampling(reals, zeros, reals + 1, zeros.astype(jnp.uint32))
        return DecodeState(cache, zeros, zeros, zeros, zeros == 0, sampling)

    def has_ended(tokens, num_generated, max_tokens):
        return jnp.isin(tokens, ends) | (num_generated >= max_tokens)

    @partial(jax.jit, donate_argnums=0, out_shardings=(layout, copies))
    def insert(state: DecodeState, slot, logits, cache: Cache, sampling: RowSampling, max_tokens):
        first = sample_tokens(logits, sampling, jnp.zeros_like(max_tokens))
        num_generated = jnp.ones_like(max_tokens)
        done = has_ended(first, num_generated, max_tokens)
        tokens = jnp.where(max_tokens > 0, first, pad_id)
        new = DecodeState(cache, tokens, num_generated, max_tokens, done, sampling)

        def write(old, new):
            axis = int(old.ndim > 1)  # the axis of rows: 0, but 1 in keys and values

            def split_blocks(x):
                return x.reshape(*x.shape[:axis], num_row_shards(mesh), -1, *x.shape[axis + 1 :])

            blocks, new = split_blocks(old), split_blocks(new.astype(old.dtype))
            start = [0] * blocks.ndim
            start[axis + 1] = slot
            return jax.lax.dynamic_update_slice(blocks, new, start).reshape(old.shape)

        return jax.tree.map(write, state, new), tokens

    @partial(jax.jit, donate_argnums=1, out_shardings=(layout, copies))
    def decode(params: dict, state: DecodeState):
        logits, cache = apply(VideoLanguageModel.decode, params, state.last_tokens, state.cache)
        sampled = sample_tokens(logits, state.sampling, state.num_generated)
        tokens = jnp.where(state.done, pad_id, sampled)
        num_generated = state.num_generated + ~state.done
        done = state.done | has_ended(tokens, num_generated, state.max_tokens)
        state = DecodeState(cache, tokens, num_generated, state.max_tokens, done, state.sampling)
        return state, tokens

    return Programs(encode_clips, prefill, encode_and_prefill, empty_state, insert, decode)


def _summarize(visual: VisualTokens, frame_mask: Array) -> ClipSummary:
    frames, focus, total = frame_mask.sum(axis=1), visual.focus, frame_mask.shape[1]
    if focus is None:
        return ClipSummary(visual.count, frames, None)
    chosen = jax.nn.one_hot(jnp.where(focus.valid, focus.frames, total), total, dtype=bool).any(axis=1)
    frame_focus = FrameFocus(chosen, focus.candidates, focus.scores, focus.tokens)
    return ClipSummary(visual.count, frames, frame_focus)
