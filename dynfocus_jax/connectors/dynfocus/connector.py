"""The DynFocus connector: DPE selects frames, CCE encodes them, tokens are packed in time order (Eq. 13)."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dynfocus_jax.connectors.dynfocus import cooperative, event_prototypes
from dynfocus_jax.connectors.dynfocus.cooperative import CooperativeEncoding
from dynfocus_jax.connectors.dynfocus.event_prototypes import EventPrototypes
from dynfocus_jax.connectors.dynfocus.published import DYNFOCUS, LLAMA_VID
from dynfocus_jax.connectors.dynfocus.selection import Selection, kept_counts
from dynfocus_jax.connectors.interface import Connector, ConnectorInputs, Focus, VisualTokens, num_subtitles
from dynfocus_jax.connectors.pooled import POOL_FIELD, PROJECTOR_SHARDING, check_pool
from dynfocus_jax.models.layers import Dtypes
from dynfocus_jax.models.projector import PROJECTOR_FIELD, Projector
from dynfocus_jax.ops.packing import pack_frames
from dynfocus_jax.sections import Field


class DynFocusConnector(Connector):
    """Important frames as cones (about 40 tokens), all others as rods (2 tokens), in time order."""

    FIELDS: ClassVar = {
        "mode": Field(
            "paper",
            '"paper" computes the method as published, "released" what the authors\' code computes',
            choices=("paper", "released"),
        ),
        "pool": POOL_FIELD,
        "projector": PROJECTOR_FIELD,
        "dpe": event_prototypes.DPE_FIELDS,
        "cce": cooperative.CCE_FIELDS,
    }
    SHARDING = (*PROJECTOR_SHARDING, *event_prototypes.DPE_SHARDING, *cooperative.CCE_SHARDING)
    PUBLISHED: ClassVar = {"llama_vid": LLAMA_VID, "dynfocus": DYNFOCUS}
    TRAINABLE = ("connector/.*", "text_encoder/query_projection/.*")

    @classmethod
    def check(cls, settings: ConfigDict, model: ConfigDict, where: str) -> None:
        check_pool(settings, model, where)
        event_prototypes.check_dpe(settings.dpe, f"{where}.dpe")
        patches = (model.vision.image_size // model.vision.patch_size) ** 2
        cooperative.check_cce(settings.cce, settings.mode, patches, f"{where}.cce")

    @property
    def needs_text_queries(self) -> bool:
        return "context" in self.settings.cce.rods

    @property
    def needs_question(self) -> bool:
        return self.settings.dpe.question_conditioned

    def setup(self):
        settings, types = self.settings, Dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        grid, width = self.dimensions.grid, self.dimensions.language_width
        self.projector = Projector(settings.projector, width, **types)
        self.dpe = EventPrototypes(settings.dpe, settings.mode, grid, settings.pool, **types)
        self.cce = CooperativeEncoding(settings.cce, settings.mode, width, **types)

    def _tokens_per_frame(self) -> tuple[int, int]:
        """Return the tokens of a cone frame and of a rod frame."""
        pooled = self.settings.pool[0] * self.settings.pool[1]
        patches = self.dimensions.grid[0] * self.dimensions.grid[1]
        return cooperative.cone_tokens(self.settings.cce, patches, pooled), cooperative.rod_tokens(
            self.settings.cce
        )

    def length(self, frames: int) -> int:
        cone, rod = self._tokens_per_frame()
        kept = kept_counts(self.settings.dpe, frames)

        def most_cones(total: int) -> int:
            return 0 if self.settings.cce.cones == "none" else kept[min(total, len(kept) - 1)]

        def tokens(total: int, cones: int) -> int:
            # The released code gives every frame its rods too when all frames are cones.
            both = self.settings.mode == "released" and cones == total
            return cone * cones + rod * (total if both else total - cones)

        # There may be fewer cones than slots (oracles, k-means on duplicates, two slots that name one
        # frame), and
        # the count changes monotonically with their number: the largest is at either end.
        return max(tokens(total, cones) for total in range(frames + 1) for cones in (0, most_cones(total)))

    def __call__(self, inputs: ConnectorInputs, *, train: bool = False) -> VisualTokens:
        selection = self.dpe(inputs, train=train)
        return self.encode(inputs, self.cce.spatial(inputs.features), selection)

    def encode(self, inputs: ConnectorInputs, grains: list[jax.Array], selection: Selection) -> VisualTokens:
        """Return the packed tokens, given the selection and the spatial prototypes of every frame."""
        rods, cones = self.cce.encode(inputs, grains, selection, self.projector)
        frame_mask, time = inputs.frame_mask, inputs.frame_mask.shape[1]
        no_cones = self.settings.cce.cones == "none"
        cone_mask = jnp.zeros_like(selection.valid) if no_cones else selection.valid
        cone_frames = jnp.where(cone_mask, selection.frames, time)
        is_cone = jax.nn.one_hot(cone_frames, time, dtype=bool).any(axis=1)  # [B, T]
        rod_mask = frame_mask & ~is_cone
        if self.settings.mode == "released":
            rod_mask |= frame_mask & (is_cone == frame_mask).all(axis=1, keepdims=True)
        length = self.length(time) + num_subtitles(inputs)
        packed = pack_frames(rods, cones, selection.frames, rod_mask, cone_mask, length, inputs.subtitles)
        if no_cones:
            return VisualTokens(*packed)
        cone, rod = self._tokens_per_frame()
        return VisualTokens(*packed, focus=self._focus(selection, cone_mask, cone * is_cone + rod * rod_mask))

    def _focus(self, selection: Selection, cone_mask: jax.Array, tokens: jax.Array) -> Focus | None:
        if cone_mask.shape[1] == 0:
            return None
        time = tokens.shape[1]
        centers = jnp.where(selection.prototype_valid, selection.centers, time)
        candidates = jax.nn.one_hot(centers, time, dtype=bool).any(axis=1)
        return Focus(
            selection.frames, cone_mask, candidates, selection.frame_scores, tokens.astype(jnp.int32)
        )
