"""Compact cooperative encoding (CCE): cones for important frames, rods for the others (section 3.3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynfocus_jax.connectors.dynfocus.event_prototypes import Selection
from dynfocus_jax.ops.clustering import cluster, map_frames

CONES = ("multi_grained", "single_grained", "cross_attention", "pair", "patches", "none")
RODS = ("content", "context", "coarse")
PROJECTORS = ("mlp", "linear", "residual")


class Projector(nn.Module):
    """The paper's f: vision width C -> language width D.

    kind: "mlp" Linear(C, D) GELU Linear(D, D), as published; "linear" Linear(C, D); "residual" that linear
    map plus an MLP branch that starts at zero (so that a model aligned linearly can be taken over).
    """

    kind: str
    width: int
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(name, **kwargs):
            return nn.Dense(self.width, name=name, dtype=self.dtype, param_dtype=self.param_dtype, **kwargs)

        def mlp(x, **kwargs):
            return dense("down", **kwargs)(jax.nn.gelu(dense("up")(x), approximate=False))

        if self.kind == "mlp":
            return mlp(x)
        out = dense("linear")(x)
        if self.kind == "residual":
            out += mlp(x, kernel_init=nn.initializers.zeros)
        return out


class SpatialPrototypes(nn.Module):
    """Multi-grained S-DPC of every frame's patches: `[B, T, N, C]` -> list of levels `[B, T, M_l, C]`.

    `levels`: (M, k) pairs; level l clusters the prototypes of level l - 1. `grouped` (released code, two
    levels): one level `[B, T, M_1 + M_2, C]` in which each coarse prototype is followed by its members and
    each such group is scaled by a learned softmax gate.
    """

    levels: tuple[tuple[int, int], ...]
    clustering: str
    weighting: str
    grouped: bool
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, features: jax.Array) -> list[jax.Array]:

        def cluster_patches(patches):
            """[..., N, C] -> levels of prototypes [..., M_l, C] and the last one's assignment."""
            grains, assignment = [patches], None
            for count, neighbors in self.levels:
                clusters = cluster(
                    grains[-1], count, neighbors, method=self.clustering, weighting=self.weighting
                )
                grains.append(clusters.prototypes)
                assignment = clusters.assignment
            return grains[1:], assignment

        lead, frame = features.shape[:-2], features.shape[-2:]
        found = map_frames(cluster_patches, features.reshape(-1, *frame))
        grains, assignment = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)
        if not self.grouped:
            return grains

        fine, coarse = grains
        count = coarse.shape[-2]
        gate = nn.Dense(count, name="gate", dtype=self.dtype, param_dtype=self.param_dtype)
        gate = jax.nn.softmax(gate(coarse.mean(axis=-1)).astype(jnp.float32), axis=-1)  # [B, T, M_2]
        # Group of every token; sorting by (group, coarse first, member index) gives the published order.
        group = jnp.concatenate([jnp.broadcast_to(jnp.arange(count), gate.shape), assignment], axis=-1)
        order = jnp.argsort(group, axis=-1, stable=True)  # coarse tokens come first in `tokens`
        tokens = jnp.concatenate([coarse, fine], axis=-2)
        scale = jnp.take_along_axis(gate, group, axis=-1)[..., None].astype(tokens.dtype)
        return [jnp.take_along_axis(tokens * scale, order[..., None], axis=-2)]


class TextContext(nn.Module):
    """Rods' context: what the text queries look for in a frame (Eq. 11), `[B, T, D]`.

    `W_v(mean_Q[softmax(Q (W_k S)^T / sqrt(C)) S])` for prototypes `S [B, T, M, C]`, queries `[B, T, Q, C]`.
    """

    width: int
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, prototypes: jax.Array, queries: jax.Array) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = prototypes.shape[-1]
        keys = nn.Dense(channels, name="key", **types)(prototypes)
        logits = jnp.einsum("btqc,btmc->btqm", queries.astype(keys.dtype), keys).astype(jnp.float32)
        weights = jax.nn.softmax(logits / channels**0.5, axis=-1).mean(axis=-2)  # mean over Q first: linear
        context = jnp.einsum("btm,btmc->btc", weights.astype(prototypes.dtype), prototypes)
        return nn.Dense(self.width, name="value", **types)(context)


class CrossAttentionFusion(nn.Module):
    """Table 12's soft fusion: event tokens read the frame's prototypes, `[B, J, P, C]` out."""

    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, events: jax.Array, prototypes: jax.Array) -> jax.Array:
        channels = events.shape[-1]

        def dense(name, x):
            return nn.Dense(channels, name=name, dtype=self.dtype, param_dtype=self.param_dtype)(x)

        query, key, value = dense("query", events), dense("key", prototypes), dense("value", prototypes)
        logits = jnp.einsum("bjpc,bjmc->bjpm", query, key).astype(jnp.float32) / channels**0.5
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        return events + jnp.einsum("bjpm,bjmc->bjpc", weights, value)


