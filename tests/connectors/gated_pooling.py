"""Example of a connector outside of the package: a learned gate selects frames, pooled to 8 tokens each.

CONTRIBUTING.md describes it; test_outside_connector.py trains, evaluates, draws and exports it.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dynfocus_jax.connectors.interface import Connector, ConnectorInputs, Focus, VisualTokens, num_subtitles
from dynfocus_jax.models.projector import PROJECTOR_FIELD, Projector
from dynfocus_jax.ops.packing import pack_frames
from dynfocus_jax.ops.perturbed_topk import distinct_argmax, hard_topk, perturbed_topk
from dynfocus_jax.sections import Field


class GatedPooling(Connector):
    """Select the frames with the highest scores, and average-pool each to a few tokens."""

    FIELDS: ClassVar = {
        "tokens": Field(8, "tokens of a selected frame, P", at_least=1),
        "frames": Field(7, "selected frames, J", at_least=1),
        "samples": Field(100, "perturbations of the scores, S", at_least=1),
        "sigma": Field(0.1, "standard deviation of the perturbations", at_least=0),
        "projector": PROJECTOR_FIELD,
    }

    def setup(self):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.gate = nn.Dense(1, **types)
        self.projector = Projector(self.settings.projector, self.dimensions.language_width, **types)

    def length(self, frames: int) -> int:
        return min(self.settings.frames, frames) * self.settings.tokens

    def __call__(self, inputs: ConnectorInputs, *, train: bool = False) -> VisualTokens:
        batch, time, patches, _ = inputs.features.shape
        parts = np.array_split(np.arange(patches), self.settings.tokens)
        means = [inputs.features[:, :, part].mean(axis=2) for part in parts]
        pooled = jnp.stack(means, axis=2)  # [B, T, P, C]
        scores = jax.nn.sigmoid(self.gate(pooled.mean(axis=2))[..., 0].astype(jnp.float32))  # [B, T]
        slots, mask = min(self.settings.frames, time), inputs.frame_mask
        count = jnp.minimum(mask.sum(axis=1), slots)
        if train:
            noise, sigma = self.noise(inputs), self.settings.sigma
            rows = perturbed_topk(scores, noise, slots, sigma, mask=mask, count=count)
            frames = distinct_argmax(jax.lax.stop_gradient(rows), mask=mask, count=count)
        else:
            frames = hard_topk(scores, slots, mask=mask, count=count)
            rows = jax.nn.one_hot(frames, time)
        selected = jnp.einsum("bjt,btpc->bjpc", rows.astype(pooled.dtype), pooled)

        # --- The rest is the same in every connector that selects frames -------------------------------
        frames = jnp.minimum(frames, time - 1).astype(jnp.int32)
        valid = jnp.arange(slots) < count[:, None]
        tokens = self.projector(selected)  # [B, J, P, D]
        no_tokens = jnp.zeros((batch, time, 0, tokens.shape[-1]), tokens.dtype)
        length = self.length(time) + num_subtitles(inputs)
        packed = pack_frames(no_tokens, tokens, frames, mask & False, valid, length, inputs.subtitles)
        chosen = jax.nn.one_hot(jnp.where(valid, frames, time), time, dtype=bool).any(axis=1)
        per_frame = jnp.where(chosen, self.settings.tokens, 0)
        return VisualTokens(*packed, Focus(frames, valid, mask, jnp.where(mask, scores, 0), per_frame))

    def noise(self, inputs: ConnectorInputs) -> jax.Array:
        """Draw `[B, S, T]` from the rows' keys frame by frame, so that padding does not change the values."""

        def draw_frame(key, frame):
            return jax.random.normal(jax.random.fold_in(key, frame), (self.settings.samples,))

        over_frames = jax.vmap(draw_frame, in_axes=(None, 0), out_axes=1)
        frames = jnp.arange(inputs.frame_mask.shape[1])
        return jax.vmap(over_frames, in_axes=(0, None))(inputs.randomness.keys, frames)
