"""Dynamic event prototype estimation (DPE): the events of a video, and which of them matter (section 3.2)."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynfocus_jax.models.layers import layer_norm
from dynfocus_jax.ops.clustering import cluster, spread
from dynfocus_jax.ops.dpc_knn import first_twin
from dynfocus_jax.ops.perturbed_topk import distinct_argmax, hard_topk, perturbed_topk
from dynfocus_jax.ops.pooling import pool_grid

SELECTIONS = ("learned", "uniform", "oracle")


class Selection(NamedTuple):
    """What DPE decided. Slots `j < J` hold the important frames; unused slots have `valid` False.

    events: `[B, J, P, C]` filtered event prototypes, one a slot.
    frames: int32 `[B, J]` frame of each slot, distinct among valid slots.
    valid: bool `[B, J]`.
    indicators: float32 `[B, J, K]`, the (perturbed) top-J rows over prototypes.
    scores: float32 `[B, K]` in [0, 1]; centers: int32 `[B, K]` frame of each prototype, in time order.
    prototype_valid: bool `[B, K]`.
    frame_scores: float32 `[B, T]`, the score of each frame's event (0 on padding).
    """

    events: jax.Array
    frames: jax.Array
    valid: jax.Array
    indicators: jax.Array
    scores: jax.Array
    centers: jax.Array
    prototype_valid: jax.Array
    frame_scores: jax.Array


def kept_counts(num_prototypes: int, ratio: float, num_selected: int | None) -> tuple[int, ...]:
    """J for 0..K valid prototypes: `num_selected` at most, or ceil(ratio * count)."""

    def kept(count: int) -> int:
        # 1e-9 keeps 0.28 * 25 = 7.000000000000001 from becoming 8.
        wanted = math.ceil(ratio * count - 1e-9) if num_selected is None else num_selected
        return min(count, wanted)

    return tuple(kept(count) for count in range(num_prototypes + 1))


def min_max(scores: jax.Array, valid: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Scores `[B, K]` scaled to [0, 1] over the valid ones; 0 elsewhere."""
    low = jnp.min(scores, axis=-1, keepdims=True, where=valid, initial=jnp.inf)
    high = jnp.max(scores, axis=-1, keepdims=True, where=valid, initial=-jnp.inf)
    some = valid.any(axis=-1, keepdims=True)
    low, high = jnp.where(some, low, 0), jnp.where(some, high, 0)
    return jnp.where(valid, (scores - low) / (high - low + eps), 0)


