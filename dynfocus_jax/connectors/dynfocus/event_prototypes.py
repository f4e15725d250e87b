"""Dynamic event prototype estimation (DPE): the events of a video, and which of them matter (section 3.2)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from dynfocus_jax.connectors.dynfocus import selection as selecting
from dynfocus_jax.connectors.dynfocus.scores import QuestionScore, ScoreNet
from dynfocus_jax.connectors.dynfocus.selection import Selection, Slots
from dynfocus_jax.connectors.interface import ConnectorInputs, Randomness
from dynfocus_jax.models.layers import Dtype
from dynfocus_jax.ops.clustering import CLUSTERING_METHODS, cluster, evenly_spaced
from dynfocus_jax.ops.dpc_knn import first_duplicate
from dynfocus_jax.ops.pooling import pool_grid
from dynfocus_jax.sections import Field, require

DPE_FIELDS = {
    "num_prototypes": Field(25, "number of event prototypes per video, K", at_least=1),
    "neighbors": Field(5, "number of nearest neighbours that define a density, k", at_least=1),
    "ratio": Field(
        0.8,
        "retention ratio: fraction of the prototypes that are kept, J = ceil(ratio * K)",
        above=0,
        at_most=1,
    ),
    "num_selected": Field(int, "number of prototypes that are kept, J, instead of the ratio", at_least=1),
    "clustering": Field("dpc_knn", "how frames are clustered (Table 11)", choices=CLUSTERING_METHODS),
    "kmeans_init": Field(
        "spread", 'initial frames of k-means: "spread" evenly, or "random"', choices=("spread", "random")
    ),
    "selection": Field(
        "learned",
        'how important frames are selected: "learned" (by their scores), "uniform" (evenly spaced), or '
        '"oracle" (given by the data)',
        choices=("learned", "uniform", "oracle"),
    ),
    "samples": Field(500, "number of perturbations of the scores, S", at_least=1),
    "sigma": Field(0.1, "standard deviation of the perturbations", at_least=0),
    "jacobian": Field(
        "full",
        'Jacobian of the perturbed top-k: "full", or "diagonal" as in the released code',
        choices=("full", "diagonal"),
    ),
    "question_conditioned": Field(False, "extension: the score net also reads the question"),
}
DPE_SHARDING = (
    (r"dpe/score_net/(in_dense|out_dense_[01])/kernel", ("fsdp", None)),
    (r"dpe/question_score/bilinear/kernel", ("fsdp", None)),
)

# Independent streams of a row's key
_NOISE, _UNIFORM, _INITIAL = range(3)


def check_dpe(settings: ConfigDict, where: str) -> None:
    """Check the fields of DPE against each other; raise UserError if they do not fit."""
    count = settings.num_selected
    require(
        count is None or settings.selection != "learned" or count <= settings.num_prototypes,
        f"{where}.num_selected (J) is {count}, expected 1 to num_prototypes (K) = {settings.num_prototypes}; "
        "lower J or raise K.",
    )


class Events(NamedTuple):
    """Event prototypes in the time order of their key frames.

    prototypes: `[B, K, P, C]`; centers: int32 `[B, K]` key frames; valid: bool `[B, K]`; assignment: int32
    `[B, T]`, the event of each frame.
    """

    prototypes: jax.Array
    centers: jax.Array
    valid: jax.Array
    assignment: jax.Array


class EventPrototypes(nn.Module):
    """DPE: pool, cluster frames into K events, score the events, keep J of them (section 3.2).

    mode "paper": prototypes are weighted by importance, the key frame of an event is its centre, and training
    chooses J distinct frames. mode "released": the authors' code, where prototypes are k-means centroids, key
    frames are the initial frames, and two slots may name one frame in training (the later one is unused).
    Events are kept in time order of their key frames, so that T <= K is no special case.
    """

    settings: FrozenConfigDict
    mode: str
    grid: tuple[int, int]
    pool: tuple[int, int]
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, inputs: ConnectorInputs, *, train: bool) -> Selection:
        """Select the important frames; `train` perturbs the scores and needs `inputs.randomness`."""
        settings, frame_mask = self.settings, inputs.frame_mask
        pooled = pool_grid(inputs.features, self.grid, self.pool)  # [B, T, P, C]
        kept = selecting.kept_counts(settings, frame_mask.shape[1])
        slots = max(kept)
        if settings.selection != "learned":
            count = jnp.asarray(kept, jnp.int32)[frame_mask.sum(axis=-1)]
            if settings.selection == "oracle":
                assert inputs.oracle_frames is not None
                marked = inputs.oracle_frames & frame_mask
            else:
                marked = selecting.uniform_frames(frame_mask, count, slots)
            return selecting.select_marked(pooled, frame_mask, marked, count, slots)

        events = self.cluster_frames(pooled, frame_mask, inputs.randomness)
        count = jnp.asarray(kept, jnp.int32)[events.valid.sum(axis=-1)]
        scores = self._scores(events, inputs)
        chosen = self._choose(scores, events.valid, count, slots, train, inputs.randomness)
        frame_scores = jnp.take_along_axis(scores, jnp.maximum(events.assignment, 0), axis=1)
        indicators = chosen.indicators.astype(events.prototypes.dtype)
        return Selection(
            events=jnp.einsum("bjk,bkpc->bjpc", indicators, events.prototypes),
            frames=jnp.take_along_axis(events.centers, chosen.chosen, axis=1),
            valid=chosen.valid,
            indicators=chosen.indicators,
            scores=scores,
            centers=events.centers,
            prototype_valid=events.valid,
            frame_scores=jnp.where(frame_mask, frame_scores, 0),
        )

    def _scores(self, events: Events, inputs: ConnectorInputs) -> jax.Array:
        """Return the events' scores in [0, 1], `[B, K]` (Eq. 6)."""
        prototypes = events.prototypes
        summary = jnp.concatenate([prototypes.mean(axis=2), prototypes.max(axis=2)], axis=-1)
        raw = ScoreNet(self.dtype, self.param_dtype, name="score_net")(summary, events.valid)
        if self.settings.question_conditioned:
            assert inputs.question is not None, "needs_question"
            question_score = QuestionScore(self.dtype, self.param_dtype, name="question_score")
            raw += question_score(inputs.question.words, inputs.question.length, prototypes)
        # Equal events get equal scores, however a matrix product rounds its rows: min-max would magnify that.
        raw = jnp.take_along_axis(raw, first_duplicate(summary, events.valid), axis=-1)
        return selecting.min_max(raw, events.valid)

    def _choose(self, scores, valid, count, slots: int, train: bool, randomness: Randomness | None) -> Slots:
        """Choose J prototypes: by score, in training by perturbed scores (Eqs. 7-9)."""
        if not train:
            return selecting.hard_slots(scores, valid, count, slots)
        assert randomness is not None, "training needs randomness"
        settings, events = self.settings, scores.shape[-1]
        # Draws are for all K prototypes, so that a shorter bucket sees the same perturbations.
        shape = (settings.samples, settings.num_prototypes)
        noise = _draw(randomness, "noise", _NOISE, jax.random.normal, shape)
        uniform = _draw(randomness, "uniform", _UNIFORM, jax.random.uniform, shape[1:])
        indicators = selecting.perturbed_indicators(
            scores,
            noise[..., :events],
            uniform[..., :events],
            randomness.select_at_random,
            valid,
            count,
            slots,
            settings.sigma,
            settings.jacobian,
        )
        if self.mode == "paper":
            return selecting.distinct_slots(indicators, valid, count)
        return selecting.released_slots(indicators, count)

    def cluster_frames(
        self, pooled: jax.Array, frame_mask: jax.Array, randomness: Randomness | None
    ) -> Events:
        """Cluster pooled frames `[B, T, P, C]` into events (Eqs. 1-5)."""
        batch, time, tokens, width = pooled.shape
        num = self.settings.num_prototypes
        frames = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
        if time <= num:  # every frame is its own event
            return Events(pooled, frames, frame_mask, frames)

        initial = self._initial_frames(frame_mask, randomness)
        clusters = cluster(
            pooled.reshape(batch, time, tokens * width),
            num,
            self.settings.neighbors,
            method=self.settings.clustering,
            weighting="importance" if self.mode == "paper" else "mean",
            mask=frame_mask,
            initial=initial,
        )
        # Released: the key frame is the initial frame of a cluster, not its centre.
        centers = clusters.centers if self.mode == "paper" or initial is None else initial.astype(jnp.int32)
        order = jnp.argsort(jnp.where(clusters.valid, centers, time), axis=-1)  # time order, stable
        rank = jnp.argsort(order, axis=-1)
        prototypes = clusters.prototypes.reshape(batch, num, tokens, width)
        clustered = Events(
            jnp.take_along_axis(prototypes, order[..., None, None], axis=1),
            jnp.take_along_axis(centers, order, axis=1),
            jnp.take_along_axis(clusters.valid, order, axis=1),
            jnp.take_along_axis(rank, jnp.maximum(clusters.assignment, 0), axis=1),
        )
        # A video of at most K frames is not clustered, whatever bucket it is in.
        first = slice(num)
        own = Events(pooled[:, first], frames[:, first], frame_mask[:, first], jnp.minimum(frames, num - 1))
        few = frame_mask.sum(axis=-1) <= num
        return jax.tree.map(
            lambda a, b: jnp.where(few.reshape(batch, *(1,) * (a.ndim - 1)), a, b), own, clustered
        )

    def _initial_frames(self, frame_mask: jax.Array, randomness: Randomness | None) -> jax.Array | None:
        """Return the initial frames of k-means, int32 `[B, K]`; None for DPC-KNN, which needs none."""
        if randomness is not None and "initial_frames" in randomness.given:
            return randomness.given["initial_frames"]
        num = self.settings.num_prototypes
        if self.settings.clustering == "dpc_knn":
            return None
        if self.settings.kmeans_init == "spread":
            return evenly_spaced(frame_mask, num)
        return _random_frames(frame_mask, num, randomness)


def _draw(randomness: Randomness, name: str, stream: int, draw, shape: tuple[int, ...]) -> jax.Array:
    """Return `[B, *shape]` draws, each row from its own key, or the given values of that name."""
    if name in randomness.given:
        return randomness.given[name]
    return jax.vmap(lambda key: draw(jax.random.fold_in(key, stream), shape))(randomness.keys)


def _random_frames(frame_mask: jax.Array, count: int, randomness: Randomness | None) -> jax.Array:
    """Return distinct random valid frames, int32 `[B, count]`; evaluation draws the same ones every time."""
    batch, time = frame_mask.shape

    # One draw per frame index: padding does not change what the valid frames get.
    def of_row(key):
        return jax.vmap(lambda frame: jax.random.uniform(jax.random.fold_in(key, frame)))(jnp.arange(time))

    if randomness is None:
        draws = jnp.broadcast_to(of_row(jax.random.key(0)), (batch, time))
    else:
        draws = jax.vmap(lambda key: of_row(jax.random.fold_in(key, _INITIAL)))(randomness.keys)
    return jnp.argsort(jnp.where(frame_mask, draws, jnp.inf), axis=-1)[:, :count].astype(jnp.int32)
