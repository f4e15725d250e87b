"""The assembled model: vision tower, text encoder, connector and language model."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32
from ml_collections import ConfigDict, FrozenConfigDict

from dynfocus_jax import trees
from dynfocus_jax.batch import Batch, padding_sample
from dynfocus_jax.connectors.interface import (
    Connector,
    ConnectorInputs,
    QuestionWords,
    Randomness,
    Subtitles,
    VisualTokens,
    check_output,
)
from dynfocus_jax.connectors.registry import make_connector
from dynfocus_jax.models.llama import Cache, Llama
from dynfocus_jax.models.qformer import QFormer
from dynfocus_jax.models.vit import VisionTransformer
from dynfocus_jax.ops.packing import insert_visual
from dynfocus_jax.parallel.sharding import num_shards, shard


class Output(NamedTuple):
    """A forward pass: logits in which row i predicts text token i, and the visual tokens."""

    logits: Float[Array, "B Lt V"]
    visual: VisualTokens


class Prompts(NamedTuple):
    """The text of a batch of prompts, as in `Batch`."""

    tokens: Int32[Array, "B Lt"]
    length: Int32[Array, " B"]
    visual_position: Int32[Array, " B"]


def stage_section(config: ConfigDict, index: int = -1) -> ConfigDict:
    """Return the section `config.model` of a stage, with the stage's own connector if it names one."""
    section = config.model.copy_and_resolve_references()
    connector = config.stages[index].connector if config.stages else None
    if connector is not None:
        with section.unlocked(), section.ignore_type():
            section.connector = connector
    return section


def build_model(config: ConfigDict, index: int = -1) -> "VideoLanguageModel":
    """Return the model of stage `index` of a configuration (the last one, unless told otherwise)."""
    return VideoLanguageModel(FrozenConfigDict(stage_section(config, index)))


def stage_connector(config: ConfigDict, index: int = -1) -> Connector:
    """Return the connector of stage `index` of a configuration, without parameters."""
    return make_connector(stage_section(config, index))


def make_init(model: "VideoLanguageModel") -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Return a function (to be jitted) from a key to the initial parameters, {path: leaf}."""
    sample = padding_sample(1, model.config.vision.image_size, max_text=2, max_query=1)
    batch = jax.tree.map(lambda x: np.asarray(x)[None], sample)
    return lambda key: trees.flatten(model.init(key, batch, train=False)["params"])


def row_randomness(
    key: jax.Array, rows: int, select_at_random: bool | Bool[Array, ""] = False, **given: jax.Array
) -> Randomness:
    """Return the randomness of a training batch: each of the `rows` rows draws from its own key.

    given: values by name that are used instead of drawn ones.
    """
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))
    return Randomness(keys, jnp.asarray(select_at_random), given)


class VideoLanguageModel(nn.Module):
    """Video language model. `config` is the (frozen) `model` section of a configuration."""

    config: FrozenConfigDict

    def setup(self):
        config = self.config
        types = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.vision = VisionTransformer(**config.vision, **types)
        self.connector = make_connector(config)
        self.language = Llama(**config.language, **types)
        if self.connector.needs_text_queries or self.connector.needs_question:
            self.text_encoder = QFormer(**config.text_encoder, output_width=config.vision.width, **types)

    def visual_tokens(
        self, batch: Batch, *, train: bool = False, randomness: Randomness | None = None
    ) -> VisualTokens:
        """Encode the frames (and question) of a batch as packed visual tokens, subtitles between them.

        Args:
          batch: its frames are pixels, or features, for which the vision tower is not run.
          train: whether the connector trains; it then needs `randomness` (`row_randomness`).
        """
        features = shard(self._features(batch.frames), "batch", None, None, None)  # [B, T, (1+)N, C]
        queries = question = subtitles = None
        if self.connector.needs_text_queries:
            queries = self.text_encoder(batch.query_tokens, batch.query_length, features)
        if self.connector.needs_question:
            question = QuestionWords(self.text_encoder.embed_words(batch.query_tokens), batch.query_length)
        if batch.subtitles.shape[1]:
            subtitles = Subtitles(self.language.embed(batch.subtitles), batch.subtitle_frames)
        inputs = ConnectorInputs(
            features=features[:, :, 1:] if self.config.vision.cls_token else features,
            frame_mask=batch.frame_mask,
            text_queries=queries,
            question=question,
            oracle_frames=batch.oracle_frames,
            subtitles=subtitles,
            randomness=randomness,
        )
        visual = self.connector(inputs, train=train)
        check_output(visual, inputs, self.connector)
        return visual

    def _features(self, frames: jax.Array) -> jax.Array:
        """Return the vision tower's features of pixels; frames that are features already are only cast."""
        if frames.ndim == 5:
            return self.vision(frames, keep_cls=True)
        return frames.astype(self.config.dtype)

    def _joined(self, batch: Batch | Prompts, visual: VisualTokens) -> tuple[jax.Array, jax.Array]:
        """Insert the visual tokens into the text: embeddings `[B, L, D]` and lengths `[B]`.

        L is Lt + Lv, rounded up to a multiple of the devices on the context axis.
        """
        text = self.language.embed(batch.tokens)
        joined = insert_visual(
            text, batch.length, visual.tokens.astype(text.dtype), visual.count, batch.visual_position
        )
        joined = jnp.pad(joined, ((0, 0), (0, -joined.shape[1] % num_shards("sequence")), (0, 0)))
        return shard(joined, "batch", "sequence", None), batch.length + visual.count

    def __call__(self, batch: Batch, *, train: bool = False, randomness: Randomness | None = None) -> Output:
        """Return the logits of every text token given all tokens before it (those of row 0 are unused)."""
        hidden, visual = self.hidden(batch, train=train, randomness=randomness)
        return Output(self.logits(hidden), visual)

    def hidden(
        self, batch: Batch, *, train: bool = False, randomness: Randomness | None = None
    ) -> tuple[jax.Array, VisualTokens]:
        """Return the hidden states `[B, Lt, D]` that `logits` takes, and the visual tokens."""
        visual = self.visual_tokens(batch, train=train, randomness=randomness)
        embeddings, lengths = self._joined(batch, visual)
        hidden = self.language(embeddings, lengths)
        # Text token i sits at i, or at i + count behind the visual tokens; the position before predicts it.
        index = jnp.arange(batch.tokens.shape[1])
        behind = index >= batch.visual_position[:, None]
        before = index + jnp.where(behind, visual.count[:, None], 0) - 1
        hidden = shard(hidden, "batch", None, None)
        return jnp.take_along_axis(hidden, jnp.maximum(before, 0)[..., None], axis=1), visual

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return the language model's logits: `[B, Lt, D] -> [B, Lt, V]` float32."""
        return self.language.logits(hidden)

    def prefill(self, prompts: Batch | Prompts, visual: VisualTokens) -> tuple[jax.Array, Cache]:
        """Prefill prompts: logits `[B, V]` of the first answer token, and the KV cache."""
        embeddings, lengths = self._joined(prompts, visual)
        hidden, cache = self.language.prefill(embeddings, lengths)
        last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
        return self.language.logits(last[:, 0]), cache

    def decode(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Decode one step: `tokens [B]` -> logits `[B, V]` of the next token, and the extended cache."""
        embeddings = self.language.embed(tokens[:, None])
        hidden, cache = self.language.extend(embeddings, jnp.ones_like(tokens), cache)
        return self.language.logits(hidden[:, 0]), cache