class ScoreNet(nn.Module):
    """Three-layer MLP with a global half: `[B, K, 2C]` -> unnormalised scores `[B, K]` (Eq. 6)."""

    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        def dense(width, name):
            return nn.Dense(width, name=name, dtype=self.dtype, param_dtype=self.param_dtype)

        width = x.shape[-1] // 2
        x = layer_norm("in_norm", 1e-5, self.dtype, self.param_dtype)(x)
        x = jax.nn.gelu(dense(2 * width, "in_dense")(x), approximate=False)
        own, shared = jnp.split(x, 2, axis=-1)
        weights = valid / jnp.maximum(valid.sum(axis=-1, keepdims=True), 1)  # mean over valid prototypes
        shared = jnp.einsum("bk,bkc->bc", weights.astype(x.dtype), shared)
        x = jnp.concatenate([own, jnp.broadcast_to(shared[:, None], own.shape)], axis=-1)
        x = jax.nn.gelu(dense(width, "out_dense_0")(x), approximate=False)
        x = jax.nn.gelu(dense(width // 2, "out_dense_1")(x), approximate=False)
        return dense(1, "out_dense_2")(x)[..., 0].astype(jnp.float32)


class QuestionScore(nn.Module):
    """Extension (ours): bilinear match of the question's words with a prototype, zero at the start.

    `sum over question tokens of max over P of emb(token)^T W LN(E)`: words `[B, Lq, E]` with their
    `lengths [B]`, events `[B, K, P, C]` -> `[B, K]` float32.
    """

    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, words: jax.Array, lengths: jax.Array, events: jax.Array) -> jax.Array:
        events = layer_norm("event_norm", 1e-5, self.dtype, self.param_dtype)(events)
        words = nn.Dense(
            events.shape[-1],
            use_bias=False,
            kernel_init=nn.initializers.zeros,
            name="bilinear",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )(words)
        match = jnp.einsum("bqc,bkpc->bkqp", words, events).max(axis=-1).astype(jnp.float32)
        mask = jnp.arange(words.shape[1]) < lengths[:, None]
        return jnp.einsum("bkq,bq->bk", match, mask.astype(jnp.float32))


class EventPrototypes(nn.Module):
    """DPE: pool, cluster frames into K events, score them, keep J (spec of the paper, section 3.2).

    `mode="paper"`: prototypes weighted by importance, the key frame of an event is its centre, training
    picks J distinct frames. `mode="released"`: the authors' code: k-means centroids, key frames are the
    initial frames, and in training two slots may name one frame (the later slot is then unused).
    Prototypes are kept in time order of their key frames, so that T <= K is no special case.
    """

    mode: str
    grid: tuple[int, int]
    pool: tuple[int, int]
    num_prototypes: int
    neighbors: int
    ratio: float
    num_selected: int | None
    clustering: str
    kmeans_init: str
    selection: str
    samples: int
    sigma: float
    jacobian: str
    question_conditioned: bool
    dtype: str = "float32"
    param_dtype: str = "float32"

    def num_slots(self, frames: int) -> int:
        """J: slots for a bucket of `frames` frames."""
        return max(self.kept(frames))

    def kept(self, frames: int) -> tuple[int, ...]:
        """J for every number of valid events that a bucket of `frames` frames may hold."""
        count = frames if self.selection != "learned" else min(self.num_prototypes, frames)
        return kept_counts(count, self.ratio, self.num_selected)

    @nn.compact
    def __call__(
        self,
        features: jax.Array,
        frame_mask: jax.Array,
        *,
        train: bool,
        random_selection: jax.Array | None = None,
        question: tuple[jax.Array, jax.Array] | None = None,
        oracle: jax.Array | None = None,
        initial: jax.Array | None = None,
        noise: jax.Array | None = None,
        share: tuple[jax.Array, int] | None = None,
    ) -> Selection:
        """Select the important frames.

        Args:
          features: `[B, T, N, C]` patch features; frame_mask: bool `[B, T]`.
          train: perturbed (differentiable) top-J instead of hard top-J; needs the rng "selection".
          random_selection: bool scalar (traced); True selects J events uniformly at random (training only).
          question: word embeddings `[B, Lq, E]` and lengths `[B]`, for `question_conditioned`.
          oracle: bool `[B, T]`, frames known to matter, for `selection="oracle"`.
          initial: int32 `[B, K]` initial frames for k-means instead of the configured choice.
          noise: float32 `[B, samples, K]` instead of drawn perturbations.
          share: (i, n) for rows i, i + n, i + 2n, ... of a batch of n * B rows, which draw what they would
            draw there; i may be traced.
        """
        pooled = pool_grid(features, self.grid, self.pool)  # [B, T, P, C]
        if self.selection != "learned":
            return self._given(pooled, frame_mask, oracle)
        batch, time = frame_mask.shape
        events, centers, valid, assignment = self.prototypes(pooled, frame_mask, train, initial)
        kept = self.kept(time)
        count = jnp.asarray(kept, jnp.int32)[valid.sum(axis=-1)]
        slots = max(kept)

        summary = jnp.concatenate([events.mean(axis=2), events.max(axis=2)], axis=-1)
        raw = ScoreNet(self.dtype, self.param_dtype, name="score_net")(summary, valid)
        if self.question_conditioned:
            raw += QuestionScore(self.dtype, self.param_dtype, name="question_score")(*question, events)
        # Equal events have one score, however a matrix product rounds its rows: min-max would magnify it.
        raw = jnp.take_along_axis(raw, first_twin(summary, valid), axis=-1)
        scores = min_max(raw, valid)

        def draw(sample, shape):
            if share is None:
                return sample(self.make_rng("selection"), shape)
            index, count = share
            whole = sample(self.make_rng("selection"), (batch * count, *shape[1:]))
            return whole.reshape(batch, count, *shape[1:])[:, index]

        if train:
            # Noise for all K prototypes, so that a shorter bucket sees the same perturbations.
            if noise is None:
                noise = draw(jax.random.normal, (batch, self.samples, self.num_prototypes))
            noise = noise[..., : scores.shape[-1]]
            indicators = perturbed_topk(
                scores, noise, slots, self.sigma, self.jacobian, mask=valid, count=count
            )
            if random_selection is not None:
                chance = draw(jax.random.uniform, scores.shape)
                chosen = hard_topk(chance, slots, mask=valid, count=count)
                uniform = jax.nn.one_hot(chosen, scores.shape[-1], dtype=indicators.dtype)
                indicators = jnp.where(random_selection, uniform, indicators)
        else:
            chosen = hard_topk(scores, slots, mask=valid, count=count)
            indicators = jax.nn.one_hot(chosen, scores.shape[-1], dtype=jnp.float32)

        in_use = jnp.arange(slots) < count[:, None]  # [B, J]
        if train and self.mode == "paper":
            chosen = distinct_argmax(jax.lax.stop_gradient(indicators), mask=valid, count=count)
        elif train:
            chosen = jnp.argmax(indicators, axis=-1)
            repeated = (chosen[:, :, None] == chosen[:, None, :]) & in_use[:, None, :]
            in_use &= ~jnp.tril(repeated, -1).any(axis=-1)
        chosen = jnp.minimum(chosen, scores.shape[-1] - 1)

        return Selection(
            events=jnp.einsum("bjk,bkpc->bjpc", indicators.astype(events.dtype), events),
            frames=jnp.take_along_axis(centers, chosen, axis=1),
            valid=in_use,
            indicators=indicators,
            scores=scores,
            centers=centers,
            prototype_valid=valid,
            frame_scores=jnp.where(
                frame_mask, jnp.take_along_axis(scores, jnp.maximum(assignment, 0), axis=1), 0
            ),
        )

    def prototypes(self, pooled, frame_mask, train, initial):
        """Events `[B, K, P, C]`, key frames `[B, K]`, validity `[B, K]`, frame assignment `[B, T]`."""
        batch, time, tokens, width = pooled.shape
        if time <= self.num_prototypes:  # every frame is its own prototype
            frames = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
            return pooled, frames, frame_mask, frames

        if initial is None and self.clustering != "dpc_knn":
            random = self.kmeans_init == "random"
            initial = (
                self._random_frames(frame_mask, train) if random else spread(frame_mask, self.num_prototypes)
            )
        clusters = cluster(
            pooled.reshape(batch, time, tokens * width),
            self.num_prototypes,
            self.neighbors,
            method=self.clustering,
            weighting="importance" if self.mode == "paper" else "mean",
            mask=frame_mask,
            initial=initial,
        )
        centers = clusters.centers
        if self.mode == "released" and initial is not None:
            centers = initial.astype(jnp.int32)
        order = jnp.argsort(jnp.where(clusters.valid, centers, time), axis=-1)  # time order, stable
        rank = jnp.argsort(order, axis=-1)
        events = clusters.prototypes.reshape(batch, self.num_prototypes, tokens, width)
        clustered = (
            jnp.take_along_axis(events, order[..., None, None], axis=1),
            jnp.take_along_axis(centers, order, axis=1),
            jnp.take_along_axis(clusters.valid, order, axis=1),
            jnp.take_along_axis(rank, jnp.maximum(clusters.assignment, 0), axis=1),
        )
        # A video of K frames at most is not clustered, in whatever bucket it comes.
        frames = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
        first = slice(self.num_prototypes)
        own = (
            pooled[:, first],
            frames[:, first],
            frame_mask[:, first],
            jnp.minimum(frames, self.num_prototypes - 1),
        )
        few = frame_mask.sum(axis=-1) <= self.num_prototypes
        return jax.tree.map(
            lambda a, b: jnp.where(few.reshape(batch, *(1,) * (a.ndim - 1)), a, b), own, clustered
        )

    def _random_frames(self, frame_mask, train):
        """K distinct random valid frames `[B, K]`; evaluation draws the same ones every time."""
        key = self.make_rng("selection") if train else jax.random.key(0)
        # One draw a frame index: padding does not change what the valid frames get.
        time = frame_mask.shape[1]
        draw = jax.vmap(lambda t: jax.random.uniform(jax.random.fold_in(key, t)))(jnp.arange(time))
        draw = jnp.where(frame_mask, draw, jnp.inf)
        return jnp.argsort(draw, axis=-1)[:, : self.num_prototypes].astype(jnp.int32)

    def _given(self, pooled, frame_mask, oracle):
        """Selection without scores: evenly spread frames, or the frames that an oracle names."""
        batch, time = frame_mask.shape
        kept = self.kept(time)
        slots = max(kept)
        total = frame_mask.sum(axis=-1)
        count = jnp.asarray(kept, jnp.int32)[total]
        if self.selection == "uniform":
            slot = jnp.arange(slots)
            place = ((2 * slot + 1) * total[:, None]) // (2 * jnp.maximum(count, 1)[:, None])
            wanted = jax.nn.one_hot(place, time, dtype=bool) & (slot < count[:, None])[..., None]
            wanted = wanted.any(axis=1)
        else:
            wanted = oracle & frame_mask
        # The first J wanted frames, in time order; a stable sort brings them to the front.
        frames = jnp.argsort(~wanted, axis=-1)[:, :slots].astype(jnp.int32)
        valid = jnp.arange(slots) < jnp.minimum(wanted.sum(axis=-1), count)[:, None]
        return Selection(
            events=jnp.take_along_axis(pooled, frames[..., None, None], axis=1),
            frames=frames,
            valid=valid,
            indicators=jax.nn.one_hot(frames, time) * valid[..., None],
            scores=wanted.astype(jnp.float32),
            centers=jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time)),
            prototype_valid=frame_mask,
            frame_scores=wanted.astype(jnp.float32),
        )
