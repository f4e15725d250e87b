"""Compact cooperative encoding (CCE): cones for important frames, rods for the others (section 3.3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from dynfocus_jax.connectors.dynfocus.selection import Selection
from dynfocus_jax.connectors.interface import ConnectorInputs
from dynfocus_jax.models.layers import Dtype, Dtypes
from dynfocus_jax.ops.clustering import CLUSTERING_METHODS, cluster, map_frames
from dynfocus_jax.sections import Field, require

CCE_FIELDS = {
    "levels": Field(
        ((16, 8), (8, 3)), "(M, k) of each level of spatial clustering: M prototypes, k neighbours"
    ),
    "clustering": Field("dpc_knn", "how patches are clustered (Table 11)", choices=CLUSTERING_METHODS),
    "cones": Field(
        "multi_grained",
        'tokens of an important frame: "multi_grained", [event; all spatial levels]; "single_grained", '
        '[event; level 1], and "cross_attention" (Table 12); "pair", two tokens; "patches", all N patches '
        '(Table 6); "none", every frame is a rod',
        choices=("multi_grained", "single_grained", "cross_attention", "pair", "patches", "none"),
    ),
    "rods": Field(
        ("content", "context"),
        'tokens of every other frame: "content", one; "context", one that attends to the text queries; '
        '"coarse", the prototypes of the last level; () drops these frames',
        choices=("content", "context", "coarse"),
    ),
}
CCE_SHARDING = ((r"cce/(context|fusion)/(query|key|value)/kernel", ("fsdp", None)),)


def check_cce(settings: ConfigDict, mode: str, patches: int, where: str) -> None:
    """Check the fields of CCE against each other; raise UserError if they do not fit.

    mode: "paper" or "released"; patches: N.
    """
    require(
        len(settings.levels) > 0,
        f"{where}.levels is empty, expected (M, k) pairs such as ((16, 8), (8, 3)).",
    )
    finer = patches
    for index, level in enumerate(settings.levels):
        require(
            isinstance(level, tuple | list) and len(level) == 2 and 1 <= level[0] <= finer and level[1] >= 1,
            f"{where}.levels[{index}] is {level}, expected (M, k) with 1 <= M <= {finer} (the tokens of the "
            "previous level) and k >= 1.",
        )
        finer = level[0]
    require(
        mode == "paper" or len(settings.levels) == 2,
        f"{where}.levels has {len(settings.levels)} levels, expected 2 in mode 'released'; change levels, or "
        "set mode to 'paper'.",
    )
    for name, parts in (("single_grained", (settings.cones,)), ("coarse", settings.rods)):
        require(
            mode == "paper" or name not in parts,
            f"{where} has {name!r}, but mode 'released' merges the levels into one; remove it, or set mode "
            "to 'paper'.",
        )
    require(
        settings.cones != "none" or len(settings.rods) > 0,
        f"{where} has neither cones nor rods; set at least one of them.",
    )


def cone_tokens(settings: ConfigDict, patches: int, pooled: int) -> int:
    """Return the tokens of a cone frame with `patches` = N and `pooled` = P."""
    spatial = [count for count, _ in settings.levels]
    return {
        "multi_grained": pooled + sum(spatial),
        "single_grained": pooled + spatial[0],
        "cross_attention": pooled,
        "pair": 2,
        "patches": patches,
        "none": 0,
    }[settings.cones]


def rod_tokens(settings: ConfigDict) -> int:
    """Return the tokens of a rod frame."""
    return sum(settings.levels[-1][0] if part == "coarse" else 1 for part in settings.rods)


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
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

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
    """Context of the rods: a frame's prototypes attended to by the text queries (Eq. 11), `[B, T, D]`.

    `W_v(mean_Q[softmax(Q (W_k S)^T / sqrt(C)) S])` for prototypes `S [B, T, M, C]`, queries `[B, T, Q, C]`.
    """

    width: int
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, prototypes: jax.Array, queries: jax.Array) -> jax.Array:
        types = Dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        channels = prototypes.shape[-1]
        keys = nn.Dense(channels, name="key", **types)(prototypes)
        logits = jnp.einsum("btqc,btmc->btqm", queries.astype(keys.dtype), keys).astype(jnp.float32)
        weights = jax.nn.softmax(logits / channels**0.5, axis=-1).mean(axis=-2)  # mean over Q first: linear
        context = jnp.einsum("btm,btmc->btc", weights.astype(prototypes.dtype), prototypes)
        return nn.Dense(self.width, name="value", **types)(context)


class CrossAttentionFusion(nn.Module):
    """Soft fusion (Table 12): event tokens attend to the frame's prototypes, `[B, J, P, C]` out."""

    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

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
    """CCE: frame features and DPE's selection -> cone and rod tokens in language space (see CCE_FIELDS)."""

    settings: FrozenConfigDict
    mode: str
    width: int
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    def setup(self):
        settings, types = self.settings, Dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        released = self.mode == "released"
        self.spatial = SpatialPrototypes(
            tuple(map(tuple, settings.levels)),
            settings.clustering,
            weighting="mean" if released else "importance",
            grouped=released,
            **types,
        )
        if "context" in settings.rods:
            self.context = TextContext(self.width, **types)
        if settings.cones == "cross_attention":
            self.fusion = CrossAttentionFusion(**types)

    def encode(
        self, inputs: ConnectorInputs, grains: list[jax.Array], selection: Selection, projector: nn.Module
    ) -> tuple[jax.Array, jax.Array]:
        """Return rods `[B, T, R, D]` and cones `[B, J, M, D]`, one per slot.

        grains: the levels of spatial prototypes `[B, T, M_l, C]` of the features.
        """
        spatial = jnp.concatenate(grains, axis=-2)  # [B, T, M, C]
        batch, time = inputs.frame_mask.shape
        tokens = []
        for part in self.settings.rods:
            if part == "content":
                tokens.append(projector(spatial.mean(axis=-2))[..., None, :])
            elif part == "context":
                assert inputs.text_queries is not None, "needs_text_queries"
                tokens.append(self.context(spatial, inputs.text_queries)[..., None, :])
            else:
                tokens.append(projector(grains[-1]))
        no_rods = jnp.zeros((batch, time, 0, self.width), inputs.features.dtype)
        rods = jnp.concatenate(tokens, axis=-2) if tokens else no_rods
        if self.settings.cones == "none":
            return rods, jnp.zeros((batch, selection.frames.shape[1], 0, self.width), rods.dtype)
        return rods, projector(self._cone_features(inputs.features, grains, spatial, selection))

    def _cone_features(self, features, grains, spatial, selection: Selection) -> jax.Array:
        """Return the content of each cone in vision space, `[B, J, M, C]`."""

        def of_slots(x):  # [B, T, ...] -> [B, J, ...]
            return jnp.take_along_axis(x, selection.frames[..., None, None], axis=1)

        events, cones = selection.events, self.settings.cones
        if cones == "patches":
            return of_slots(features)
        if cones == "single_grained":
            return jnp.concatenate([events, of_slots(grains[0])], axis=-2)
        slots = of_slots(spatial) if self.mode == "paper" else mixed_prototypes(spatial, selection)
        if cones == "pair":
            return jnp.stack([events.mean(axis=-2), slots.mean(axis=-2)], axis=-2)
        if cones == "cross_attention":
            return self.fusion(events, slots)
        return jnp.concatenate([events, slots], axis=-2)


def mixed_prototypes(spatial: jax.Array, selection: Selection) -> jax.Array:
    """Mix the key frames' prototypes by each slot's (detached) indicators, as the released code does."""
    keys = jnp.take_along_axis(spatial, selection.centers[..., None, None], axis=1)  # [B, K, M, C]
    weights = jax.lax.stop_gradient(selection.indicators).astype(keys.dtype)
    return jnp.einsum("bjk,bkmc->bjmc", weights, keys)
