"""The assembled model: vision tower, text encoder, connector and language model."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from dynfocus_jax import trees
from dynfocus_jax.batch import Batch, padding_sample
from dynfocus_jax.connectors.connectors_old import VisualTokens, build_connector
from dynfocus_jax.models.llama import Cache, Llama
from dynfocus_jax.models.qformer import QFormer
from dynfocus_jax.models.vit import VisionTransformer
from dynfocus_jax.ops.packing import insert_visual
from dynfocus_jax.parallel.sharding import shard, shares


class Output(NamedTuple):
    """A forward pass: `logits [B, Lt, V]` float32, where row i predicts text token i; the visual tokens."""

    logits: jax.Array
    visual: VisualTokens


class Prompts(NamedTuple):
    """The text of a batch of prompts, as in `Batch`."""

    tokens: jax.Array  # int32 [B, Lt]
    length: jax.Array  # int32 [B]
    visual_position: jax.Array  # int32 [B]


def build_model(config: ConfigDict, connector: str) -> "DynFocus":
    """The model of a whole configuration with the connector of a stage."""
    model = config.model.copy_and_resolve_references()
    model.connector.kind = connector
    return DynFocus(FrozenConfigDict(model))


def make_init(model: "DynFocus") -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Initial parameters of a model, {path: leaf}, as a function of a key (to be jitted)."""
    sample = padding_sample(1, model.config.vision.image_size, max_text=2, max_query=1)
    batch = jax.tree.map(lambda x: np.asarray(x)[None], sample)
    return lambda key: trees.flatten(model.init(key, batch, train=False)["params"])


class DynFocus(nn.Module):
    """Video language model. `config` is the (frozen) `model` section of a configuration."""

    config: object

    def setup(self):
        config = self.config
        types = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.vision = VisionTransformer(**config.vision, **types)
        self.connector = build_connector(config)
        self.language = Llama(**config.language, **types)
        if self.connector.needs_text or config.dpe.question_conditioned:
            self.text_encoder = QFormer(**config.text_encoder, output_width=config.vision.width, **types)

    def visual_tokens(
        self, batch: Batch, *, train: bool = False, random_selection: jax.Array | None = None, **selection
    ) -> VisualTokens:
        """Frames (and the question) to packed visual tokens; `selection` goes to the connector.

        Subtitles stand between them, behind the tokens of their frames; the connector does not read them.
        Where the frames are features the vision tower is not run.
        """
        features = shard(self._features(batch.frames), "batch", None, None, None)  # [B, T, (1+)N, C]
        queries = question = None
        if self.connector.needs_text:
            queries = self.text_encoder(batch.query_tokens, batch.query_length, features)
        if self.config.dpe.question_conditioned and self.config.connector.kind == "dynfocus":
            question = (self.text_encoder.embed_words(batch.query_tokens), batch.query_length)
        subtitles = None
        if batch.subtitles.shape[1]:
            subtitles = self.language.embed(batch.subtitles), batch.subtitle_frames
        patches = features[:, :, 1:] if self.config.vision.cls_token else features
        return self.connector(
            patches,
            batch.frame_mask,
            queries,
            train=train,
            random_selection=random_selection,
            question=question,
            oracle=batch.oracle_frames,
            text=subtitles,
            **selection,
        )

    def _features(self, frames: jax.Array) -> jax.Array:
        """What the vision tower makes of pixels; features that stand in their place are that already."""
        if frames.ndim == 5:
            return self.vision(frames, keep_cls=True)
        return frames.astype(self.config.dtype)

    def _joined(self, batch: Batch | Prompts, visual: VisualTokens) -> tuple[jax.Array, jax.Array]:
        """Text with the visual tokens in their place: embeddings `[B, L, D]` and lengths `[B]`.

        L is Lt + Lv, rounded up to a multiple of the devices that share the sequence.
        """
        text = self.language.embed(batch.tokens)
        joined = insert_visual(
            text, batch.length, visual.tokens.astype(text.dtype), visual.count, batch.visual_position
        )
        joined = jnp.pad(joined, ((0, 0), (0, -joined.shape[1] % shares("sequence")), (0, 0)))
        return shard(joined, "batch", "sequence", None), batch.length + visual.count

    def __call__(
        self, batch: Batch, *, train: bool = False, random_selection: jax.Array | None = None, **selection
    ) -> Output:
        """Logits of every text token given all that stands before it (row 0 predicts nothing useful)."""
        hidden, visual = self.hidden(batch, train=train, random_selection=random_selection, **selection)
        return Output(self.logits(hidden), visual)

    def hidden(
        self, batch: Batch, *, train: bool = False, random_selection: jax.Array | None = None, **selection
    ) -> tuple[jax.Array, VisualTokens]:
        """What `logits` turns into the logits of `__call__`: `[B, Lt, D]`; the visual tokens."""
        visual = self.visual_tokens(batch, train=train, random_selection=random_selection, **selection)
        embeddings, lengths = self._joined(batch, visual)
        hidden, _ = self.language(embeddings, lengths)
        # Text token i sits at i, or at i + count behind the visual tokens; the position before predicts it.
        index = jnp.arange(batch.tokens.shape[1])
        behind = index >= batch.visual_position[:, None]
        before = index + jnp.where(behind, visual.count[:, None], 0) - 1
        hidden = shard(hidden, "batch", None, None)
        return jnp.take_along_axis(hidden, jnp.maximum(before, 0)[..., None], axis=1), visual

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Of the language model: `[B, Lt, D] -> [B, Lt, V]` float32."""
        return self.language.logits(hidden)

    def read(self, prompts: Batch | Prompts, visual: VisualTokens) -> tuple[jax.Array, Cache]:
        """Reads prompts: logits `[B, V]` of the first answer token, and the cache of what was read."""
        embeddings, lengths = self._joined(prompts, visual)
        cache = self.language.empty_cache(embeddings.shape[0], 0)
        hidden, cache = self.language(embeddings, lengths, cache)
        last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
        return self.language.logits(last[:, 0]), cache

    def decode(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One step: `tokens [B]` -> logits `[B, V]` of the next token and the extended cache."""
        embeddings = self.language.embed(tokens[:, None])
        hidden, cache = self.language(embeddings, jnp.ones_like(tokens), cache)
        return self.language.logits(hidden[:, 0]), cache
