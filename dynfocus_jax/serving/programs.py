"""The compiled programs of the engine: look, read a prompt, give it a row of a batch, decode a token a row.

Each is compiled once for a shape. Prompts are read a few at a time and put into the batch that is decoded:
memory is bounded, and a prompt is padded little.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dynfocus_jax.batch import Batch
from dynfocus_jax.connectors.interface import VisualTokens
from dynfocus_jax.models.llama import Cache
from dynfocus_jax.parallel.sharding import LOGICAL, batch_sharding, on_mesh, replicated, row_shares
from dynfocus_jax.parameters import sharded_shapes
from dynfocus_jax.serving.token_sampling import Rows, choose
from dynfocus_jax.video_language_model import Prompts, VideoLanguageModel

_CAST = r"language/.*(kernel|embedding|bias|lora_[ab])"  # what the model casts to its dtype before using it


def serving_layout(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and layout of the parameters as the engine holds them, {path: shape}.

    As in training, but the language model's matrices are in the dtype of the computation: the values are the
    same, and decoding, which is bound by reading them, reads no more than it needs.
    """

    def held(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = config.model.dtype if re.fullmatch(_CAST, path) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    layout = sharded_shapes(config, len(config.stages) - 1, mesh)
    return {path: held(path, leaf) for path, leaf in layout.items()}


class Look(NamedTuple):
    """Encoded clips: `tokens [B, Lv, D]`, int32 `count [B]` of valid tokens and `frames [B]`.

    focus: bool `[B, T]`, frames that the connector chose, of the candidates (bool `[B, T]`).
    scores: float32 `[B, T]` importance of each frame; frame_tokens: int32 `[B, T]` visual tokens spent on it.
    All four are None for a connector that chooses no frames.
    """

    tokens: jax.Array | None
    count: jax.Array
    frames: jax.Array
    focus: jax.Array | None
    candidates: jax.Array | None
    scores: jax.Array | None
    frame_tokens: jax.Array | None


class State(NamedTuple):
    """Answers that are decoded together, `[B]` each: last token, numbers of tokens so far and at most.

    done: bool, whether an answer has ended; rows: how tokens are chosen.
    """

    cache: Cache
    tokens: jax.Array
    made: jax.Array
    limit: jax.Array
    done: jax.Array
    rows: Rows


class Programs(NamedTuple):
    """Jitted functions.

    look: (params, batch of clips, its text unused) -> Look
    read: (params, prompts [R], tuple of R visual tokens [1, Lv, D], counts [R]) -> logits [R, V], Cache
    prefill: (params, batch of R prompts) -> Look without its tokens, logits [R, V], Cache
    empty: (B, S) -> State without answers
    admit: (state, slot, logits, cache, rows, limit) -> state, first tokens int32 [R]; the state is donated.
      The r rows of each share go to its slots `slot` to `slot + r - 1`: a device keeps what it has read.
    decode: (params, state) -> state, tokens int32 [B], the pad token where an answer has ended; donated.
    """

    look: Callable[..., Look]
    read: Callable[..., tuple[jax.Array, Cache]]
    prefill: Callable[..., tuple[Look, jax.Array, Cache]]
    empty: Callable[[int, int], State]
    admit: Callable[..., tuple[State, jax.Array]]
    decode: Callable[..., tuple[State, jax.Array]]


def make_programs(model: VideoLanguageModel, mesh: Mesh, end_ids: Iterable[int], pad_id: int) -> Programs:
    """The programs of a model on a mesh.

    end_ids: tokens that end an answer, of which they are the last; pad_id: what follows.
    """
    rows, copies = batch_sharding(mesh), replicated(mesh)
    heads = "tensor" if model.config.language.kv_heads % mesh.shape["tensor"] == 0 else None
    keys = NamedSharding(mesh, PartitionSpec(None, LOGICAL["batch"], heads, None, None))
    cache_layout = Cache(keys, keys, rows)
    layout = State(cache_layout, rows, rows, rows, rows, Rows(rows, rows, rows, rows))
    ends = np.asarray(sorted(end_ids), np.int32)

    @partial(jax.jit, out_shardings=copies)
    def look(params: dict, batch: Batch) -> Look:
        with on_mesh(mesh):
            visual = model.apply({"params": params}, batch, method=VideoLanguageModel.visual_tokens)
        return _look(visual, batch.frame_mask)

    @partial(jax.jit, out_shardings=(rows, cache_layout))
    def read(params: dict, prompts: Prompts, tokens: tuple[jax.Array, ...], count: jax.Array):
        whole = jnp.concatenate(tokens)
        visual = VisualTokens(whole, jnp.arange(whole.shape[1]) < count[:, None], count)
        with on_mesh(mesh):
            return model.apply({"params": params}, prompts, visual, method=VideoLanguageModel.prefill)

    @partial(jax.jit, out_shardings=(copies, rows, cache_layout))
    def prefill(params: dict, batch: Batch):
        with on_mesh(mesh):
            visual = model.apply({"params": params}, batch, method=VideoLanguageModel.visual_tokens)
            logits, cache = model.apply({"params": params}, batch, visual, method=VideoLanguageModel.prefill)
        return _look(visual, batch.frame_mask)._replace(tokens=None), logits, cache

    @partial(jax.jit, static_argnums=(0, 1), out_shardings=layout)
    def empty(batch: int, length: int) -> State:
        cache = model.apply(
            {}, batch, length, method=lambda module, *size: module.language.empty_cache(*size)
        )
        zeros, reals = jnp.zeros(batch, jnp.int32), jnp.zeros(batch)
        settings = Rows(reals, zeros, reals + 1, zeros.astype(jnp.uint32))
        return State(cache, zeros, zeros, zeros, zeros == 0, settings)

    def ended(tokens, made, limit):
        return jnp.isin(tokens, ends) | (made >= limit)

    @partial(jax.jit, donate_argnums=0, out_shardings=(layout, copies))
    def admit(state: State, slot, logits, cache: Cache, settings: Rows, limit):
        first = choose(logits, settings, jnp.zeros_like(limit))
        made = jnp.ones_like(limit)
        done = ended(first, made, limit)
        tokens = jnp.where(limit > 0, first, pad_id)
        new = State(cache, tokens, made, limit, done, settings)

        def put(old, new):
            axis = int(old.ndim > 1)  # of the rows: the first, but of keys and values the second

            def by_share(x):
                return x.reshape(*x.shape[:axis], row_shares(mesh), -1, *x.shape[axis + 1 :])

            view, new = by_share(old), by_share(new.astype(old.dtype))
            start = [0] * view.ndim
            start[axis + 1] = slot
            return jax.lax.dynamic_update_slice(view, new, start).reshape(old.shape)

        return jax.tree.map(put, state, new), tokens

    @partial(jax.jit, donate_argnums=1, out_shardings=(layout, copies))
    def decode(params: dict, state: State):
        with on_mesh(mesh):
            logits, cache = model.apply(
                {"params": params}, state.tokens, state.cache, method=VideoLanguageModel.decode
            )
        tokens = jnp.where(state.done, pad_id, choose(logits, state.rows, state.made))
        made = state.made + ~state.done
        done = state.done | ended(tokens, made, state.limit)
        return State(cache, tokens, made, state.limit, done, state.rows), tokens

    return Programs(look, read, prefill, empty, admit, decode)


def _look(visual: VisualTokens, frame_mask: jax.Array) -> Look:
    frames, focus, total = frame_mask.sum(axis=1), visual.focus, frame_mask.shape[1]
    if focus is None:
        return Look(visual.tokens, visual.count, frames, None, None, None, None)
    chosen = jax.nn.one_hot(jnp.where(focus.valid, focus.frames, total), total, dtype=bool).any(axis=1)
    return Look(visual.tokens, visual.count, frames, chosen, focus.candidates, focus.scores, focus.tokens)
