"""Connectors: what turns frame features into language tokens. All share one call."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynfocus_jax.connectors.dynfocus.cooperative import CooperativeEncoding, Projector
from dynfocus_jax.connectors.dynfocus.event_prototypes import EventPrototypes, Selection
from dynfocus_jax.ops.packing import pack_frames
from dynfocus_jax.ops.pooling import pool_grid

KINDS = ("dynfocus", "pooled")


class VisualTokens(NamedTuple):
    """Visual tokens of a batch, packed to the left; the text between them (subtitles) counts as such.

    tokens: `[B, L, D]`, zeros on padding; mask: bool `[B, L]`; count: int32 `[B]` valid tokens;
    selection: DPE's decisions (None for connectors that select nothing).
    """

    tokens: jax.Array
    mask: jax.Array
    count: jax.Array
    selection: Selection | None


class DynFocusConnector(nn.Module):
    """DPE + CCE + projector: important frames as cones, the others as rods, in time order."""

    grid: tuple[int, int]
    pool: tuple[int, int]
    width: int
    projector_kind: str
    dpe: EventPrototypes
    cce: CooperativeEncoding
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def needs_text(self) -> bool:
        """Whether the text encoder's queries are read."""
        return "context" in self.cce.rods

    def setup(self):
        self.projector = Projector(self.projector_kind, self.width, self.dtype, self.param_dtype)

    def length(self, frames: int) -> int:
        """Static number of visual tokens of a bucket of `frames` frames: the most that it can need.

        Without the text between them.
        """
        pooled, patches = self.pool[0] * self.pool[1], self.grid[0] * self.grid[1]
        cone, rod = self.cce.cone_tokens(patches, pooled), self.cce.rod_tokens()
        kept = self.dpe.kept(frames)

        def most(total):
            return 0 if self.cce.cones == "none" else kept[min(total, len(kept) - 1)]

        def tokens(total, important):
            both = self.cce.released and important == total
            return cone * important + rod * (total if both else total - important)

        # Fewer than the most frames may be important (oracles, k-means on duplicates, slots that agree); the
        # tokens grow or shrink with their number steadily.
        return max(tokens(total, important) for total in range(frames + 1) for important in (0, most(total)))

    def __call__(
        self,
        features: jax.Array,
        frame_mask: jax.Array,
        text_queries: jax.Array | None = None,
        *,
        train: bool = False,
        random_selection: jax.Array | None = None,
        question: tuple[jax.Array, jax.Array] | None = None,
        oracle: jax.Array | None = None,
        initial: jax.Array | None = None,
        noise: jax.Array | None = None,
        share: tuple[jax.Array, int] | None = None,
        text: tuple[jax.Array, jax.Array] | None = None,
    ) -> VisualTokens:
        """Encode a batch of videos.

        Args:
          features: `[B, T, N, C]`; frame_mask: bool `[B, T]`, valid frames first.
          text_queries: `[B, T, Q, C]`, needed when the rods hold "context".
          text: subtitles, `[B, S, D]` and their frames `[B, S]`, see `pack_frames`.
          The rest goes to `EventPrototypes.__call__`.
        """
        selection = self.dpe(
            features,
            frame_mask,
            train=train,
            random_selection=random_selection,
            question=question,
            oracle=oracle,
            initial=initial,
            noise=noise,
            share=share,
        )
        return self.encode(features, frame_mask, self.cce.spatial(features), selection, text_queries, text)

    def encode(
        self,
        features: jax.Array,
        frame_mask: jax.Array,
        grains: list[jax.Array],
        selection: Selection,
        text_queries: jax.Array | None,
        text: tuple[jax.Array, jax.Array] | None = None,
    ) -> VisualTokens:
        """Tokens of the selected and the other frames, given the features' levels of spatial prototypes."""
        rods, cones = self.cce.encode(features, grains, selection, text_queries, self.projector)
        cone_mask = selection.valid if self.cce.cones != "none" else jnp.zeros_like(selection.valid)
        slots = jnp.where(cone_mask, selection.frames, frame_mask.shape[1])
        important = jax.nn.one_hot(slots, frame_mask.shape[1], dtype=bool).any(axis=1)
        rod_mask = frame_mask & ~important
        if self.cce.released:  # every frame important: rods stand before the cones
            every = (important == frame_mask).all(axis=1, keepdims=True)
            rod_mask |= frame_mask & every
        length = self.length(features.shape[1]) + _tokens(text)
        packed = pack_frames(rods, cones, selection.frames, rod_mask, cone_mask, length, text)
        return VisualTokens(*packed, selection=None if self.cce.cones == "none" else selection)


class PooledConnector(nn.Module):
    """Average pooling and the projector: the same few tokens for every frame."""

    grid: tuple[int, int]
    pool: tuple[int, int]
    width: int
    projector_kind: str
    dtype: str = "float32"
    param_dtype: str = "float32"

    needs_text = False

    def setup(self):
        self.projector = Projector(self.projector_kind, self.width, self.dtype, self.param_dtype)

    def length(self, frames: int) -> int:
        """Static number of visual tokens of a bucket of `frames` frames, without the text between them."""
        return frames * self.pool[0] * self.pool[1]

    def __call__(
        self, features: jax.Array, frame_mask: jax.Array, text_queries=None, *, text=None, **_selection
    ) -> VisualTokens:
        """`features [B, T, N, C]`, frame_mask `[B, T]` -> P tokens a valid frame, and its text."""
        tokens = self.projector(pool_grid(features, self.grid, self.pool))  # [B, T, P, D]
        batch, time, _, width = tokens.shape
        no_cones = jnp.zeros((batch, 0, 0, width), tokens.dtype)
        no_slots = jnp.zeros((batch, 0), jnp.int32)
        length, no_mask = self.length(time) + _tokens(text), no_slots.astype(bool)
        packed = pack_frames(tokens, no_cones, no_slots, frame_mask, no_mask, length, text)
        return VisualTokens(*packed, selection=None)


def _tokens(text: tuple[jax.Array, jax.Array] | None) -> int:
    return 0 if text is None else text[1].shape[1]


def build_connector(config) -> nn.Module:
    """The connector of a model config (`config.model`)."""
    connector, vision = config.connector, config.vision
    types = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    common = {
        "grid": (vision.image_size // vision.patch_size,) * 2,
        "pool": tuple(connector.pool),
        "width": config.language.width,
        "projector_kind": connector.projector,
        **types,
    }
    if connector.kind == "pooled":
        return PooledConnector(**common)
    dpe = EventPrototypes(mode=config.mode, grid=common["grid"], pool=common["pool"], **config.dpe, **types)
    cce = CooperativeEncoding(
        mode=config.mode,
        levels=tuple(map(tuple, config.cce.levels)),
        clustering=config.cce.clustering,
        cones=config.cce.cones,
        rods=tuple(config.cce.rods),
        width=config.language.width,
        **types,
    )
    return DynFocusConnector(dpe=dpe, cce=cce, **common)