class CooperativeEncoding(nn.Module):
    """CCE: a frame's features and DPE's selection -> cone and rod tokens in language space.

    `cones`: "multi_grained" the paper's [event; all spatial levels], "single_grained" [event; level 1]
    (Table 12, Concat.), "cross_attention" (Table 12), "pair" two tokens, "patches" all N patches (Table 6),
    "none" (every frame is a rod). `rods`: any of "content" (one token), "context" (one, text-guided),
    "coarse" (the last level's prototypes); an empty tuple drops the unimportant frames.
    """

    mode: str
    levels: tuple[tuple[int, int], ...]
    clustering: str
    cones: str
    rods: tuple[str, ...]
    width: int
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def released(self) -> bool:
        return self.mode == "released"

    def cone_tokens(self, patches: int, pooled: int) -> int:
        """Tokens of a cone frame with `patches` = N and `pooled` = P."""
        spatial = [count for count, _ in self.levels]
        return {
            "multi_grained": pooled + sum(spatial),
            "single_grained": pooled + spatial[0],
            "cross_attention": pooled,
            "pair": 2,
            "patches": patches,
            "none": 0,
        }[self.cones]

    def rod_tokens(self) -> int:
        """Tokens of a rod frame."""
        return sum(self.levels[-1][0] if part == "coarse" else 1 for part in self.rods)

    def setup(self):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.spatial = SpatialPrototypes(
            self.levels,
            self.clustering,
            weighting="mean" if self.released else "importance",
            grouped=self.released,
            **types,
        )
        if "context" in self.rods:
            self.context = TextContext(self.width, **types)
        if self.cones == "cross_attention":
            self.fusion = CrossAttentionFusion(**types)

    def __call__(
        self,
        features: jax.Array,
        selection: Selection,
        text_queries: jax.Array | None,
        projector: nn.Module,
    ) -> tuple[jax.Array, jax.Array]:
        """`features [B, T, N, C]` -> rods `[B, T, R, D]` and cones `[B, J, M, D]` (one a slot)."""
        return self.encode(features, self.spatial(features), selection, text_queries, projector)

    def encode(
        self,
        features: jax.Array,
        grains: list[jax.Array],
        selection: Selection,
        text_queries: jax.Array | None,
        projector: nn.Module,
    ) -> tuple[jax.Array, jax.Array]:
        """Rods and cones, given the levels of spatial prototypes `[B, T, M_l, C]` of the features."""
        spatial = jnp.concatenate(grains, axis=-2)  # [B, T, M, C]

        rods = []
        for part in self.rods:
            if part == "content":
                rods.append(projector(spatial.mean(axis=-2))[..., None, :])
            elif part == "context":
                rods.append(self.context(spatial, text_queries)[..., None, :])
            else:
                rods.append(projector(grains[-1]))
        batch, time = features.shape[:2]
        rods = (
            jnp.concatenate(rods, axis=-2)
            if rods
            else jnp.zeros((batch, time, 0, self.width), features.dtype)
        )

        if self.cones == "none":
            return rods, jnp.zeros((batch, selection.frames.shape[1], 0, self.width), rods.dtype)
        return rods, projector(self._cone_features(features, grains, spatial, selection))

    def _cone_features(self, features, grains, spatial, selection):
        """What a cone shows, in vision space `[B, J, M, C]`."""

        def of_slots(x):  # [B, T, ...] -> [B, J, ...]
            return jnp.take_along_axis(x, selection.frames[..., None, None], axis=1)

        events = selection.events
        if self.cones == "patches":
            return of_slots(features)
        if self.cones == "single_grained":
            return jnp.concatenate([events, of_slots(grains[0])], axis=-2)
        slots = self._mixed(spatial, selection) if self.released else of_slots(spatial)
        if self.cones == "pair":
            return jnp.stack([events.mean(axis=-2), slots.mean(axis=-2)], axis=-2)
        if self.cones == "cross_attention":
            return self.fusion(events, slots)
        return jnp.concatenate([events, slots], axis=-2)

    def _mixed(self, spatial, selection):
        """Released: the key frames' prototypes mixed by the (detached) indicators of each slot."""
        keys = jnp.take_along_axis(spatial, selection.centers[..., None, None], axis=1)  # [B, K, M, C]
        weights = jax.lax.stop_gradient(selection.indicators).astype(keys.dtype)
        return jnp.einsum("bjk,bkmc->bjmc", weights, keys)
