"""Selection of important frames: the result of DPE, and pure functions that choose slots from scores."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32
from ml_collections import ConfigDict

from dynfocus_jax.ops.perturbed_topk import distinct_argmax, hard_topk, perturbed_topk


class Selection(NamedTuple):
    """The decisions of DPE. Slots j < J hold the important frames; unused slots have `valid` False."""

    events: Float[Array, "B J P C"]  # filtered event prototype of each slot
    frames: Int32[Array, "B J"]  # frame of each slot, distinct among valid slots
    valid: Bool[Array, "B J"]
    indicators: Float[Array, "B J K"]  # the (perturbed) top-J rows over prototypes
    scores: Float[Array, "B K"]  # in [0, 1]
    centers: Int32[Array, "B K"]  # frame of each prototype, in time order
    prototype_valid: Bool[Array, "B K"]
    frame_scores: Float[Array, "B T"]  # score of each frame's event, 0 on padding


class Slots(NamedTuple):
    """Chosen prototypes: `indicators [B, J, K]`, int32 `chosen [B, J]` and bool `valid [B, J]`."""

    indicators: jax.Array
    chosen: jax.Array
    valid: jax.Array


def kept_counts(settings: ConfigDict, frames: int) -> tuple[int, ...]:
    """Return J for every number of valid events (or frames) that a clip of at most `frames` frames may have.

    settings: the fields of DPE. J is `num_selected` at most, or ceil(ratio * count).
    """

    def kept(count: int) -> int:
        # 1e-9 keeps 0.28 * 25 = 7.000000000000001 from becoming 8.
        ratio, number = settings.ratio, settings.num_selected
        return min(count, math.ceil(ratio * count - 1e-9) if number is None else number)

    most = min(settings.num_prototypes, frames) if settings.selection == "learned" else frames
    return tuple(kept(count) for count in range(most + 1))


def min_max(scores: jax.Array, valid: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Scale scores `[B, K]` to [0, 1] over the valid ones; 0 elsewhere."""
    low = jnp.min(scores, axis=-1, keepdims=True, where=valid, initial=jnp.inf)
    high = jnp.max(scores, axis=-1, keepdims=True, where=valid, initial=-jnp.inf)
    some = valid.any(axis=-1, keepdims=True)
    low, high = jnp.where(some, low, 0), jnp.where(some, high, 0)
    return jnp.where(valid, (scores - low) / (high - low + eps), 0)


def hard_slots(scores: jax.Array, valid: jax.Array, count: jax.Array, slots: int) -> Slots:
    """Choose the top-J prototypes, without a gradient: evaluation.

    Args:
      scores: float32 `[B, K]`; valid: bool `[B, K]`; count: int32 `[B]` slots in use; slots: J.
    """
    chosen = hard_topk(scores, slots, mask=valid, count=count)
    indicators = jax.nn.one_hot(chosen, scores.shape[-1], dtype=jnp.float32)
    return Slots(indicators, jnp.minimum(chosen, scores.shape[-1] - 1), _in_use(slots, count))


def perturbed_indicators(
    scores: jax.Array,
    noise: jax.Array,
    uniform: jax.Array,
    select_at_random: jax.Array,
    valid: jax.Array,
    count: jax.Array,
    slots: int,
    sigma: float,
    jacobian: str,
) -> jax.Array:
    """Return differentiable top-J rows `[B, J, K]`, or one-hot rows drawn uniformly while warming up.

    Args:
      scores: `[B, K]`; noise: `[B, S, K]` standard normal; uniform: `[B, K]` uniform draws.
      select_at_random: bool scalar (traced).
      valid, count, slots: as in `hard_slots`; sigma, jacobian: as in `perturbed_topk`.
    """
    indicators = perturbed_topk(scores, noise, slots, sigma, jacobian, mask=valid, count=count)
    random = hard_topk(uniform, slots, mask=valid, count=count)
    rows = jax.nn.one_hot(random, scores.shape[-1], dtype=indicators.dtype)
    return jnp.where(select_at_random, rows, indicators)


def distinct_slots(indicators: jax.Array, valid: jax.Array, count: jax.Array) -> Slots:
    """Choose J distinct prototypes by the largest indicators: training as in the paper."""
    chosen = distinct_argmax(jax.lax.stop_gradient(indicators), mask=valid, count=count)
    chosen = jnp.minimum(chosen, indicators.shape[-1] - 1)
    return Slots(indicators, chosen, _in_use(indicators.shape[1], count))


def released_slots(indicators: jax.Array, count: jax.Array) -> Slots:
    """Choose each slot's largest indicator, as released: a slot that repeats an earlier one is unused."""
    chosen = jnp.argmax(indicators, axis=-1)
    in_use = _in_use(indicators.shape[1], count)
    repeated = (chosen[:, :, None] == chosen[:, None, :]) & in_use[:, None, :]
    return Slots(indicators, chosen, in_use & ~jnp.tril(repeated, -1).any(axis=-1))


def _in_use(slots: int, count: jax.Array) -> jax.Array:
    return jnp.arange(slots) < count[:, None]  # [B, J]


def uniform_frames(frame_mask: jax.Array, count: jax.Array, slots: int) -> jax.Array:
    """Mark `count [B]` evenly spread valid frames, bool `[B, T]`."""
    total = frame_mask.sum(axis=-1)
    slot = jnp.arange(slots)
    place = ((2 * slot + 1) * total[:, None]) // (2 * jnp.maximum(count, 1)[:, None])
    marked = jax.nn.one_hot(place, frame_mask.shape[1], dtype=bool) & (slot < count[:, None])[..., None]
    return marked.any(axis=1)


def select_marked(pooled: jax.Array, frame_mask: jax.Array, marked: jax.Array, count: jax.Array, slots: int):
    """Return the selection of marked frames (bool `[B, T]`), at most `count [B]` of them, in time order.

    pooled: `[B, T, P, C]`; every frame is its own event, and its score is 1 if it is marked.
    """
    batch, time = frame_mask.shape
    frames = jnp.argsort(~marked, axis=-1)[:, :slots].astype(jnp.int32)  # stable: marked frames first
    valid = jnp.arange(slots) < jnp.minimum(marked.sum(axis=-1), count)[:, None]
    return Selection(
        events=jnp.take_along_axis(pooled, frames[..., None, None], axis=1),
        frames=frames,
        valid=valid,
        indicators=jax.nn.one_hot(frames, time) * valid[..., None],
        scores=marked.astype(jnp.float32),
        centers=jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time)),
        prototype_valid=frame_mask,
        frame_scores=marked.astype(jnp.float32),
    )
